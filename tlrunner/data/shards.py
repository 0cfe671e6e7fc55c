"""The bytes of a data set's shards: from files on this node, or row group by row group from afar.

Both are read by any number of threads. Files are read with pread, not mapped: one that is cut short
while a run reads it ends the run with an error, where a mapping would kill the process.
"""

import io
import os
import threading
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tlrunner.data.manifest import Block, Manifest, Shard
from tlrunner.data.order import Rows
from tlrunner.data.store import Part, Store, unreachable
from tlrunner.errors import DataError, StorageError

FETCH_THREADS = 8


class Shards(Protocol):
    """Shards by number, in the manifest's order."""

    def read(self, shard: int, start: int, num_bytes: int) -> bytes:
        """Bytes of a shard.

        Raises:
            DataError, StorageError: it changed, is gone, or cannot be read.
        """
        ...

    def peek(self, shard: int, start: int, num_bytes: int) -> bytes:
        """Likewise, for a reader that checks what it gets; no more than asked for is read."""
        ...

    def plan(self, groups_R: Rows) -> None:
        """Announce the row group of each row that will be read next, in order."""
        ...

    def stop(self) -> None:
        """What was planned will not be read any further; who waits for it waits no more."""
        ...

    def check_unchanged(self) -> None:
        """Raise DataError if a shard is not the file any more that was opened."""
        ...


class LocalShards:
    """Shards in files, which stay open.

    Args:
        descriptors: belong to this object; those of a cache keep their file from being evicted.
        is_ours: the files are a cache's, which nobody changes once they have their name.
    """

    def __init__(
        self, paths: Sequence[Path], descriptors: Sequence[int], *, is_ours: bool = False
    ) -> None:
        self.paths, self._descriptors = paths, descriptors
        self._watched = () if is_ours else paths
        self._facts = [_facts(os.fstat(descriptor)) for descriptor in descriptors]

    def __del__(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    def read(self, shard: int, start: int, num_bytes: int) -> bytes:
        path = self.paths[shard]
        try:
            content = os.pread(self._descriptors[shard], num_bytes, start)
        except OSError as err:
            raise unreachable(str(path), err.strerror or str(err)) from err
        if len(content) != num_bytes:
            raise _changed(path)
        return content

    peek = read

    def plan(self, groups_R: Rows) -> None:
        pass  # the system reads ahead

    def stop(self) -> None:
        pass

    def check_unchanged(self) -> None:
        for path, facts in zip(self._watched, self._facts, strict=False):
            try:
                found = _facts(path.stat())
            except OSError as err:
                raise _changed(path) from err
            if found != facts:
                raise _changed(path)


class StreamedShards:
    """Shards in a store, of which no more than `2 * window` row groups are in memory at a time.

    Rows are to be read in the order planned, in which at most `window` groups are in use at once;
    the groups that come next are fetched meanwhile. Every group is checked against its SHA-256.
    """

    def __init__(self, store: Store, manifest: Manifest, window: int) -> None:
        self.store, self.shards, self.window = store, manifest.shards, window
        self._starts = [np.array([b.start for b in shard.blocks]) for shard in manifest.shards]
        self._first_group = np.cumsum([0, *(len(shard.blocks) for shard in manifest.shards)])
        self._pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="tlrunner-stream")
        self._changed = threading.Condition()
        self._waiting: deque[int] = deque()
        self._reads_left: Counter[int] = Counter()
        self._held: dict[int, Future[bytes]] = {}

    def __del__(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def group_of(self, shard: int, starts_R: np.ndarray) -> Rows:
        """Group numbers, unique over the data set, of places in a shard."""
        inside = np.searchsorted(self._starts[shard], starts_R, side="right") - 1
        return np.asarray(self._first_group[shard] + inside, np.int64)

    def plan(self, groups_R: Rows) -> None:
        groups = groups_R.tolist()
        self.stop()
        with self._changed:
            self._reads_left = Counter(groups)
            self._waiting = deque(dict.fromkeys(groups))
            self._fetch_ahead()

    def stop(self) -> None:
        with self._changed:
            for future in self._held.values():
                future.cancel()
            self._held.clear()
            self._reads_left.clear()
            self._waiting.clear()
            self._changed.notify_all()

    def read(self, shard: int, start: int, num_bytes: int) -> bytes:
        group = int(self.group_of(shard, np.array([start]))[0])
        future = self._future_of(group)
        content = self._fetch(group) if future is None else future.result()
        self._has_read(group)
        first = start - self._block(group)[1].start
        return content[first : first + num_bytes]

    def peek(self, shard: int, start: int, num_bytes: int) -> bytes:
        return read_part(self.store, self.shards[shard].path, Part(start, num_bytes))

    def _future_of(self, group: int) -> "Future[bytes] | None":
        """The promise of a group's content; None if it was not planned.

        Its turn comes: the rows before this one are being read, and let go of their groups.
        """
        with self._changed:
            is_planned = group in self._reads_left
            self._changed.wait_for(lambda: group in self._held or group not in self._reads_left)
            if is_planned and group not in self._held:
                raise StorageError("reading was stopped")  # to a thread nobody waits for
            return self._held.get(group)

    def _has_read(self, group: int) -> None:
        with self._changed:
            if group in self._held:
                self._reads_left[group] -= 1
                if not self._reads_left[group]:
                    del self._held[group], self._reads_left[group]
                    self._fetch_ahead()

    def check_unchanged(self) -> None:
        pass  # every group is checked as it comes

    def _fetch_ahead(self) -> None:
        while self._waiting and len(self._held) < 2 * self.window:
            group = self._waiting.popleft()
            self._held[group] = self._pool.submit(self._fetch, group)
        self._changed.notify_all()

    def _fetch(self, group: int) -> bytes:
        shard, block = self._block(group)
        return read_part(self.store, shard.path, block.part)

    def _block(self, group: int) -> tuple[Shard, Block]:
        number = int(np.searchsorted(self._first_group, group, side="right")) - 1
        shard = self.shards[number]
        return shard, shard.blocks[group - int(self._first_group[number])]


class ShardReader(io.RawIOBase):
    """A shard as a file, for Parquet's own reader; any number of them at a time."""

    def __init__(self, shards: Shards, number: int, num_bytes: int) -> None:
        self.shards, self.number, self.num_bytes, self.position = shards, number, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self.position, self.num_bytes)[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.num_bytes - self.position))
        content = self.shards.peek(self.number, self.position, wanted) if wanted else b""
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def read_part(store: Store, name: str, part: Part) -> bytes:
    """A part of a shard.

    Raises:
        DataError: the shard is not there.
        StorageError: the store cannot be read.
    """
    try:
        return store.read(name, part)
    except FileNotFoundError as err:
        raise absent(store.uri, name) from err


def absent(uri: str, name: str) -> DataError:
    return DataError(
        f"{name} is not in {uri}, though the manifest lists it",
        "every shard of the manifest",
        "put it back, or prepare the images again",
    )


def _facts(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _changed(path: Path) -> DataError:
    return DataError(
        f"{path} changed while it was being read",
        "shards that stay as they are",
        "start again, with a new --name",
    )
