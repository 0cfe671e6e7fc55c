"""A directory of shards, opened: labels and ids of all rows, and the bytes of any one of them.

Rows are numbered through the shards in the manifest's order. Shards are mapped into memory, so
that all trials of a machine share one copy of them, in the page cache.
"""

import mmap
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tlrunner.data.index import load_index
from tlrunner.data.manifest import Manifest, Shard, read_manifest
from tlrunner.data.order import Ids, Rows
from tlrunner.errors import DataError
from tlrunner.files import sha256_file


class Dataset:
    """The rows of a directory of shards. Any number of threads may read from it.

    Attributes:
        ids_N: sample ids, which all order and randomness derive from.
        labels_N: class numbers, -1 where there are no labels.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self.class_names = manifest.class_names
        paths = [directory / shard.path for shard in manifest.shards]
        self._content = [
            _mapped(path, shard) for path, shard in zip(paths, manifest.shards, strict=True)
        ]
        self._indices = [
            load_index(path, shard.num_rows)
            for path, shard in zip(paths, manifest.shards, strict=True)
        ]
        self._starts = np.cumsum([0, *(len(index) for index in self._indices)])
        self.ids_N: Ids = _column([index["id"] for index in self._indices], np.uint64)
        self.labels_N: Rows = _column([index["label"] for index in self._indices], np.int64)

    def __len__(self) -> int:
        return self.manifest.num_images

    def image_bytes(self, row: int) -> memoryview:
        """The stored JPEG or PNG of a row, without a copy."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        record = self._indices[shard][row - self._starts[shard]]
        offset = int(record["offset"])
        return memoryview(self._content[shard])[offset : offset + int(record["length"])]

    @cached_property
    def keys(self) -> list[str]:
        """The key of each row: its path in the original data set. Read when first asked for."""
        columns = [self._read(shard, "key") for shard in self.manifest.shards]
        return [key for column in columns for key in column.to_pylist()]

    def _read(self, shard: Shard, column: str) -> pa.ChunkedArray:
        path = self.directory / shard.path
        return pq.read_table(path, columns=[column], page_checksum_verification=True)[column]


def open_dataset(directory: Path) -> Dataset:
    """Open a directory of shards.

    Raises:
        DataError: no manifest, or files that are missing, cut short, or at odds with it.
    """
    manifest = read_manifest(directory)
    try:
        dataset = Dataset(directory, manifest)
    except (OSError, pa.ArrowException) as err:
        raise _broken(directory, str(err)) from err
    num_classes = len(manifest.class_names)
    counts = np.bincount(dataset.labels_N[dataset.labels_N >= 0], minlength=num_classes)
    if tuple(counts.tolist()) != manifest.label_counts:
        raise _broken(directory, "its labels are not those that the manifest counts")
    return dataset


def verify_shards(directory: Path) -> Manifest:
    """Read every byte of every shard and compare it with the manifest.

    Raises:
        DataError: a shard is not what was written.
    """
    manifest = read_manifest(directory)
    for shard in manifest.shards:
        path = directory / shard.path
        if not path.is_file() or sha256_file(path) != shard.sha256:
            raise _broken(directory, f"{shard.path} is not the file that was written")
    return manifest


def _mapped(path: Path, shard: Shard) -> mmap.mmap:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size != shard.num_bytes:
            raise _broken(path.parent, f"{path.name} has {size} bytes, not {shard.num_bytes}")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _column(parts: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _broken(directory: Path, why: str) -> DataError:
    return DataError(
        f"the shards in {directory} are broken: {why}", "", "delete the directory, prepare again"
    )
