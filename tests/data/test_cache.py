import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tlrunner.data.cache import NodeCache
from tlrunner.errors import StorageError


def write(content: bytes, seconds: float = 0) -> object:
    def make(path: Path) -> None:
        time.sleep(seconds)
        with path.open("r+b") as file:
            file.write(content)

    return make


def never(path: Path) -> None:
    raise AssertionError(f"{path} is there already")


def names(cache: NodeCache) -> set[str]:
    return {path.name for path in cache.directory.iterdir() if path.suffix != ".lock"}


def use(cache: NodeCache, name: str, content: bytes) -> None:
    os.close(cache.hold(name, len(content), write(content)))


def test_a_file_is_made_once_and_read_ever_after(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "node", 100)
    use(cache, "a", b"content")
    descriptor = cache.hold("a", 7, never)
    assert os.pread(descriptor, 100, 0) == b"content"
    os.close(descriptor)


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 30)
    for name in ("a", "b", "c"):
        use(cache, name, name.encode() * 10)
        time.sleep(0.01)
    use(cache, "a", b"a" * 10)
    use(cache, "d", b"d" * 10)
    assert names(cache) == {"a", "c", "d"}


def test_what_is_in_use_is_never_evicted(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 25)
    held = cache.hold("a", 10, write(b"a" * 10))
    use(cache, "b", b"b" * 10)
    use(cache, "c", b"c" * 10)
    assert names(cache) == {"a", "c"}
    with pytest.raises(StorageError, match=r"no room for 20 bytes \(big\).* data\.cache_bytes"):
        use(cache, "big", b"x" * 20)
    assert os.pread(held, 10, 0) == b"a" * 10
    os.close(held)
    use(cache, "big", b"x" * 20)
    assert names(cache) == {"big"}


def test_what_can_never_fit_evicts_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 30)
    use(cache, "a", b"a" * 10)
    with pytest.raises(StorageError, match=r"of its limit of 30 bytes, 10 are in use"):
        use(cache, "big", b"x" * 31)
    assert names(cache) == {"a"}


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 100)

    def failing(path: Path) -> None:
        path.write_bytes(b"half")
        raise StorageError("the store is down")

    with pytest.raises(StorageError, match="the store is down"):
        cache.hold("a", 10, failing)
    assert names(cache) == set()
    use(cache, "a", b"whole")


def test_many_at_once_make_one(tmp_path: Path) -> None:
    cache, made, barrier = NodeCache(tmp_path, 1000), [], threading.Barrier(8)

    def make(path: Path) -> None:
        made.append(path)
        time.sleep(0.05)
        path.write_bytes(b"content")

    def one(_: int) -> bytes:
        barrier.wait()
        descriptor = cache.hold("a", 7, make)
        content = os.pread(descriptor, 100, 0)
        os.close(descriptor)
        return content

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(one, range(8))) == {b"content"}
    assert len(made) == 1


def test_makers_at_once_keep_to_the_limit_together(tmp_path: Path) -> None:
    cache, most = NodeCache(tmp_path, 30), [0]

    def one(number: int) -> None:
        def make(path: Path) -> None:
            with cache._locked():
                most[0] = max(most[0], cache._used())

        os.close(cache.hold(str(number), 10, make))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(30)))
    assert 20 <= most[0] <= 30
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 30


KILLED = """
import os, sys, time
from pathlib import Path
from tlrunner.data.cache import NodeCache

def make(path):
    with path.open("r+b") as file:
        file.write(b"half")
    print("making", flush=True)
    time.sleep(60)

NodeCache(Path(sys.argv[1]), 100).hold("a", 60, make)
"""


def test_a_killed_maker_stands_in_nobodys_way(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 100)
    maker = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout
    assert maker.stdout.readline() == "making\n"
    with pytest.raises(
        StorageError, match="no room for 60 bytes"
    ):  # it is at work: its room is taken
        use(cache, "b", b"b" * 60)
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    maker.stdout.close()
    use(cache, "b", b"b" * 60)  # the leftover gives way
    use(cache, "a", b"whole")
    assert names(cache) == {"a", "b"}
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_without_a_number_the_limit_is_a_third_of_what_could_be_free(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "node")
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert 0 < cache.limit <= max(free // 3, 1) + (64 << 20)


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        use(NodeCache(tmp_path / "file", 100), "a", b"content")
