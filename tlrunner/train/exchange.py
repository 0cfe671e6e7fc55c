"""Kept values handed from node to node through a store that all of them see.

A node puts a file there once it is whole, and takes what another has put before it computes
anything. Nodes that begin at the same time compute the same.
"""

import logging
import shutil
from collections.abc import Callable

import numpy as np

from tlrunner.data.activations import CHUNK, ActivationFile, Bytes, mark_of
from tlrunner.data.fetch import RANGE_BYTES, open_store
from tlrunner.data.store import LocalStore, Part
from tlrunner.errors import StorageError
from tlrunner.files import write_with

log = logging.getLogger("tlrunner")


class Exchange:
    """A place for files of kept values.

    Attributes:
        failure: why the place is not used any more; empty while it is.
    """

    def __init__(self, uri: str) -> None:
        self.store = open_store(uri)
        self.failure = ""

    def take(self, file: ActivationFile, num_chunks: int) -> None:
        """Fill the first chunks of a file, as far as the place has them."""
        self._try(lambda: self._take(file, num_chunks))

    def give(self, file: ActivationFile) -> None:
        """Put a whole file there, if there is none yet."""
        self._try(lambda: self._give(file))

    def _try(self, work: Callable[[], None]) -> None:
        if self.failure:
            return
        try:
            work()
        except (StorageError, FileNotFoundError) as err:  # not found: removed in between
            self.failure = f"nothing frozen is shared with other nodes any more: {err}"
            log.warning("%s", self.failure)

    def _take(self, file: ActivationFile, num_chunks: int) -> None:
        if self.store.size(file.path.name) != file.num_bytes:
            return
        marks = self._read(file, file.marks_at, file.num_bytes).view(np.uint64)
        per_range = max(1, RANGE_BYTES // (CHUNK * file.entry_bytes))
        for first in range(0, num_chunks, per_range):
            chunks = range(first, min(first + per_range, num_chunks))
            claimed = [chunk for chunk in chunks if file.claim(chunk, wait=False)]
            if not claimed:
                continue
            try:
                start, stop = file.span(claimed[0]).start, file.span(claimed[-1]).stop
                content = self._read(file, start * file.entry_bytes, stop * file.entry_bytes)
                rows = content.reshape(stop - start, file.entry_bytes)
                for chunk in claimed:
                    span = file.span(chunk)
                    entries = rows[span.start - start : span.stop - start]
                    if mark_of(entries) == marks[chunk]:
                        file.commit(chunk, entries)
            finally:
                for chunk in claimed:
                    file.release(chunk)

    def _read(self, file: ActivationFile, start: int, stop: int) -> Bytes:
        content = self.store.read(file.path.name, Part(start, stop - start))
        return np.frombuffer(content, np.uint8)

    def _give(self, file: ActivationFile) -> None:
        name = file.path.name
        if self.store.size(name) == file.num_bytes:
            return
        if isinstance(self.store, LocalStore):  # whose `put` moves
            write_with(self.store.path(name), lambda copy: shutil.copyfile(file.path, copy))
        else:
            self.store.put(name, file.path)
