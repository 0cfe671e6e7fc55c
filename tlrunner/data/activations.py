"""Values that a frozen prefix computed from images, kept for all trials of a node.

One file of the node's cache holds one view of all rows: fixed-size entries of bytes, in chunks. A
chunk exists once its mark does: the CRC-32 of its bytes, written behind them. Whoever reads a chunk
first compares the two, so a chunk that a crash of the machine tore is computed again, and one that
a killed process had not marked was never there.

A chunk is filled by one process at a time, under a lock on a byte that dies with the process; so
several trials fill a file together, and what a killed one leaves is taken over.
"""

import fcntl
import mmap
import os
import zlib

import numpy as np
from numpy.typing import NDArray

from tlrunner.data.cache import NodeCache
from tlrunner.errors import StorageError
from tlrunner.files import cannot_write

CHUNK = 32  # entries, computed at once
_THERE = 1 << 32  # beside the CRC in a mark, which thus is never 0

Bytes = NDArray[np.uint8]


def file_bytes(num_entries: int, entry_bytes: int) -> int:
    """Size of a file: entries, aligned, and a mark of 8 bytes for each chunk."""
    return -(-num_entries * entry_bytes // 8) * 8 + 8 * -(-num_entries // CHUNK)


class ActivationFile:
    """`num_entries` entries of `entry_bytes` in the node's cache; many processes may use it.

    Attributes:
        marks_at: where in the file the marks begin, 8 bytes each.

    Raises:
        StorageError: the cache has no room for it.
    """

    def __init__(self, cache: NodeCache, name: str, num_entries: int, entry_bytes: int) -> None:
        self.num_entries, self.entry_bytes = num_entries, entry_bytes
        self.num_bytes = file_bytes(num_entries, entry_bytes)
        self.num_chunks = -(-num_entries // CHUNK)
        self.path = cache.directory / f"{name}.activations"
        self._file = cache.hold(self.path.name, self.num_bytes, lambda path: None)
        try:
            # of its own, since on NFS a lock on a byte and one on the whole file are the same
            locks = self.path.with_name(f"{self.path.name}.chunks.lock")
            self._locks = os.open(locks, os.O_RDWR | os.O_CREAT, 0o644)
            content = np.frombuffer(
                mmap.mmap(self._file, self.num_bytes, prot=mmap.PROT_READ), np.uint8
            )
        except OSError as err:
            raise cannot_write(self.path, err) from err
        self.marks_at = self.num_bytes - 8 * self.num_chunks
        self._marks = content[self.marks_at :].view(np.uint64)
        self._checked = np.zeros(self.num_chunks, bool)
        self.entries: Bytes = content[: num_entries * entry_bytes].reshape(num_entries, entry_bytes)

    def __del__(self) -> None:
        for name in ("_file", "_locks"):  # one that found no room has neither
            if (descriptor := getattr(self, name, -1)) >= 0:
                os.close(descriptor)

    def span(self, chunk: int) -> slice:
        """The entries of a chunk."""
        return slice(chunk * CHUNK, min((chunk + 1) * CHUNK, self.num_entries))

    def has(self, chunk: int) -> bool:
        """Whether a chunk is there, as it was written."""
        if not self._checked[chunk]:
            mark = int(self._marks[chunk])
            self._checked[chunk] = mark == mark_of(self.entries[self.span(chunk)]) if mark else 0
        return bool(self._checked[chunk])

    def claim(self, chunk: int, *, wait: bool) -> bool:
        """Whether a chunk is now ours to fill: it is not there, and nobody else fills it.

        What is claimed is given back by `commit` or `release`. `wait`: for whoever fills it.
        """
        if self.has(chunk):
            return False
        how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.lockf(self._locks, how, 1, chunk)
        except BlockingIOError:
            return False
        if self.has(chunk):  # by whoever held it until now
            self.release(chunk)
            return False
        return True

    def commit(self, chunk: int, entries: Bytes) -> None:
        """Fill a claimed chunk; others see all of it or nothing.

        Raises:
            StorageError: the disk does not take it. The chunk is given back.
        """
        span = self.span(chunk)
        assert entries.shape == (span.stop - span.start, self.entry_bytes), "a whole chunk"
        content = np.ascontiguousarray(entries)
        mark = np.array([mark_of(content)], np.uint64)
        try:
            _write(self._file, content, span.start * self.entry_bytes)
            _write(self._file, mark, self.marks_at + 8 * chunk)
            self._checked[chunk] = True
        except OSError as err:
            raise cannot_write(self.path, err) from err
        finally:
            self.release(chunk)

    def release(self, chunk: int) -> None:
        fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, chunk)


def mark_of(content: Bytes) -> int:
    """The mark of a chunk with these entries, which lie one behind the other."""
    return _THERE | zlib.crc32(content.data)


def _write(descriptor: int, content: NDArray[np.generic], offset: int) -> None:
    """Written, not copied into the map: a full disk is then an error and not a signal."""
    view = content.data.cast("B")
    while view:
        count = os.pwrite(descriptor, view, offset)
        if count == 0:
            raise StorageError("nothing more can be written to the cache")
        view, offset = view[count:], offset + count
