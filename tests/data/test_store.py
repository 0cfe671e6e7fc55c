"""What holds of every store, and what holds of a directory alone."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3_servers import Bucket

from tlrunner.data.fetch import open_store
from tlrunner.data.store import Entry, LocalStore, Part, Store
from tlrunner.errors import StorageError

CONTENT = bytes(range(256)) * 40


@pytest.fixture(
    params=[
        "local",
        pytest.param("moto_bucket", marks=pytest.mark.slow),
        pytest.param("rclone_bucket", marks=pytest.mark.slow),
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    bucket: Bucket = request.getfixturevalue(request.param)
    return open_store(f"{bucket.uri}/some/prefix")


def put(store: Store, name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "to-put"
    path.write_bytes(content)
    store.put(name, path)


def test_a_store_gives_back_what_was_put(store: Store, tmp_path: Path) -> None:
    for name in ("b.bin", "deep/er/ä é+%.bin", "a.bin", "empty"):
        put(store, name, b"" if name == "empty" else CONTENT, tmp_path)
        assert store.read(name) == (b"" if name == "empty" else CONTENT)
    assert store.list() == [
        *(Entry("a.bin", 10240), Entry("b.bin", 10240)),
        *(Entry("deep/er/ä é+%.bin", 10240), Entry("empty", 0)),
    ]
    assert (store.size("a.bin"), store.size("empty")) == (10240, 0)


def test_a_file_that_is_put_again_is_replaced(store: Store, tmp_path: Path) -> None:
    put(store, "a", CONTENT, tmp_path)
    put(store, "a", b"new", tmp_path)
    assert store.read("a") == b"new"
    assert store.list() == [Entry("a", 3)]


def test_a_part_is_read_alone_and_checked(store: Store, tmp_path: Path) -> None:
    put(store, "a", CONTENT, tmp_path)
    digest = hashlib.sha256(CONTENT[100:150]).hexdigest()
    assert store.read("a", Part(100, 50)) == CONTENT[100:150]
    assert store.read("a", Part(100, 50, digest)) == CONTENT[100:150]
    assert store.read("a", Part(len(CONTENT) - 1, 1)) == CONTENT[-1:]
    assert store.read("a", Part(7, 0)) == b""


def test_what_is_absent_is_told_from_what_is_empty(store: Store) -> None:
    assert store.list() == []
    assert store.size("absent") is None
    with pytest.raises(FileNotFoundError):
        store.read("absent")
    with pytest.raises(FileNotFoundError):
        store.read("absent", Part(0, 10))


def test_a_deleted_file_is_gone_and_may_be_deleted_again(store: Store, tmp_path: Path) -> None:
    put(store, "deep/a", CONTENT, tmp_path)
    put(store, "deep/b", CONTENT, tmp_path)
    store.delete("deep/a")
    store.delete("deep/a")
    store.delete("nowhere/at/all")
    assert store.list() == [Entry("deep/b", len(CONTENT))]


def test_a_neighbour_whose_name_begins_alike_is_not_listed(store: Store, tmp_path: Path) -> None:
    put(store, "inner/a", CONTENT, tmp_path)
    put(store, "inner-b/a", CONTENT, tmp_path)
    assert open_store(f"{store.uri}/inner").list() == [Entry("a", len(CONTENT))]


@given(start=st.integers(0, 400), num_bytes=st.integers(0, 400))
def test_any_range_of_a_local_file_is_its_bytes_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, start: int, num_bytes: int
) -> None:
    store = LocalStore(tmp_path_factory.getbasetemp())
    content = CONTENT[:300]
    store.path("ranges").write_bytes(content)
    part = Part(start, num_bytes)
    if num_bytes == 0 or start + num_bytes <= len(content):
        assert store.read("ranges", part) == content[start : start + num_bytes]
    else:
        with pytest.raises(StorageError):
            store.read("ranges", part)


def test_wrong_bytes_of_a_local_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    wrong = Part(0, 10, hashlib.sha256(b"other").hexdigest())
    with pytest.raises(StorageError, match="/a' cannot be read: its bytes are not those"):
        LocalStore(tmp_path).read("a", wrong)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    store = LocalStore(tmp_path)
    assert store.size("a") is None
    with pytest.raises(StorageError, match="Is a directory"):
        store.read("a")
    with pytest.raises(StorageError, match="a cannot be written: Is a directory"):
        store.delete("a")
    with pytest.raises(StorageError, match="a cannot be written: Is a directory"):
        put(store, "a", CONTENT, tmp_path)
    with pytest.raises(StorageError, match="cannot be written"):
        store.put("to-put/below-a-file", tmp_path / "to-put")
