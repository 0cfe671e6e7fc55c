"""What one node kept, another need not compute."""

from collections.abc import Callable
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
    one, other = node("one"), node("other")
    fill(one)
    exchange.give(one)
    fill(other, 0, 1, 2, 4)
    read: list[int] = []
    real = Exchange._read

    def reading(self: Exchange, file: ActivationFile, start: int, stop: int) -> np.ndarray:
        read.append(stop - start)
        return real(self, file, start, stop)

    monkeypatch.setattr(Exchange, "_read", reading)
    exchange.take(other, 6)
    assert there(other) == [0, 1, 2, 3, 4, 5]
    assert read == [8 * one.num_chunks, 3 * CHUNK * ENTRY_BYTES], "marks, and one range"


def test_what_changed_on_the_way_is_not_taken(
    node: Node, exchange: Exchange, tmp_path: Path
) -> None:
    one, other = node("one"), node("other")
    fill(one)
    exchange.give(one)
    (given,) = (tmp_path / "shared").iterdir()
    content = bytearray(given.read_bytes())
    content[CHUNK * ENTRY_BYTES + 3] ^= 1
    given.write_bytes(content)
    exchange.take(other, other.num_chunks)
    assert there(other) == [0, *range(2, other.num_chunks)]
    assert other.claim(1, wait=False), "and can be computed"


def test_a_file_of_another_size_is_not_taken(
    node: Node, exchange: Exchange, tmp_path: Path
) -> None:
    one, other = node("one"), node("other")
    fill(one)
    exchange.give(one)
    (given,) = (tmp_path / "shared").iterdir()
    given.write_bytes(given.read_bytes()[:-8])
    exchange.take(other, other.num_chunks)
    assert there(other) == []


def test_a_store_that_fails_is_left_alone_and_gives_back_what_was_claimed(
    node: Node, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = node("one"), node("other")
    fill(one)
    exchange.give(one)
    real, calls = Exchange._read, []

    def failing(self: Exchange, file: ActivationFile, start: int, stop: int) -> np.ndarray:
        calls.append(start)
        if len(calls) > 2:
            raise StorageError("the store is down")
        return real(self, file, start, stop)

    monkeypatch.setattr(Exchange, "_read", failing)
    exchange.take(other, other.num_chunks)
    assert exchange.failure.endswith("the store is down")
    assert there(other) == [0, 1, 2]
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
