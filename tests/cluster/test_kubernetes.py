"""The manifests of cluster/kubernetes against the schemas that come with the Dask operator."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

MANIFESTS = Path(__file__).parents[2] / "cluster" / "kubernetes"
# `make` unpacks the wheel here. Installed, it would bring a Kubernetes client, which the `dask` command would import.
WHEEL = Path(sys.prefix) / "share" / "dask-kubernetes"
SCHEMAS = "dask_kubernetes/operator/deployment/helm/dask-kubernetes-operator/crds/*.yaml"


def documents() -> list[tuple[str, dict[str, Any]]]:
    """Every document of every manifest, with its file's name."""
    files = sorted(MANIFESTS.glob("*.yaml"))
    return [(file.name, each) for file in files for each in yaml.safe_load_all(file.read_text())]


def validators() -> dict[str, Draft202012Validator]:
    """A validator for each kind of the operator. The API server drops unknown fields silently; here they are errors."""
    found = {}
    for file in WHEEL.glob(SCHEMAS):
        definition = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)["spec"]  # a megabyte: the fast one
        (version,) = definition["versions"]
        assert version["name"] == "v1"
        schema = closed(version["schema"]["openAPIV3Schema"])
        # What belongs to every object is not in these schemas.
        schema["properties"] |= {
            "apiVersion": {"const": "kubernetes.dask.org/v1"},
            "kind": {"const": definition["names"]["kind"]},
            "metadata": {"type": "object", "required": ["name"]},
        }
        found[definition["names"]["kind"]] = Draft202012Validator(schema)
    return found


def closed(schema: Any) -> Any:
    """The same schema, where an object has no other than its listed properties."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: closed(value) for name, value in schema.items()}
    opened = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & schema.keys()
    if isinstance(schema.get("properties"), dict) and not opened:
        result["additionalProperties"] = False
    return result


@pytest.fixture(scope="module")
def operator() -> dict[str, Draft202012Validator]:
    if not WHEEL.exists():
        pytest.skip(f"no wheel of dask-kubernetes in {WHEEL}; `make` unpacks it there")
    return validators()


CUSTOM = [(name, each) for name, each in documents() if each["apiVersion"] == "kubernetes.dask.org/v1"]


def test_there_is_one_manifest_of_each_kind() -> None:
    assert {each["kind"] for _, each in documents()} == {
        "DaskAutoscaler",
        "DaskCluster",
        "DaskJob",
        "NetworkPolicy",
        "PersistentVolumeClaim",
    }


@pytest.mark.parametrize("document", [each for _, each in CUSTOM], ids=[name for name, _ in CUSTOM])
def test_manifests_fit_the_operator(document: dict[str, Any], operator: dict[str, Draft202012Validator]) -> None:
    assert [error.message for error in operator[document["kind"]].iter_errors(document)] == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pod: pod["containers"][0].pop("name"), "'name' is a required property"),
        (lambda pod: pod["containers"][0].update(arguments=[]), "'arguments' was unexpected"),
        (lambda pod: pod.update(terminationGracePeriodSeconds="60"), "'60' is not of type 'integer'"),
    ],
)
def test_mistakes_are_found(damage: Any, message: str, operator: dict[str, Draft202012Validator]) -> None:
    document = copy.deepcopy(dict(CUSTOM)["cluster.yaml"])
    damage(document["spec"]["worker"]["spec"])
    assert message in " ".join(error.message for error in operator["DaskCluster"].iter_errors(document))


def pods(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    spec = document["spec"]
    if "job" in spec:
        yield "job", spec["job"]["spec"]
        spec = spec["cluster"]["spec"]
    yield "scheduler", spec["scheduler"]["spec"]
    yield "worker", spec["worker"]["spec"]


@pytest.mark.parametrize("name", ["cluster.yaml", "job.yaml"])
def test_pods_fit_each_other(name: str) -> None:
    """One image, one store, the same credentials; workers have one thread and may use the memory of their pods."""
    document = dict(CUSTOM)[name]
    containers = {role: pod["containers"][0] for role, pod in pods(document)}
    assert len({each["image"] for each in containers.values()}) == 1
    worker = containers["worker"]
    options = dict(zip(worker["args"][2:-1:2], worker["args"][3::2], strict=False))
    assert options["--nthreads"] == "1"
    assert options["--memory-limit"].removesuffix("B") == worker["resources"]["limits"]["memory"]
    assert options["--name"] == "$(DASK_WORKER_NAME)"
    if "job" in containers:
        assert worker["envFrom"] == containers["job"]["envFrom"]
    for _, pod in pods(document):
        mounted = {each["name"] for each in pod["containers"][0].get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}


@pytest.mark.parametrize("name", ["cluster.yaml", "job.yaml"])
def test_service_finds_the_scheduler(name: str) -> None:
    document = dict(CUSTOM)[name]
    spec = document["spec"]["cluster"]["spec"] if "cluster" in document["spec"] else document["spec"]
    service, container = spec["scheduler"]["service"], spec["scheduler"]["spec"]["containers"][0]
    # The operator labels pods with the name of the cluster, which is that of a job.
    assert service["selector"]["dask.org/cluster-name"] == document["metadata"]["name"]
    assert {port["targetPort"] for port in service["ports"]} == {port["name"] for port in container["ports"]}
    # By these names the operator asks the scheduler.
    assert {port["name"] for port in service["ports"]} == {"tcp-comm", "http-dashboard"}
