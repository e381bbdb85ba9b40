"""Stores in object storage, on a real S3 server: the same bits, resume, verification and certificate as on a disk."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import s3
import zarr
from obstore.store import S3Store
from small import Allowance, chunks, compute, inputs, mlp
from zarr.storage import ObjectStore

from ntkpipe import compute_kernel, open_kernel, plan_kernel, verify
from ntkpipe.app.cli import main
from ntkpipe.base.errors import (
    Interrupted,
    StoreError,
    StoreExistsError,
    StoreMismatchError,
    StoreNotFoundError,
    TileError,
)
from ntkpipe.build.life import StoreSink
from ntkpipe.store.media.objects import AccessError, ObjectMedium
from ntkpipe.store.store import Store


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """The same run on a disk."""
    path = tmp_path_factory.mktemp("local") / "k.zarr"
    compute(path)
    return path


@pytest.fixture
def whole(bucket) -> str:
    """URL of a complete store."""
    compute(bucket)
    return bucket


def remote_chunks(url: str) -> dict[str, bytes]:
    """As :func:`small.chunks`."""
    medium = ObjectMedium(url)
    return {name: medium.get(name, 2**30) for name, _ in medium.sizes("") if "/c/" in name}


RUN = """
import sys, time
sys.path.insert(0, {tests!r})
from ntkpipe.build.life import StoreSink
from small import compute
write = StoreSink.write
def slowly(*args):
    write(*args)
    time.sleep(0.1)
StoreSink.write = slowly
compute(sys.argv[1])
"""


def test_a_run_that_is_killed_resumes_to_the_bits_of_a_local_store(bucket, local):
    script = RUN.format(tests=str(Path(__file__).parents[2] / "helpers"))
    with subprocess.Popen([sys.executable, "-c", script, bucket]) as child:
        medium = ObjectMedium(bucket)
        while len([name for name, _ in medium.sizes("kernel/train/c")]) < 3 and child.poll() is None:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    found = open_kernel(bucket)
    assert 0 < found.progress.tiles_done < found.progress.tiles_total
    written = remote_chunks(bucket)
    assert written.items() <= chunks(local).items()
    store = compute(bucket)
    assert remote_chunks(bucket) == chunks(local)
    report = verify(bucket, mlp(), progress=False)
    assert report.is_good
    assert [each["is_good"] for each in report.certificates] == [True, True]
    assert store.store.read_result("certificate") is not None
    assert store.store.medium.leftovers() == []
    np.testing.assert_array_equal(open_kernel(bucket).train[:, :], open_kernel(local).train[:, :])


def test_only_missing_tiles_are_computed(bucket, monkeypatch, local):
    with monkeypatch.context() as patch:
        Allowance(patch, 7, KeyboardInterrupt())
        with pytest.raises(Interrupted, match=rf"7 of 25 tiles are in {bucket}"):
            compute(bucket)
    counted = []
    write = StoreSink.write
    monkeypatch.setattr(StoreSink, "write", lambda *args: (counted.append(args[1]), write(*args)))
    compute(bucket)
    assert sum(name in {"kernel/train", "kernel/test_train"} for name in counted) == 25 - 7
    assert remote_chunks(bucket) == chunks(local)


def test_plain_zarr_reads_the_same(whole, s3_port):
    prefix = whole.removeprefix(f"s3://{s3.BUCKET}/")
    group = zarr.open_group(ObjectStore(S3Store(s3.BUCKET, prefix=prefix), read_only=True), mode="r")
    kernel = open_kernel(whole).train
    plain = group["kernel/train"][...]
    upper = np.triu(np.ones(plain.shape, bool))
    np.testing.assert_array_equal(plain[upper], kernel[:, :][upper])
    np.testing.assert_array_equal(group["samples/train/input"][...], inputs())
    assert sorted(name for name, _ in group["kernel"].members()) == ["test_diagonal", "test_train", "train"]


def _cut(data: bytes) -> bytes:
    return data[:-1]


def _lengthen(data: bytes) -> bytes:
    return data + b"\0"


def _flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize(
    ("damage", "words"), [(_cut, "truncated"), (_lengthen, "needed"), (_flip, "fails its crc32c checksum")]
)
def test_damage_is_found_and_mended(whole, local, damage, words):
    store = Store.open(whole)
    name = "kernel/train/c/1/2"
    store.medium.put(name, damage(store.medium.get(name)))
    report = verify(whole, progress=False)
    assert [(finding.array, finding.index) for finding in report.findings] == [("kernel/train", (1, 2))]
    assert words in report.findings[0].problem
    with pytest.raises(TileError, match=rf"tile \(1, 2\) of kernel/train .* {whole}"):
        open_kernel(whole).train[4:8, 8:12]
    store.medium.delete(name)
    compute(whole)
    assert verify(whole, progress=False).is_good
    assert remote_chunks(whole) == chunks(local)


def test_a_store_in_a_bucket_is_never_replaced(whole):
    with pytest.raises(StoreExistsError, match="mode='w-' only creates"):
        compute(whole, mode="w-")
    with pytest.raises(StoreError, match="no locks, so mode='w' does not remove it"):
        compute(whole, model=mlp(seed=1), mode="w")
    with pytest.raises(StoreMismatchError):
        compute(whole, model=mlp(seed=1))
    assert verify(whole, progress=False).is_good
    with pytest.raises(StoreError, match="no locks"), Store.open(whole).medium.exclusive():
        pass


@pytest.mark.parametrize("attempt", range(3))
def test_of_creators_at_once_the_first_wins(bucket, make_manifest, attempt):
    manifests = [make_manifest(environment={"creator": str(creator)}) for creator in range(2)]
    stores = [Store.create(bucket, manifest) for manifest in manifests]
    assert [store.manifest for store in stores] == [manifests[0]] * 2
    assert Store.open(bucket).manifest == manifests[0]


def test_a_server_that_ignores_conditions_is_refused(bucket, make_manifest, monkeypatch):
    monkeypatch.setattr(ObjectMedium, "_create", lambda self, name, data: self.put(name, data) is None)
    with pytest.raises(StoreError, match="does not know conditional writes"):
        Store.create(bucket, make_manifest())


def test_what_is_sent_to_workers_holds_no_credentials(whole):
    store = open_kernel(whole).store
    for value in (store, store.arrays["kernel/train"], StoreSink(store.arrays)):
        data = pickle.dumps(value)
        for secret in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL"):
            assert os.environ[secret].encode() not in data
    again = pickle.loads(pickle.dumps(StoreSink(store.arrays)))
    assert again.exists("kernel/train", (0, 0))
    np.testing.assert_array_equal(again.arrays["kernel/train"].read((0, 0)), store.arrays["kernel/train"].read((0, 0)))


def test_a_plan_of_a_store_that_is_there_and_of_one_that_is_not(whole, bucket):
    options = {"targets": np.arange(18), "test_inputs": inputs(7, seed=1), "tile": 4}
    planned, _ = plan_kernel(mlp(), inputs(), store=whole, **options)
    assert planned.tiles_done == planned.workload.num_tiles
    planned, _ = plan_kernel(mlp(), inputs(), store=f"{bucket}-other", **options)
    assert planned.tiles_done == 0
    assert dict(planned.rows())["to write"].endswith("free space unknown")


def test_the_command_line_takes_urls(whole, capsys):
    with contextlib.suppress(SystemExit):
        main(["info", whole])
    with contextlib.suppress(SystemExit):
        main(["verify", whole])
    printed = capsys.readouterr()
    assert f"{whole}" in printed.out
    assert "good" in printed.out
    assert "error" not in printed.err


WORKFLOW = """
store: {url}
model: {{factory: "small:mlp"}}
data: {{factory: "bucket_factories:data"}}
kernel: {{kind: ntk, tile: 9}}
steps: [{{step: verify}}]
"""


def test_a_workflow_file_takes_urls(bucket, tmp_path, capsys):
    (tmp_path / "bucket_factories.py").write_text("import small\ndef data(): return {'inputs': small.inputs()}")
    path = tmp_path / "w.yaml"
    path.write_text(WORKFLOW.format(url=bucket))
    for arguments in (["run", str(path)], ["plan", str(path)], ["run", str(path), "--set", f"store={bucket}-other"]):
        main(arguments)
    assert "good" in capsys.readouterr().out
    assert remote_chunks(bucket) == remote_chunks(f"{bucket}-other") != {}
    assert list(tmp_path.glob("s3*")) == list(Path().glob("s3*")) == []


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:secret@bucket/a.zarr",
        "s3://secret@bucket/a.zarr",
        "s3://bucket:9000/a.zarr",
        "s3://bucket/a.zarr?X-Amz-Signature=secret",
        "s3://bucket/a.zarr#secret",
    ],
)
def test_urls_with_credentials_or_options_are_refused_and_not_repeated(url):
    with pytest.raises(StoreError, match="come from the environment only") as info:
        open_kernel(url)
    assert "secret" not in str(info.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket", "has no prefix"),
        ("s3://bucket/", "has no prefix"),
        ("s3:///a.zarr", "has no bucket"),
        ("s3://bucket/a/../b.zarr", "is not a name inside a store"),
        ("http://127.0.0.1:9000/bucket/a.zarr", "AWS_ENDPOINT_URL"),
        ("memory:///tmp/a.zarr", "a path of this machine"),
        ("://a", "needed one of"),
    ],
)
def test_other_urls_say_what_is_needed(url, words):
    with pytest.raises(StoreError, match=words):
        open_kernel(url)


def test_a_url_that_became_a_path_is_noticed():
    with pytest.raises(StoreError, match="lost a slash; give it as text"):
        open_kernel(Path("s3://bucket/a.zarr"))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, AccessError, "access is denied; check the credentials"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, AccessError, "access is denied; check the credentials"),
        ({"AWS_ALLOW_HTTP": ""}, StoreError, "set AWS_ALLOW_HTTP=true"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, StoreError, "does not answer; check the network"),
    ],
)
def test_what_is_wrong_with_the_environment_is_said(bucket, monkeypatch, changes, error, words):
    monkeypatch.setattr("ntkpipe.store.media.objects._RETRIES", {"max_retries": 1})
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    for action in (open_kernel, compute):
        with pytest.raises(error, match=words) as info:
            action(bucket)
        assert "owner-secret" not in str(info.value)
        assert "\n" not in str(info.value)


def test_no_credentials_at_all(bucket, monkeypatch):
    monkeypatch.setattr("ntkpipe.store.media.objects._RETRIES", {"max_retries": 0})
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    # What hands out credentials on Amazon's machines is not there.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(AccessError, match="no credentials; set them in the environment"):
        open_kernel(bucket)


def test_no_bucket_and_no_store_are_told_apart(bucket):
    with pytest.raises(StoreNotFoundError, match="does not exist"):
        open_kernel(bucket)
    with pytest.raises(StoreError, match="there is no bucket 'elsewhere'") as info:
        open_kernel("s3://elsewhere/a.zarr")
    assert not isinstance(info.value, StoreNotFoundError)
    with pytest.raises(StoreError, match="there is no bucket 'elsewhere'"):
        compute_kernel(mlp(), inputs(), store="s3://elsewhere/a.zarr", progress=False)


def test_who_may_only_read_reads_and_verifies_and_writes_nothing(whole, monkeypatch, s3_port):
    before = dict(ObjectMedium(whole).sizes(""))
    for name, value in s3.environment(s3_port, "reader").items():
        monkeypatch.setenv(name, value)
    assert open_kernel(whole).train.shape == (18, 18)
    assert verify(whole, progress=False).is_good
    with pytest.raises(AccessError, match="access is denied"):
        ObjectMedium(whole).put("x", b"1")
    assert dict(ObjectMedium(whole).sizes("")) == before
