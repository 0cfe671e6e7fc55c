import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tlrunner.data import store
from tlrunner.data.store import fetch
from tlrunner.errors import StorageError

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_a_local_file_is_used_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(CONTENT)
    assert fetch(str(path), tmp_path / "cache", SHA256) == path
    assert fetch(f"file://{path}", tmp_path / "cache") == path
    with pytest.raises(StorageError, match=r"has SHA-256 .*; valid: 0000"):
        fetch(str(path), tmp_path / "cache", "0" * 64)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("uri", ["/no/such/file", "http://x/y", "s3://bucket", "s3://bucket/dir/"])
def test_a_uri_that_names_no_file_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        fetch(uri, tmp_path)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "hush-hush",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    client = store._client()
    client.create_bucket(Bucket="models")
    client.put_object(Bucket="models", Key="a/w.bin", Body=CONTENT)
    return client


@pytest.mark.slow
def test_an_object_is_downloaded_once(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch("s3://models/a/w.bin", tmp_path, SHA256)
    assert path.name == "w.bin"
    assert path.read_bytes() == CONTENT
    monkeypatch.setattr(store, "_download", None)
    assert fetch("s3://models/a/w.bin", tmp_path, SHA256) == path


@pytest.mark.slow
def test_an_object_that_was_replaced_is_fetched_again(bucket: Any, tmp_path: Path) -> None:
    first = fetch("s3://models/a/w.bin", tmp_path)
    bucket.put_object(Bucket="models", Key="a/w.bin", Body=b"other")
    assert fetch("s3://models/a/w.bin", tmp_path).read_bytes() == b"other"
    assert first.read_bytes() == CONTENT


@pytest.mark.slow
def test_another_file_than_was_meant_is_refused(bucket: Any, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"has SHA-256"):
        fetch("s3://models/a/w.bin", tmp_path, "0" * 64)


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["s3://models/absent", "s3://nowhere/at/all"])
def test_what_is_absent_is_one_line_without_secrets(bucket: Any, tmp_path: Path, uri: str) -> None:
    with pytest.raises(StorageError, match="404") as caught:
        fetch(uri, tmp_path)
    assert "hush" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_broken_download_leaves_nothing_and_goes_on_where_it_stopped(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import IncompleteReadError
    from botocore.response import StreamingBody

    real, broken = StreamingBody.iter_chunks, [0]

    def breaking(body: Any, size: int) -> Iterator[bytes]:
        broken[0] += 1
        if broken[0] in fail_on:
            yield body.read(100)
            raise IncompleteReadError(actual_bytes=100, expected_bytes=7000)
        yield from real(body, size)

    monkeypatch.setattr(StreamingBody, "iter_chunks", breaking)
    fail_on = {1, 2, 3}
    with pytest.raises(StorageError, match="broke 3 times"):
        fetch("s3://models/a/w.bin", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    fail_on = {4}
    assert fetch("s3://models/a/w.bin", tmp_path, SHA256).read_bytes() == CONTENT
