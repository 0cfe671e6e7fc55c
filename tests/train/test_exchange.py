"""What one node kept, another need not compute."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from s3_servers import Bucket

from tlrunner.data.activations import CHUNK, ActivationFile
from tlrunner.data.cache import NodeCache
from tlrunner.data.fetch import open_store
from tlrunner.errors import StorageError
from tlrunner.train import exchange as module
from tlrunner.train.exchange import Exchange

NUM_ENTRIES, ENTRY_BYTES = 9 * CHUNK + 5, 24
Node = Callable[[str], ActivationFile]
ENTRIES = np.random.default_rng(0).integers(0, 256, (NUM_ENTRIES, ENTRY_BYTES), np.uint8)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """`node(name)`: the file as that node has it, empty at first."""
    return lambda name: ActivationFile(
        NodeCache(tmp_path / name, 1 << 30), "values", NUM_ENTRIES, ENTRY_BYTES
    )


@pytest.fixture
def exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exchange:
    monkeypatch.setattr(module, "RANGE_BYTES", 3 * CHUNK * ENTRY_BYTES)  # several of them
    return Exchange(str(tmp_path / "shared"))


def fill(file: ActivationFile, *chunks: int) -> None:
    for chunk in chunks or range(file.num_chunks):
        if file.claim(chunk, wait=True):
            file.commit(chunk, ENTRIES[file.span(chunk)])


# Locks are of a process: only another one can tell.
OTHER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
if sys.argv[2] == "hold":
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, int(sys.argv[3]))
    print("held", flush=True)
    sys.stdin.read()
for chunk in range(int(sys.argv[3])):
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, chunk)
        print(chunk)
    except BlockingIOError:
        pass
"""


def other_process(file: ActivationFile, what: str, number: int) -> subprocess.Popen[str]:
    locks = file.path.with_name(f"{file.path.name}.chunks.lock")
    command = [sys.executable, "-c", OTHER, str(locks), what, str(number)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def held(file: ActivationFile, chunk: int) -> Iterator[None]:
    """Another process computes a chunk meanwhile."""
    with other_process(file, "hold", chunk) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate("")


def claimable(file: ActivationFile) -> list[int]:
    """The chunks that are missing and that another process could begin with."""
    with other_process(file, "try", file.num_chunks) as process:
        free = process.communicate("")[0].split()
    return [chunk for chunk in map(int, free) if not file.has(chunk)]


def gave(node: Node, exchange: Exchange) -> tuple[ActivationFile, ActivationFile]:
    """The file of a node that gave all of it, and that of another, empty."""
    one, other = node("one"), node("other")
    fill(one)
    exchange.give(one)
    return one, other


def there(file: ActivationFile) -> list[int]:
    return [chunk for chunk in range(file.num_chunks) if file.has(chunk)]


def test_what_one_node_gives_another_takes(node: Node, exchange: Exchange) -> None:
    one, other = node("one"), node("other")
    exchange.take(other, other.num_chunks)
    assert there(other) == [], "nobody gave anything"
    fill(one)
    exchange.give(one)
    exchange.take(other, 4)
    assert there(other) == [0, 1, 2, 3]
    exchange.take(other, other.num_chunks)
    assert (node("other").entries == ENTRIES).all()
    assert there(node("other")) == list(range(other.num_chunks))
    assert exchange.failure == ""
    assert there(one) == there(node("one")), "the giver has its own still"


def test_only_what_is_missing_and_nobody_computes_is_read(
    node: Node, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = gave(node, exchange)
    fill(other, 0, 1, 2)
    read: list[int] = []
    real = Exchange._read

    def reading(self: Exchange, file: ActivationFile, start: int, stop: int) -> np.ndarray:
        read.append(stop - start)
        return real(self, file, start, stop)

    monkeypatch.setattr(Exchange, "_read", reading)
    with held(other, 4):
        exchange.take(other, 6)
    assert there(other) == [0, 1, 2, 3, 5]
    assert read == [8 * one.num_chunks, 3 * CHUNK * ENTRY_BYTES], "marks, and one range"


def test_what_changed_on_the_way_is_not_taken(
    node: Node, exchange: Exchange, tmp_path: Path
) -> None:
    _, other = gave(node, exchange)
    (given,) = (tmp_path / "shared").iterdir()
    content = bytearray(given.read_bytes())
    content[CHUNK * ENTRY_BYTES + 3] ^= 1
    given.write_bytes(content)
    exchange.take(other, other.num_chunks)
    assert there(other) == [0, *range(2, other.num_chunks)]
    assert 1 in claimable(other), "and can be computed"


def test_a_file_of_another_size_is_not_taken(
    node: Node, exchange: Exchange, tmp_path: Path
) -> None:
    _, other = gave(node, exchange)
    (given,) = (tmp_path / "shared").iterdir()
    given.write_bytes(given.read_bytes()[:-8])
    exchange.take(other, other.num_chunks)
    assert there(other) == []


def test_a_store_that_fails_is_left_alone_and_gives_back_what_was_claimed(
    node: Node, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = gave(node, exchange)
    real, calls = Exchange._read, []

    def failing(self: Exchange, file: ActivationFile, start: int, stop: int) -> np.ndarray:
        calls.append(start)
        if len(calls) > 2:
            raise StorageError("the store is down")
        return real(self, file, start, stop)

    monkeypatch.setattr(Exchange, "_read", failing)
    exchange.take(other, other.num_chunks)
    assert exchange.failure.endswith("the store is down")
    assert "reuse.uri" in exchange.failure
    assert there(other) == [0, 1, 2]
    assert claimable(other) == list(range(3, other.num_chunks))
    exchange.take(other, other.num_chunks)
    exchange.give(other)
    assert len(calls) == 3, "it is asked no more"
    fill(other)
    assert len(there(other)) == other.num_chunks


@pytest.mark.slow
def test_nodes_hand_on_through_s3(node: Node, s3_bucket: Bucket) -> None:
    one, other = node("one"), node("other")
    exchange = Exchange(f"{s3_bucket.uri}/kept")
    fill(one)
    exchange.give(one)
    exchange.give(one)
    exchange.take(other, other.num_chunks)
    assert exchange.failure == ""
    assert (other.entries == ENTRIES).all()
    (entry,) = open_store(f"{s3_bucket.uri}/kept").list()
    assert entry.num_bytes == one.num_bytes
