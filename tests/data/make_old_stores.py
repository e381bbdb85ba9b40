"""Make the stores below ``old``, which tests/test_old_stores.py reads, with the version whose stores they are::

    git worktree add ../old 31e0a4b
    python3.11 -m venv ../old/.venv
    ../old/.venv/bin/pip install -c ../old/constraints.txt -e '../old[cluster,compute,report]'
    PYTHONPATH=tests/helpers ../old/.venv/bin/python tests/data/make_old_stores.py

Everything but what clocks measure, and the bits of results and checkpoints on another type of processor, is the same
each time. An archive each:

results.tar.xz
    Complete stores, with a result of every kind.
interrupted_run.tar.xz
    A run, and growths before and after the manifest was replaced, each ended by SIGKILL.
interrupted_solve.tar.xz
    A store with checkpoints of its solvers, checkpoints elsewhere, and half of a Cholesky factor in files.
expected.json
    What is in them, and what comes of those that go on.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import tarfile
import tempfile
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import old_model
import yaml

import ntkpipe
from ntkpipe import build, derive, kept, mending, records, runs, solving, submission, verification, workflow
from ntkpipe.store.store import Store

HERE = Path(__file__).resolve().parent
RUN = {"device": "cpu", "workers": 1, "progress": False}
MEAN = {"ridge_scale": "mean_diagonal"}

# Every step of a workflow but report, which the store ``grown`` gets.
STEPS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "pntk": [
        ("verify", {}),
        ("summary", {}),
        ("eigsh", {"k": 5, "seed": 1}),
        ("eigsh", {"k": 2, "array": "groups/first/train"}),
        ("solve", {"ridge": 1e-2, "method": "block_cg", "rank": 8, **MEAN}),
        ("solve", {"ridge": 1e-2, "method": "cholesky", "array": "groups/first/train", **MEAN}),
        ("logdet", {"ridge": 1.0}),
        ("logdet", {"ridge": 1.0, "method": "slq", "array": "groups/first/train"}),
        ("density", {"num_probes": 4}),
        ("spectrum", {}),
        ("alignment", {}),
        ("generalisation", {"ridges": [1e-2, 1.0], **MEAN}),
        ("regression", {}),
        ("gaussian_process", {"ridge": 1e-2}),
        ("influence", {"ridge": 1e-2, "top": 4}),
        ("compare", {"other": "ntk", "k": 3, "ridge": 1.0}),
        ("learning_curve", {"sizes": [10, 20], "ridges": [1.0]}),
    ],
    "ntk": [
        ("verify", {}),
        ("eigsh", {"k": 3}),
        ("solve", {"ridge": 1.0, "method": "pcg", "rank": 16}),
        ("density", {"num_probes": 4, "num_steps": 6}),
        ("spectrum", {"method": "streamed", "k": 6}),
        ("regression", {"ridges": [1e-2, 1.0], "method": "streamed", **MEAN}),
        ("generalisation", {"ridges": [1.0], "method": "streamed"}),
    ],
}
KERNELS = {
    "ntk": {"kind": "ntk", "compute_dtype": "float64", "tile": 16, "groups": {"last": "2.*"}},
    "pntk": {"kind": "pntk", "tile": 16, "groups": {"first": "0.*", "last": ["2.weight", "2.bias"]}},
}


def stop_clocks() -> None:
    """Times, hosts and processes that are recorded are always the same; seconds are measured."""
    seconds = count()

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2025, 1, 1, tzinfo=UTC) + timedelta(seconds=next(seconds))

    for module in (derive, mending, records, runs, submission, verification):
        module.datetime = Clock
    for module in (build, mending, records, submission):
        module.os = SimpleNamespace(**{**vars(os), "getpid": lambda: 1})
    socket.gethostname = lambda: "old"
    uuid.uuid4 = lambda: uuid.UUID(int=next(seconds))


def results() -> dict[str, Any]:
    """Complete stores of every kind, their results and what they are read for."""
    for name, kernel in KERNELS.items():
        described = {
            "store": name,
            "model": {"factory": "old_model:model"},
            "data": {"factory": "old_model:data", "arguments": {"num_train": 32, "num_test": 12}},
            "kernel": kernel,
            "run": {"device": "cpu", "workers": 1},
            "steps": [{"step": step, "options": options} for step, options in STEPS[name]],
        }
        file = Path(f"{name}.yaml")
        file.write_text(yaml.safe_dump(described))
        for step in workflow.run(workflow.load(file), progress=False):
            print(name, step.step, dict(step.rows).get("status", ""))
        file.unlink()
    Path("pntk/kernel/train/c/0/1").unlink()
    ntkpipe.repair("pntk", old_model.model(), device="cpu", workers=1, progress=False)
    submission._write_state("pntk", "ntkpipe-driver-1", "finished", "")
    ntkpipe.derive_kernel("ntk", kind="diagonal", to="diagonal", samples=True)
    solving.SOLVERS["eigsh"](ntkpipe.open_kernel("diagonal"), array="kernel/output_1/train", k=2, progress=False)
    for sizes in ((7, 3), (10, 3), (14, 6)):
        compute("grown", kind="output:3", tile=4, grow=True, **old_model.data(*sizes))
    ntkpipe.verify("grown", old_model.model(), device="cpu", progress=False)
    ntkpipe.write_report("grown", "grown.html", progress=False)
    Path("grown.html").unlink()
    return {name: contents(name) for name in ("ntk", "pntk", "diagonal", "grown")}


def compute(path: str, **options: Any) -> ntkpipe.KernelStore:
    return ntkpipe.compute_kernel(old_model.model(), store=path, **options, **RUN)


def contents(path: str) -> dict[str, Any]:
    """What a complete store is read for, and its results."""
    store = ntkpipe.open_kernel(path)
    folder = Path(path, "results")
    names = sorted(str(file.parent.relative_to(folder)) for file in folder.rglob("zarr.json"))
    results = {name: found for name in names if (found := read_result(store, name)) is not None}
    assert store.progress.is_complete
    return {
        "arrays": old_model.described(old_model.readable(store)),
        "results": {name: old_model.described(found) for name, found in results.items()},
    }


def read_result(store: ntkpipe.KernelStore, name: str) -> dict[str, Any] | None:
    """A result; none where there is a group, or an array, of results."""
    with contextlib.suppress(ntkpipe.NtkpipeError):
        return ntkpipe.read_result(store, name)
    return None


RUN_OF = {
    "run": ({"kind": "ntk", "tile": 4, "groups": {"last": "2.*"}}, (14, 6)),
    "growth": ({"kind": "trace", "tile": 4}, (14, 6)),
    "growth_begun": ({"kind": "trace", "tile": 4}, (14, 6)),
}


def interrupted_run() -> dict[str, Any]:
    """Runs that were killed, and what they would have ended with."""
    expected = {}
    for name, (kernel, sizes) in RUN_OF.items():
        if name != "run":
            before = compute(name, **kernel, **old_model.data(10, 5))
            expected["before"] = old_model.described(old_model.readable(before))
        process = multiprocessing.get_context("spawn").Process(target=killed, args=(name,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        progress = ntkpipe.open_kernel(name).progress
        whole = compute(f"whole/{name}", **kernel, **old_model.data(*sizes))
        expected[name] = {
            "kernel": kernel,
            "sizes": sizes,
            "tiles_done": progress.tiles_done,
            "arrays": old_model.described(old_model.readable(whole)),
        }
    shutil.rmtree("whole")
    return expected


def killed(name: str) -> None:
    """A run that is killed: with a tile that has no name yet, or with the manifest of a growth not replaced."""
    stop_clocks()
    left = iter(range(7))
    replace = Path.replace

    def unless_it_is_the_last(path: Path, target: Path) -> Path:
        is_tile = target.parts[1] in {"kernel", "groups"} and "c" in target.parts
        if is_tile and next(left, None) is None:
            kill()
        return replace(path, target)

    Path.replace = unless_it_is_the_last
    if name == "growth_begun":
        Store.replace_manifest = kill
    kernel, sizes = RUN_OF[name]
    compute(name, grow=True, **kernel, **old_model.data(*sizes))


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Of the commands, which keep checkpoints in the store: options, and after how many passes each is interrupted.
COMMANDS: dict[str, tuple[dict[str, Any], int]] = {
    "eigsh": ({"k": 6, "block": 3, "tol": 1e-10, "seed": 3, "max_passes": None}, 8),
    "solve": ({"ridge": 10.0, "method": "block_cg", "tol": 1e-10, "rank": 8, "seed": 3, "max_passes": None}, 30),
    "density": ({"num_probes": 4, "num_steps": 9, "seed": 3}, 5),
}
# Of functions, whose checkpoints are in the folder ``checkpoints``.
FUNCTIONS: dict[str, tuple[dict[str, Any], int]] = {
    # A preconditioner would be made again, and taken for another one where it rounds in another way.
    "slq_logdet": ({"ridge": 1.0, "preconditioner": None, "num_probes": 4, "num_steps": 12, "seed": 3}, 6),
    "dynamics": ({"times": [1.0, 10.0, 100.0], "tol": 1e-8, "seed": 3}, 6),
}
FACTOR = {"ridge": 1.0, "panel_width": 16}


def interrupted_solve() -> dict[str, Any]:
    """Solvers that were interrupted, and what they would have found."""
    store = compute("store", kind="pntk", tile=32, **old_model.data(96))
    arguments = {"dynamics": (np.eye(old_model.NUM_OUTPUTS)[store.targets],)}
    expected: dict[str, Any] = {"store": contents("store")}
    for name, (options, passes) in COMMANDS.items():
        whole = solving.SOLVERS[name](store, progress=False, **options)
        shutil.rmtree(f"store/results/{name}")
        show = kept.Passes.show
        kept.Passes.show = interrupt_after(passes)
        with contextlib.suppress(KeyboardInterrupt):
            solving.SOLVERS[name](store, progress=False, **options)
        kept.Passes.show = show
        expected[name] = {"options": options, "passes": passes, **values_of(name, whole)}
    for name, (options, passes) in FUNCTIONS.items():
        function = getattr(ntkpipe, name)
        checkpoint = ntkpipe.Checkpoint("checkpoints", name)
        given = (store.train, *arguments.get(name, ()))
        whole = function(*given, **options)
        with contextlib.suppress(KeyboardInterrupt):
            function(*given, **options, checkpoint=checkpoint, monitor=interrupt_after(passes))
        expected[name] = {"options": options, "passes": passes, **values_of(name, whole)}
    whole = ntkpipe.cholesky(store.train, **FACTOR)
    with contextlib.suppress(KeyboardInterrupt):
        ntkpipe.cholesky(store.train, path="factor", monitor=interrupt_after(3), **FACTOR)
    expected["cholesky"] = {"options": FACTOR, "panels": 3, **values_of("cholesky", whole)}
    return expected


def interrupt_after(passes: int) -> Callable[..., None]:
    """What is called after each pass."""
    left = iter(range(passes - 1))

    def show(*_: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return show


# Of what is found: the numbers that are compared.
VALUES = {
    "eigsh": ("eigenvalues",),
    "solve": ("coefficients",),
    "density": ("nodes", "weights"),
    "slq_logdet": ("samples",),
    "dynamics": ("losses",),
    "cholesky": ("logdet",),
}


def values_of(solver: str, found: Any) -> dict[str, Any]:
    """What an interrupted solver is to find, and with how many passes."""
    assert found.is_converged or found.options.get("num_steps"), found
    values = {name: np.asarray(getattr(found, name)).tolist() for name in VALUES[solver]}
    return {"whole_passes": found.work.passes, "values": values}


def pack(folder: str) -> None:
    """An archive of a folder, the same for the same files."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    with tarfile.open(HERE / "old" / f"{folder}.tar.xz", "w:xz", preset=9) as archive:
        for path in sorted(Path(folder).rglob("*")):
            if not path.is_dir():
                archive.add(path, path.relative_to(folder), filter=plain)


def main() -> None:
    stop_clocks()
    (HERE / "old").mkdir(exist_ok=True)
    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        for make in (results, interrupted_run, interrupted_solve):
            name = make.__name__
            Path(folder, name).mkdir()
            os.chdir(Path(folder, name))
            expected[name] = make()
            os.chdir(folder)
            pack(name)
    (HERE / "old" / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
