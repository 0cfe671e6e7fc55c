import hashlib
import os
from pathlib import Path

import pytest
from s3_servers import Bucket

from tlrunner.data import fetch as module
from tlrunner.data.fetch import RANGE_BYTES, download, fetch, open_store, ranges
from tlrunner.data.s3 import S3Store
from tlrunner.data.store import LocalStore, Part
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


@pytest.mark.parametrize(
    "uri",
    ["/no/such/file", "http://x/y", "s3://", "s3:///x", "s3://b c/x", "s3://bucket", "s3://b/dir/"],
)
def test_a_uri_that_names_no_file_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        fetch(uri, tmp_path)


def test_a_uri_opens_the_store_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("here") == open_store(f"file://{tmp_path}/here")
    assert open_store("here") == LocalStore(tmp_path / "here")
    assert open_store("s3://bucket") == S3Store("bucket")
    assert open_store("s3://bucket/") == S3Store("bucket")
    assert open_store("s3://bucket/a/b/") == S3Store("bucket", "a/b")
    assert open_store("s3://bucket/mail@home/a:b").uri == "s3://bucket/mail@home/a:b"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:hush@bucket/x/y",
        "s3://AKIAKEY:hu/sh@bucket/x/y",
        "s3://hush@bucket/x",
        "https://someone:hush@host/x",
        "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=hush",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str, tmp_path: Path) -> None:
    for use in (open_store, lambda uri: fetch(uri, tmp_path)):
        with pytest.raises(StorageError, match=r"valid: .*s3://BUCKET") as caught:
            use(uri)
        assert not any(secret in str(caught.value) for secret in ("AKIAKEY", "hu", "sh@"))


@pytest.mark.parametrize("num_bytes", [0, 1, RANGE_BYTES - 1, RANGE_BYTES, RANGE_BYTES * 2 + 5])
def test_ranges_cover_each_byte_once(num_bytes: int) -> None:
    parts = ranges(num_bytes)
    ends = [part.start + part.num_bytes for part in parts]
    assert [0, *ends] == [*(part.start for part in parts), num_bytes]
    assert all(part.num_bytes > 0 for part in parts)


def test_a_download_writes_the_parts_it_is_asked_for_and_no_others(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.root.mkdir()
    store.path("a").write_bytes(CONTENT)
    target = tmp_path / "target"
    target.write_bytes(b"-" * len(CONTENT))
    download(store, "a", target, [Part(10, 5), Part(6990, 10)])
    assert target.read_bytes() == b"-" * 10 + CONTENT[10:15] + b"-" * 6975 + CONTENT[-10:]


def test_a_write_that_stops_early_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(module.os, "pwrite", lambda file, rest, at: real(file, rest[:999], at))
    (tmp_path / "a").write_bytes(CONTENT)
    download(LocalStore(tmp_path), "a", tmp_path / "target", ranges(len(CONTENT)))
    assert (tmp_path / "target").read_bytes() == CONTENT


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_ends_a_download(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    with pytest.raises(OSError, match="No space left"):
        download(LocalStore(tmp_path), "a", Path("/dev/full"), ranges(len(CONTENT)))


def test_a_download_of_a_file_that_is_absent_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        download(LocalStore(tmp_path), "absent", tmp_path / "target", [Part(0, 1), Part(1, 1)])


@pytest.fixture
def uri(s3_bucket: Bucket) -> str:
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="a/w.bin", Body=CONTENT)
    return f"{s3_bucket.uri}/a/w.bin"


def test_an_object_is_downloaded_once(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(uri, tmp_path, SHA256)
    assert path.name == "w.bin"
    assert path.read_bytes() == CONTENT
    monkeypatch.setattr(module, "download", None)
    assert fetch(uri, tmp_path, SHA256) == path


def test_an_object_that_was_replaced_is_fetched_again(
    uri: str, s3_bucket: Bucket, tmp_path: Path
) -> None:
    first = fetch(uri, tmp_path)
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="a/w.bin", Body=b"other")
    assert fetch(uri, tmp_path).read_bytes() == b"other"
    assert first.read_bytes() == CONTENT


def test_an_object_that_is_replaced_or_removed_meanwhile_is_not_mixed(
    uri: str, s3_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = S3Store.head

    def head_then(action: str, **body: bytes) -> None:
        def head(store: S3Store, name: str) -> tuple[int, str] | None:
            found = real(store, name)
            getattr(s3_bucket.client, action)(Bucket=s3_bucket.name, Key="a/w.bin", **body)
            return found

        monkeypatch.setattr(S3Store, "head", head)

    head_then("put_object", Body=CONTENT[::-1])
    with pytest.raises(StorageError, match=r"a/w.bin' .* it was replaced while it was read"):
        fetch(uri, tmp_path)
    head_then("delete_object")
    with pytest.raises(StorageError, match=r"a/w.bin' .* it was removed while it was read"):
        fetch(uri, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_empty_object_is_an_empty_file(s3_bucket: Bucket, tmp_path: Path) -> None:
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="empty", Body=b"")
    assert fetch(f"{s3_bucket.uri}/empty", tmp_path).read_bytes() == b""


def test_another_file_than_was_meant_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"has SHA-256"):
        fetch(uri, tmp_path, "0" * 64)


def test_an_object_that_is_absent_leaves_nothing(s3_bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"/absent' .* there is no such object"):
        fetch(f"{s3_bucket.uri}/absent", tmp_path)
    with pytest.raises(StorageError, match="there is no such bucket"):
        fetch("s3://nowhere-at-all/absent", tmp_path)
    assert not list(tmp_path.iterdir())
