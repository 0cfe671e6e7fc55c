"""Kept values handed from node to node through a store that all of them see (`reuse.uri`).

A node puts a file there once it is whole, and takes what another has put before it computes
anything. Nodes that begin at the same time compute the same.
"""

import logging
import platform
import shutil
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tlrunner.data.activations import CHUNK, ActivationFile, Bytes, mark_of
from tlrunner.data.fetch import RANGE_BYTES, open_store
from tlrunner.data.store import LocalStore, Part
from tlrunner.errors import StorageError
from tlrunner.files import locked, write_with

log = logging.getLogger("tlrunner")
MOST_BYTES = 5 * 10**9  # of a file: what S3 takes at once
Answer = TypeVar("Answer")


class Exchange:
    """A place for files of kept values, as one process uses it.

    Attributes:
        failure: why the place is not used any more; empty while it is.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.store = uri, open_store(uri)
        self.failure = ""
        self.given: set[str] = set()

    def take(self, file: ActivationFile, num_chunks: int) -> None:
        """Fill the first chunks of a file, as far as the place has them.

        Raises:
            StorageError: the node's disk does not take them.
        """
        if self.failure or self._ask(lambda: self._size(file)) != file.num_bytes:
            return
        marks = self._ask(lambda: self._read(file, file.marks_at, file.num_bytes))
        if marks is None:
            return
        self.given.add(file.path.name)
        per_range = max(1, RANGE_BYTES // (CHUNK * file.entry_bytes))
        for first in range(0, num_chunks, per_range):
            chunks = range(first, min(first + per_range, num_chunks))
            if not self._take(file, chunks, marks.view(np.uint64)):
                return

    def give(self, file: ActivationFile) -> None:
        """Put a whole file there, if there is none yet."""
        name = file.path.name
        if self.failure or name in self.given:
            return
        if file.num_bytes > MOST_BYTES:
            self._fail(f"{name} has {file.num_bytes:,} bytes, and S3 takes {MOST_BYTES:,} at once")
            return
        self._ask(lambda: self._give(file))
        self.given.add(name)

    def _take(self, file: ActivationFile, chunks: range, marks: NDArray[np.uint64]) -> bool:
        """Chunks that lie side by side. Gives whether the store still answers."""
        claimed: list[int] = []
        try:
            claimed += (chunk for chunk in chunks if file.claim(chunk, wait=False))
            if not claimed:
                return True
            start, stop = file.span(claimed[0]).start, file.span(claimed[-1]).stop
            size = file.entry_bytes
            content = self._ask(lambda: self._read(file, start * size, stop * size))
            if content is None:
                return False
            rows = content.reshape(stop - start, size)
            for chunk in claimed:
                span = file.span(chunk)
                entries = rows[span.start - start : span.stop - start]
                if mark_of(entries) == marks[chunk]:
                    file.commit(chunk, entries)
            return True
        finally:
            for chunk in claimed:
                file.release(chunk)

    def _give(self, file: ActivationFile) -> None:
        name = file.path.name
        with locked(file.path.with_name(f"{name}.give.lock")):  # or each process does
            if self._size(file) == file.num_bytes:
                return
            if not isinstance(self.store, LocalStore):
                self.store.put(name, file.path)
                return
            # `put` would move it. Nodes that share a directory may share process numbers.
            copy = self.store.path(f"{name}.{platform.node()}")
            write_with(copy, lambda part: shutil.copyfile(file.path, part))
            copy.replace(self.store.path(name))

    def _size(self, file: ActivationFile) -> int | None:
        return self.store.size(file.path.name)

    def _read(self, file: ActivationFile, start: int, stop: int) -> Bytes:
        content = self.store.read(file.path.name, Part(start, stop - start))
        return np.frombuffer(content, np.uint8)

    def _ask(self, question: Callable[[], Answer]) -> Answer | None:
        """What the store answers; None if it fails, and then it is left alone."""
        try:
            return question()
        except (StorageError, FileNotFoundError) as err:  # not found: removed in between
            self._fail(str(err))
            return None

    def _fail(self, why: str) -> None:
        self.failure = f"nothing frozen is shared through reuse.uri {self.uri} any more: {why}"
        log.warning("%s", self.failure)
