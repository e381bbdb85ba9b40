"""Workflow files: what is read, and what is said about what is wrong."""

import pickle
import textwrap

import pytest
from pydantic import ValidationError

from ntkpipe.base.config import Budget, ClusterSpec, KernelSpec, RunSpec, Workflow, check_number, load_workflow, parse
from ntkpipe.base.errors import ConfigError

MINIMAL = """
store: runs/a.zarr
model:
  factory: models:make
  arguments: {width: 8}
data:
  factory: data:make
"""


@pytest.fixture
def load(tmp_path):
    """Return a function that loads a workflow file of the given text."""

    def load_text(text, *overrides):
        path = tmp_path / "study.yaml"
        path.write_text(textwrap.dedent(text))
        return load_workflow(path, overrides)

    return load_text


def test_a_minimal_file_has_the_documented_defaults(load):
    workflow = load(MINIMAL)
    assert workflow.kernel == KernelSpec(kind="pntk", compute_dtype="float32", tile=None)
    assert workflow.run == RunSpec(memory_limit=None, workers=None, self_check=True)
    assert workflow.model.arguments == {"width": 8}
    assert workflow.steps == ()


def test_a_cluster_is_described_in_the_file_or_by_overrides(load):
    text = (
        MINIMAL
        + "cluster: {workers: 64, memory_limit: 8GiB, write_bytes_per_second: 500MB, price: 0.05, currency: EUR}"
    )
    described = ClusterSpec(
        workers=64, memory_limit=8 * 2**30, write_bytes_per_second=500 * 10**6, price=0.05, currency="EUR"
    )
    assert load(text).cluster == described
    assert load(MINIMAL).cluster is None
    assert load(MINIMAL, "cluster.workers=64", "cluster.flops_per_second=5e10").cluster == ClusterSpec(
        workers=64, flops_per_second=5e10
    )


def test_specs_are_frozen_and_pickle(load):
    workflow = load(MINIMAL)
    assert pickle.loads(pickle.dumps(workflow)) == workflow
    with pytest.raises(ValidationError, match="frozen"):
        workflow.kernel.kind = "ntk"


@pytest.mark.parametrize(
    ("extra", "line", "key", "nearest"),
    [
        ("kernal: {kind: ntk}", 8, "kernal", "kernel"),
        ("kernel:\n  kind: ntk\n  tyle: 3", 10, "kernel.tyle", "tile"),
        ("run: {worker: 3}", 8, "run.worker", "workers"),
        ("cluster: {worker: 3}", 8, "cluster.worker", "workers"),
        ("steps:\n  - step: a\n  - step: b\n    optoins: {}", 11, "steps.1.optoins", "options"),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest_known_one(load, extra, line, key, nearest):
    message = rf"study.yaml, line {line}: unknown key '{key}'; the nearest known key is '{nearest}'"
    with pytest.raises(ConfigError, match=message):
        load(MINIMAL + extra)


def test_everything_that_is_wrong_is_listed_at_once(load):
    with pytest.raises(ConfigError) as caught:
        load(MINIMAL + "kernel: {tile: 0, kidn: ntk}\nrun: {workers: none}")
    message = str(caught.value)
    assert "kernel.tile=0" in message
    assert "'kernel.kidn'" in message
    assert "run.workers='none'" in message


@pytest.mark.parametrize("missing", ["store", "model", "data"])
def test_a_missing_key_is_named(load, missing):
    values = {"store": "store: a", "model": "model: {factory: 'a:b'}", "data": "data: {factory: 'a:b'}"}
    del values[missing]
    with pytest.raises(ConfigError, match=f"'{missing}' is missing"):
        load("\n".join(values.values()))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("kernel: {tile: 1.5}", r"line 8: kernel\.tile=1\.5"),
        ("kernel: {tile: -1}", r"line 8: kernel\.tile=-1.*greater than or equal to 1"),
        ("kernel: {tile: true}", r"kernel\.tile=True"),
        (
            "kernel: {compute_dtype: float16}",
            r"kernel\.compute_dtype='float16'.*'float32', 'float64', 'bfloat16' or 'tf32'",
        ),
        ("kernel: {store_dtype: bfloat16}", r"kernel\.store_dtype='bfloat16'"),
        ("kernel: {parameters: [3]}", r"kernel\.parameters\.0=3"),
        ("run: {memory_limit: lots}", r"run\.memory_limit='lots'"),
        ("run: {memory_limit: -5}", r"run\.memory_limit=-5"),
        ("run: {self_check: perhaps}", r"run\.self_check='perhaps'"),
        ("cluster: {workers: 3, flops_per_second: 0}", r"cluster\.flops_per_second=0"),
        ("cluster: {workers: 3, price: .inf}", r"cluster\.price=inf"),
        ("cluster: {price: 3}", "'cluster.workers' is missing"),
        ("steps: 3", r"line 8: steps=3"),
        ("kernel: null", r"line 8: kernel=None"),
        ("1: 2", "keys should be strings"),
    ],
)
def test_a_bad_value_is_named_with_what_was_found(load, extra, message):
    with pytest.raises(ConfigError, match=message):
        load(MINIMAL + extra)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.factory=no colon", r"model\.factory='no colon'"),
        ("model.forward=a b", r"model\.forward='a b'"),
        ("kernel.tlie=3", r"unknown key 'kernel\.tlie'.*nearest known key is 'tile'"),
        ("kernel.tile", "not of the form a.b=value"),
        ("=3", "not of the form a.b=value"),
        ("kernel..tile=3", "not of the form a.b=value"),
        ("kernel.tile=[1", "not valid YAML"),
        ("store.path=a", "store holds 'runs/a.zarr', which has no keys"),
    ],
)
def test_a_wrong_override_is_named(load, override, message):
    with pytest.raises(ConfigError, match=message):
        load(MINIMAL, override)


def test_overrides_replace_and_add_and_the_last_wins(load):
    workflow = load(
        MINIMAL, "kernel.tile=3", "kernel.tile=5", "model.arguments.depth=2", "run.memory_limit=1MiB", "store=b.zarr"
    )
    assert workflow.kernel.tile == 5
    assert workflow.model.arguments == {"width": 8, "depth": 2}
    assert workflow.run.memory_limit == 2**20
    assert str(workflow.store) == "b.zarr"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("-1e-6", -1e-6),
        ("2.5E3", 2500.0),
        ("1e6", 1e6),
        (".5e1", 5.0),
        ("e6", "e6"),
        ("12", 12),
        ("1e", "1e"),
    ],
)
def test_numbers_are_read_as_people_write_them(load, text, value):
    found = load(MINIMAL, f"model.arguments.ridge={text}").model.arguments["ridge"]
    assert (type(found), found) == (type(value), value)
    found = load(MINIMAL + f"steps: [{{step: a, options: {{ridge: {text}}}}}]").steps[0].options["ridge"]
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("text", ["8GiB", 8 * 2**30, "8.0 GiB"])
def test_memory_is_a_number_or_text(text):
    assert parse(RunSpec, {"memory_limit": text}, source="here").memory_limit == 8 * 2**30


def test_one_pattern_is_a_list_of_one():
    assert parse(KernelSpec, {"parameters": "head.*"}, source="here").parameters == ("head.*",)
    assert parse(KernelSpec, {"parameters": ["a", "b"]}, source="here").parameters == ("a", "b")


@pytest.mark.parametrize(
    ("fields", "accumulate", "store"),
    [
        ({}, "float32", "float32"),
        ({"compute_dtype": "bfloat16"}, "float32", "float32"),
        ({"compute_dtype": "float64"}, "float64", "float64"),
        ({"accumulate_dtype": "float64"}, "float64", "float64"),
        ({"compute_dtype": "float64", "store_dtype": "float32"}, "float64", "float32"),
    ],
)
def test_dtypes_follow_the_one_before(fields, accumulate, store):
    spec = KernelSpec(**fields)
    assert (spec.resolved_accumulate_dtype(), spec.resolved_store_dtype()) == (accumulate, store)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds NoneType; needed a mapping"),
        (b"- 1", "holds list; needed a mapping"),
        (b"store: a\nstore: b", r"the key 'store' is repeated(.|\n)*line 2"),
        (b"model:\n  arguments: {width: 1, width: 2}", r"the key 'width' is repeated(.|\n)*line 2"),
        (b"[a]: 3", "a key is not plain text"),
        (b"a: [1", "not valid YAML"),
        (b"a: 1\n---\nb: 2", "not valid YAML"),
        (b"a: \xe9", "not UTF-8"),
        (b"a: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_what_is_no_workflow_file_is_refused(tmp_path, content, message):
    path = tmp_path / "study.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_workflow(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the workflow file .*none\.yaml: No such file"):
        load_workflow(tmp_path / "none.yaml")


def test_errors_without_a_file_name_their_source():
    with pytest.raises(ConfigError, match=r"^the call: 'model' is missing$"):
        parse(Workflow, {"store": "a", "data": {"factory": "a:b"}}, source="the call")


def test_numbers_are_checked_against_their_range():
    assert check_number("ridge", 0.0, low=0) == 0.0
    for bad in (-1.0, 3.0, float("nan")):
        with pytest.raises(ConfigError, match="ridge="):
            check_number("ridge", bad, low=0, high=2)


BYTES = {
    "2GiB": 2**31, "2 GB": 2 * 10**9, " 8 gib ": 2**33, "1.5e9": 1.5e9, "2Gi": 2**31, "2g": 2e9, ".5MiB": 2**19, "7": 7,
    "7 b": 7, "1_000": 1000, "3TB": 3e12,
}  # fmt: skip
NO_BYTES = ["", "50%", "1,5GiB", "2 Gigs", "GiB", "-2GiB", "0", "nan", "inf", "1e400", "9EiB", "0x10", "2GiB free"]


@pytest.mark.parametrize("text", BYTES)
def test_text_of_bytes(text):
    assert Budget.of(text).limit == BYTES[text] == ClusterSpec(workers=1, memory_limit=text).memory_limit


@pytest.mark.parametrize("text", NO_BYTES)
def test_text_that_is_no_number_of_bytes(text):
    """Nothing of it is read where the rest has no meaning."""
    for call in (Budget.of, lambda given: ClusterSpec(workers=1, memory_limit=given)):
        with pytest.raises(ConfigError, match=r"memory_limit=.*needed a number of bytes, or text such as 8GiB"):
            call(text)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "'workers' is missing"),
        ({"workers": 0}, "workers=0: .*greater than or equal to 1"),
        ({"workers": 1, "price": "much"}, "price='much'"),
        ({"workers": 1, "memory": 5}, "unknown key 'memory'; the nearest known key is 'memory_limit'"),
    ],
)
def test_a_spec_is_refused_with_words_where_a_caller_makes_it(given, words):
    with pytest.raises(ConfigError, match=r"ClusterSpec\(\): .*" + words):
        ClusterSpec(**given)
