"""The image column of a Parquet file that anyone may have written: any row's bytes, in any order.

Where the column is plain, uncompressed and without dictionary, images are found in the file
itself (see `index.locate`) and read from there. Any other row group is decoded once, a few rows at
a time and with page checksums verified, into a temporary file without a name.
"""

import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tlrunner.data.index import locate
from tlrunner.errors import DataError
from tlrunner.files import cannot_write

_BATCH_ROWS = 16  # decoded at a time: photos of several MB each must fit into memory
_BUFFER_BYTES = 1 << 20
_PLAIN_ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED"}  # the last two are of levels, not of values
_NULL = -1


@dataclass(frozen=True)
class _Located:
    """A row group's images: offsets into a descriptor's file, and lengths, -1 for a null."""

    spooled: bool
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass
class Spool:
    """One temporary file for all decoded row groups of a source, made when first needed.

    Its lock also keeps row groups from being decoded side by side, which bounds memory.
    """

    directory: Path
    lock: threading.Lock = field(default_factory=threading.Lock)
    _file: IO[bytes] | None = None
    _end: int = 0

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, content: Any) -> int:
        """Keep bytes; returns their offset.

        Raises:
            StorageError: the directory cannot be written, or is full.
        """
        start = self._end
        try:
            if self._file is None:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self.directory, buffering=0)  # noqa: SIM115
            view = memoryview(content)
            while view:
                view = view[os.pwrite(self._file.fileno(), view, self._end) :]
                self._end = start + len(content) - len(view)
        except OSError as err:
            raise cannot_write(self.directory, err) from err
        return start

    def read(self, offset: int, length: int) -> bytes:
        assert self._file is not None
        return os.pread(self._file.fileno(), length, offset)


class ImageColumn:
    """The images of one Parquet file; any number of threads may read them.

    Args:
        name: of the file, for errors.
        leaf: dotted path of the binary column, `image` or `image.bytes`.
        group_rows: rows of each row group.
    """

    def __init__(
        self, path: Path, name: str, leaf: str, group_rows: list[int], spool: Spool
    ) -> None:
        self._path, self._name, self._leaf, self._spool = path, name, leaf, spool
        self._starts = np.cumsum([0, *group_rows])
        self._located: list[_Located | None] = [None] * len(group_rows)
        self._identity = _identity(os.stat(path))  # noqa: PTH116

    def read(self, row: int) -> bytes | None:
        """The bytes of a row's image; None for a null.

        Raises:
            DataError: the file is broken, or not the one any more that was opened.
            StorageError: a copy of its images cannot be kept.
        """
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        located = self._located[group] or self._locate(group)
        at = row - self._starts[group]
        offset, length = int(located.offsets[at]), int(located.lengths[at])
        if length == _NULL:
            return None
        return self._spool.read(offset, length) if located.spooled else self._pread(offset, length)

    def _pread(self, offset: int, length: int) -> bytes:
        # opened each time: a data set may have more files than a process may keep open
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except OSError as err:
            raise self._broken(err.strerror or str(err)) from err
        try:
            self._check_identity(os.fstat(descriptor))
            content = os.pread(descriptor, length, offset)
        except OSError as err:
            raise self._broken(err.strerror or str(err)) from err
        finally:
            os.close(descriptor)
        if len(content) != length:
            raise self._broken("it was cut short while it was read")
        return content

    def _locate(self, group: int) -> _Located:
        with self._spool.lock:
            located = self._located[group]  # another thread may just have found it
            if located is None:
                try:
                    located = self._read_group(group)
                except (OSError, pa.ArrowException) as err:
                    raise self._broken(f"row group {group}: {err}") from err
                self._located[group] = located
            return located

    def _read_group(self, group: int) -> _Located:
        with (
            self._path.open("rb") as file,
            pq.ParquetFile(
                file, page_checksum_verification=True, buffer_size=_BUFFER_BYTES, pre_buffer=False
            ) as parquet,
        ):
            self._check_identity(os.fstat(file.fileno()))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                located = self._find(parquet, group, content)
            return located or self._decode(parquet, group)

    def _find(self, parquet: pq.ParquetFile, group: int, content: mmap.mmap) -> _Located | None:
        """Where a plain column chunk holds its images; None if they are not found there."""
        offsets, lengths = list[int](), list[int]()
        start, end = 0, 0
        for images in self._batches(parquet, group):
            start, end = (start, end) if end else self._plain_span(parquet, group)
            present = [image for image in images if image is not None]
            try:
                found = locate(content, present, start, self._path) if end else None
            except DataError:
                return None
            if found:
                start = found[-1] + len(present[-1])
            if found is None or start > end:
                return None
            places = iter(found)
            offsets += [0 if image is None else next(places) for image in images]
            lengths += [_NULL if image is None else len(image) for image in images]
        return self._complete(group, spooled=False, offsets=offsets, lengths=lengths)

    def _plain_span(self, parquet: pq.ParquetFile, group: int) -> tuple[int, int]:
        """First and last byte of a column chunk that is plain; zeros for one that is packed.

        To be asked after something of the chunk was read: if its metadata is broken, reading raises
        an error, but these properties end the process.
        """
        paths = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
        chunk = parquet.metadata.row_group(group).column(paths.index(self._leaf))
        is_packed = chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page
        if is_packed or not set(chunk.encodings) <= _PLAIN_ENCODINGS:
            return 0, 0
        return chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size

    def _decode(self, parquet: pq.ParquetFile, group: int) -> _Located:
        offsets, lengths = list[int](), list[int]()
        for images in self._batches(parquet, group):
            offsets += [0 if image is None else self._spool.add(image) for image in images]
            lengths += [_NULL if image is None else len(image) for image in images]
        return self._complete(group, spooled=True, offsets=offsets, lengths=lengths)

    def _batches(self, parquet: pq.ParquetFile, group: int) -> Iterator[list[pa.Buffer | None]]:
        batches = parquet.iter_batches(
            _BATCH_ROWS, row_groups=[group], columns=[self._leaf], use_threads=False
        )
        for batch in batches:
            column = batch.column(0)
            if isinstance(column, pa.StructArray):
                column = column.flatten()[0]  # a null struct has null bytes
            if isinstance(column, pa.DictionaryArray):
                column = column.dictionary_decode()
            yield [value.as_buffer() if value.is_valid else None for value in column]

    def _complete(
        self, group: int, *, spooled: bool, offsets: list[int], lengths: list[int]
    ) -> _Located:
        expected = int(self._starts[group + 1] - self._starts[group])
        if len(lengths) != expected:
            raise self._broken(f"row group {group} has {len(lengths)} images, not {expected}")
        return _Located(spooled, np.array(offsets, np.int64), np.array(lengths, np.int64))

    def _check_identity(self, found: os.stat_result) -> None:
        if _identity(found) != self._identity:
            raise self._broken("it was changed while it was read")

    def _broken(self, why: str) -> DataError:
        return DataError(f"{self._name} cannot be read: {why}", "", "get or write the file again")


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns
