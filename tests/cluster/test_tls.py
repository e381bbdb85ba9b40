"""The recipe in cluster/tls: its certificates open a cluster to those who have them, and to nobody else."""

import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml
from daemons import DASK, address_in, running
from small import chunks, compute

from ntkpipe.base.errors import ClusterError
from ntkpipe.executors import connect as cluster

SCRIPT = Path(__file__).parents[2] / "cluster" / "tls" / "make_certificates.sh"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make certificates")


def make_certificates(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, folder], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls") / "ours"
    assert make_certificates(folder).returncode == 0
    return folder


def configured(folder: Path) -> Any:
    """The Dask configuration of a folder, as DASK_CONFIG would set it."""
    return dask.config.set(dask.config.merge(dask.config.config, yaml.safe_load((folder / "tls.yaml").read_text())))


@pytest.fixture(scope="module")
def address(certificates: Path) -> Iterator[str]:
    """A scheduler and a worker, started as the recipe says."""
    environment = {**os.environ, "DASK_CONFIG": str(certificates)}
    file, log = certificates.parent / "scheduler.json", certificates.parent / "log"
    loopback = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
    scheduler = [*DASK, "scheduler", *loopback, "--port", "0", "--scheduler-file", file]
    with running(scheduler, log, environment) as process:
        found = address_in(file, process, log)
        worker = [*DASK, "worker", found, *loopback, "--nthreads", "1", "--memory-limit", "2GiB"]
        with running(worker, log, environment):
            yield found


def test_those_with_certificates_compute(certificates: Path, address: str, tmp_path: Path) -> None:
    assert address.startswith("tls://127.0.0.1:")
    with configured(certificates), cluster.connect(address) as client:
        there = compute(tmp_path / "there.zarr", client=client)
    assert chunks(there.path) == chunks(compute(tmp_path / "here.zarr").path)


def test_a_client_without_certificate_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="takes clients with a certificate, and Dask's settings name none"):
        cluster.connect(address).__enter__()


def test_a_client_of_another_authority_is_refused(address: str, tmp_path: Path) -> None:
    make_certificates(tmp_path / "theirs")
    with configured(tmp_path / "theirs"), pytest.raises(ClusterError, match="certificate"):
        cluster.connect(address).__enter__()


@pytest.mark.parametrize("own", [False, True])
def test_the_scheduler_itself_refuses(own: bool, address: str, certificates: Path, tmp_path: Path) -> None:
    """Whoever does not check the scheduler and speaks TLS without a certificate, or with one of another authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if own:
        make_certificates(tmp_path / "theirs")
        context.load_cert_chain(tmp_path / "theirs/client.pem", tmp_path / "theirs/client-key.pem")
    assert "alert" in greeting(address, context)
    context.load_cert_chain(certificates / "client.pem", certificates / "client-key.pem")
    assert greeting(address, context) == "answer"


def greeting(address: str, context: ssl.SSLContext) -> str:
    host, port = address.removeprefix("tls://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as plain, context.wrap_socket(plain) as encrypted:
        try:
            return "answer" if encrypted.recv(1) else "nothing"
        except ssl.SSLError as error:
            return str(error)


def test_nobody_is_heard_without_tls(address: str) -> None:
    host, port = address.removeprefix("tls://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        plain.sendall(b"\0" * 64)
        with pytest.raises(ConnectionResetError):
            plain.recv(1)


def test_a_clients_certificate_cannot_serve(certificates: Path) -> None:
    """Or a user could pose as the scheduler."""
    checked = {
        role: subprocess.run(
            ["openssl", "verify", "-purpose", "sslserver", "-CAfile", certificates / "ca.pem", f"{role}.pem"],
            cwd=certificates,
            capture_output=True,
            check=False,
        ).returncode
        == 0
        for role in ("scheduler", "worker", "client")
    }
    assert checked == {"scheduler": True, "worker": True, "client": False}


def test_keys_are_private_and_never_replaced(certificates: Path) -> None:
    assert {file.stat().st_mode & 0o077 for file in certificates.glob("*-key.pem")} == {0}
    again = make_certificates(certificates)
    assert again.returncode == 2
    assert "ca.pem exists" in again.stderr
