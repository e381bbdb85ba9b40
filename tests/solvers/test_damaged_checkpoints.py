"""Checkpoints that anybody may have written: whatever is wrong with them, they are refused with what to do."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law

from ntkpipe.base.errors import ConfigError, NtkpipeError, StoreError
from ntkpipe.learning.dynamics import dynamics
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.inverse.solve import solve, solve_path
from ntkpipe.solvers.spectral.density import density
from ntkpipe.solvers.spectral.lanczos import eigsh
from ntkpipe.solvers.spectral.logdet import slq_logdet
from ntkpipe.solvers.spectral.smallest import smallest
from ntkpipe.store.results import Checkpoint

N = 24
MATRIX = matrix_with_spectrum(power_law(N, condition=1e4))
TARGETS = np.random.default_rng(1).standard_normal((N, 2))
DELETED = object()
# Of no value that a state has is one of these the type. Text is of none that may not be any text.
WRONG = {"deleted": DELETED, "text": "x", "object": {"x": 1}, "nested": [[[1.0]]]}
# Of the right type, or nearly so, where a number is wanted.
NUMBERS = {"none": None, "negative": -3, "fraction": 0.5, "huge": 10**30, "NaN": math.nan, "truth": True, "empty": []}
# What may be text, or missing.
FREE = {("why",), ("result",), ("result", "message")}
# May be missing, and is computed then.
OPTIONAL = {("spaces", "probes"), ("spaces", "top"), ("spaces", "targets")}
DECIDES = {"decides", "key"}
STAGES = {"stages", "parts"}

CALLS = {
    "eigsh": lambda **options: eigsh(MATRIX, 3, block=2, **options),
    "restarted": lambda **options: eigsh(MATRIX, 3, block=2, max_basis=9, **options),
    "density": lambda **options: density(MATRIX, num_probes=2, max_passes=12, **options),
    "slq_logdet": lambda **options: slq_logdet(MATRIX, preconditioner=None, num_probes=2, max_passes=12, **options),
    "dynamics": lambda **options: dynamics(MATRIX, TARGETS, times=[10.0, math.inf], max_passes=12, **options),
    "smallest": lambda **options: smallest(MATRIX, certify=False, block=2, tol=1e-6, **options),
    "solve_path": lambda **options: solve_path(MATRIX, TARGETS, [1.0, 1e-4], rank=3, tol=1e-8, method="pcg", **options),
    "solve": lambda **options: solve(MATRIX, TARGETS, ridge=1e-4, rank=3, tol=1e-8, method="pcg", **options),
}
EVERY = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(scope="module", params=[30, None], ids=["under way", "finished"])
def written(request, tmp_path_factory):
    """Folders of checkpoints, by function."""
    root = tmp_path_factory.mktemp("written")
    for name, call in CALLS.items():
        seen = []

        def stop(step, seen=seen, limit=request.param if name == "solve" else request.param and 7):
            seen.append(step)
            if len(seen) == limit:
                raise KeyboardInterrupt

        try:
            call(checkpoint=Checkpoint(root / name, "run"), monitor=stop)
        except KeyboardInterrupt:
            assert request.param
        else:
            assert request.param is None
    return root


def paths(value, at=()):
    """Places in a JSON value; of lists the first and the last."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if not isinstance(value, list) or key in {0, len(value) - 1}:
            yield from paths(inner, (*at, key))


def changed(state, path, value):
    found = copy.deepcopy(state)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    if value is DELETED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return found


class Damaged:
    """A checkpoint whose state can be replaced."""

    def __init__(self, root, name, tmp_path):
        shutil.copytree(root / name, tmp_path / "c")
        self.root, self.name = tmp_path / "c", name
        self.folder = self.root / "run"
        self._document = json.loads((self.folder / "zarr.json").read_text())
        self.state = self._document["attributes"]["state"]

    def write(self, attributes):
        document = {**self._document, "attributes": attributes}
        (self.folder / "zarr.json").write_text(json.dumps(document))

    def call(self):
        """What comes of it; the folder is left as it was."""
        checkpoint = Checkpoint(self.root, "run")
        checkpoint.put = checkpoint.commit = lambda *_: None
        return CALLS[self.name](checkpoint=checkpoint)

    def outcome(self):
        return outcome(self.call)


@pytest.fixture
def damaged(written, name, tmp_path):
    return Damaged(written, name, tmp_path)


def outcome(call):
    """The error that this package raises on purpose, or none."""
    try:
        call()
    except NtkpipeError as error:
        return error
    return None


def is_refusal(error, where="/c/run", what="delete it"):
    return isinstance(error, StoreError) and where in str(error) and what in str(error)


@EVERY
def test_it_is_read_as_it_was_written(damaged):
    assert damaged.outcome() is None


@EVERY
def test_a_value_of_another_type_is_damage(damaged):
    missed = []
    for path in paths(damaged.state):
        is_not_read = path[0] == "space" and "result" in damaged.state and path != ("space", "passes")
        if path[0] in DECIDES or path in FREE or is_not_read:
            continue
        for what, value in WRONG.items():
            if value is DELETED and path in OPTIONAL:
                continue
            damaged.write({"state": changed(damaged.state, path, value)})
            error = damaged.outcome()
            # What is missing of stages is computed, and of their results there are defaults and any text; a part may be
            # of another calculation.
            is_harmless = path[0] in STAGES and (error is None or isinstance(error, ConfigError))
            if not (is_refusal(error) or is_harmless):
                missed.append((path, what, error))
    assert not missed, missed[:20]


@EVERY
def test_numbers_that_cannot_be_are_no_other_error(damaged):
    """They may do no harm, as seconds that others have spent."""
    for path in paths(damaged.state):
        for value in NUMBERS.values():
            damaged.write({"state": changed(damaged.state, path, value)})
            error = damaged.outcome()
            assert error is None or is_refusal(error) or isinstance(error, ConfigError), (path, value, error)


@EVERY
def test_another_calculation_is_another_and_not_damaged(damaged):
    for path in paths(damaged.state):
        if path[0] in DECIDES:
            for value in WRONG.values():
                damaged.write({"state": changed(damaged.state, path, value)})
                assert isinstance(damaged.outcome(), ConfigError), path


@EVERY
@pytest.mark.parametrize("attributes", [{}, {"state": None}, {"state": []}, {"state": 3}, {"state": "x"}], ids=str)
def test_no_state_is_damage(damaged, attributes):
    damaged.write(attributes)
    assert is_refusal(damaged.outcome())


@EVERY
def test_arrays_that_are_missing_or_others_are_damage(damaged, tmp_path):
    arrays = [path.name for path in damaged.folder.iterdir() if path.is_dir()]
    assert arrays
    checkpoint, is_read = Checkpoint(damaged.root, "run"), 0
    for name in sorted(arrays)[:: -(-len(arrays) // 6)]:
        folder, aside = damaged.folder / name, tmp_path / "aside"
        values = checkpoint._folder.read_array(name)
        shutil.move(folder, aside)
        if damaged.outcome() is None:  # not needed by what is finished
            shutil.move(aside, folder)
            continue
        is_read += 1
        assert is_refusal(damaged.outcome())
        # What numpy would spread, or take as it is.
        for other in (values[:1] if len(values) > 1 else np.ones(2), values.T[None], values.astype(np.float32)):
            checkpoint._folder.write_array(name, np.ascontiguousarray(other))
            assert is_refusal(damaged.outcome()), (name, other.shape)
        shutil.rmtree(folder)
        shutil.copytree(aside, folder)
        chunk = next(path for path in (folder / "c").rglob("*") if path.is_file())
        chunk.write_bytes(chunk.read_bytes()[:-3] + b"xyz")
        assert is_refusal(damaged.outcome())
        shutil.rmtree(folder)
        shutil.move(aside, folder)
    assert is_read
    assert damaged.outcome() is None


@pytest.fixture(scope="module")
def factor(tmp_path_factory):
    root = tmp_path_factory.mktemp("factor")
    cholesky(MATRIX, path=root / "f", panel_width=20)
    return root / "f"


def test_the_state_of_a_factor_of_another_type_is_damage(factor, tmp_path):
    shutil.copytree(factor, tmp_path / "f")
    where = tmp_path / "f/cholesky/zarr.json"
    document = json.loads(where.read_text())
    state = document["attributes"]
    for path in paths(state):
        for value in (*WRONG.values(), *NUMBERS.values()):
            # Of JSON's truth Python makes a one.
            is_number = (type(value) in {int, float} and math.isfinite(value)) or (path, value) == (("format",), True)
            where.write_text(json.dumps({**document, "attributes": changed(state, path, value)}))
            error = outcome(lambda: cholesky(MATRIX, path=tmp_path / "f"))
            # Numbers of pivots are believed.
            is_harmless = is_number or (path[0] == "panels" and (value is DELETED or value == []))
            assert is_harmless if error is None else is_refusal(error, "/f", "elete that folder"), (path, value, error)
            where.write_text(json.dumps(document))
