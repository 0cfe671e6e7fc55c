"""A data set of shards, opened: labels and ids of all rows, and the picture of any one of them.

Rows are numbered through the shards in the manifest's order. Shards in a directory are read where
they are; those in S3 are fetched into the node's cache once for all of its trials, or streamed
where the cache is too small for them.
"""

import io
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tlrunner.data.cache import NodeCache
from tlrunner.data.decode import Decoded, Encoded, Picture
from tlrunner.data.decoded import DecodedCache
from tlrunner.data.fetch import download, open_store
from tlrunner.data.index import Index, build_index, load_index, parse_index
from tlrunner.data.manifest import MANIFEST_NAME, SPLITS, Manifest, Shard, parse_manifest
from tlrunner.data.order import Ids, Rows
from tlrunner.data.shards import LocalShards, ShardReader, Shards, StreamedShards, absent, read_part
from tlrunner.data.store import LocalStore, Part, Store
from tlrunner.errors import DataError
from tlrunner.files import sha256_file

WINDOW = 16  # row groups that a streamed epoch shuffles at a time: 128 to 256 MiB


class Dataset:
    """The rows of a data set. Any number of threads may read from it.

    Attributes:
        uri: where its manifest lies.
        ids_N: sample ids, which all order and randomness derive from.
        labels_N: class numbers, -1 where there are no labels.
        splits_N: what the source said of each row, as a number of `manifest.SPLITS`.
        sizes_N2: (height, width) of each image in pixels.
        groups_N: row group of each row, numbered over the data set.
        window: row groups that may be in use at a time; None if all may.
        decoded: where pictures come from, if anywhere but from the shards.
    """

    def __init__(
        self, uri: str, manifest: Manifest, indices: Sequence[Index], shards: Shards
    ) -> None:
        self.uri, self.manifest, self.shards = uri, manifest, shards
        self.decoded: DecodedCache | None = None
        self.class_names = manifest.class_names
        self.window = shards.window if isinstance(shards, StreamedShards) else None
        self.images = StoredImages(indices, shards)
        self._indices = indices
        self.ids_N: Ids = _column([index["id"] for index in indices], np.uint64)
        self.labels_N: Rows = _column([index["label"] for index in indices], np.int64)
        self.splits_N: Rows = _column([index["split"] for index in indices], np.int64)
        sides = [_column([index[side] for index in indices], np.int64) for side in _SIDES]
        self.sizes_N2 = np.stack(sides, 1)

    def __len__(self) -> int:
        return self.manifest.num_images

    def image_bytes(self, row: int) -> bytes:
        """The stored JPEG or PNG of a row.

        Raises:
            DataError, StorageError: the shard changed, or cannot be read any more.
        """
        return self.images.read(row)

    def picture(self, row: int) -> Picture:
        """A row's image, to be rendered.

        Raises:
            BadImage: the stored bytes are no image.
            DataError, StorageError: they cannot be read any more.
        """
        kept = self.decoded.pixels(row) if self.decoded else None
        return Encoded(self.image_bytes(row)) if kept is None else Decoded(kept)

    @cached_property
    def groups_N(self) -> Rows:  # noqa: N802  (a shape ends its name)
        assert isinstance(self.shards, StreamedShards), "only a streamed data set has a window"
        group_of = self.shards.group_of
        return _column([group_of(i, x["offset"]) for i, x in enumerate(self._indices)], np.int64)

    def plan(self, rows_R: Rows) -> None:
        """Announce the rows that will be read next, in order."""
        if self.window is not None:
            self.shards.plan(self.groups_N[rows_R])

    def stop(self) -> None:
        """What was planned will not be read any further."""
        self.shards.stop()

    def check_unchanged(self) -> None:
        """Raise DataError if a shard is not the file any more that was opened."""
        self.shards.check_unchanged()

    @cached_property
    def keys(self) -> list[str]:
        """The key of each row: its path in the original data set. Read when first asked for."""
        keys: list[str] = []
        for number, shard in enumerate(self.manifest.shards):
            try:
                raw = ShardReader(self.shards, number, shard.num_bytes)
                file = io.BufferedReader(raw, 1 << 20)
                table = pq.read_table(file, columns=["key"], page_checksum_verification=True)
                keys += table["key"].to_pylist()
            except (OSError, UnicodeError, pa.ArrowException) as err:
                raise broken(self.uri, f"{shard.path}: {err}") from err
        return keys


class StoredImages:
    """Where the rows' images lie, and how to read one. Any number of threads may."""

    def __init__(self, indices: Sequence[Index], shards: Shards) -> None:
        self._indices, self._shards = indices, shards
        self._starts = np.cumsum([0, *(len(index) for index in indices)])

    def read(self, row: int) -> bytes:
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        record = self._indices[shard][row - self._starts[shard]]
        return self._shards.read(shard, int(record["offset"]), int(record["length"]))


_SIDES = ("height", "width")


def open_dataset(
    where: str | Path, cache: NodeCache | None = None, *, streamed: bool = False
) -> Dataset:
    """Open the shards in a directory or below an S3 prefix.

    Args:
        cache: where those in S3 are kept; needed for S3 alone, unless they are streamed.
        streamed: read row groups when they are needed, and keep none.

    Raises:
        DataError: no manifest, or files that are missing, cut short, or at odds with it.
        StorageError: the store cannot be read, or the cache not written.
    """
    store = open_store(str(where))
    manifest = load_manifest(store)
    try:
        indices = [_index(store, shard, None if streamed else cache) for shard in manifest.shards]
        shards = (
            StreamedShards(store, manifest, WINDOW)
            if streamed
            else _on_this_node(store, manifest, cache)
        )
    except (OSError, pa.ArrowException) as err:
        raise broken(store.uri, str(err)) from err
    dataset = Dataset(store.uri, manifest, indices, shards)
    _check_counts(dataset)
    return dataset


def load_manifest(store: Store) -> Manifest:
    """The manifest of a store of shards.

    Raises:
        DataError: there is none, or it is of no use.
        StorageError: the store cannot be read.
    """
    where = f"{store.uri}/{MANIFEST_NAME}"
    try:
        text = store.read(MANIFEST_NAME)
    except FileNotFoundError as err:
        raise DataError(
            f"{where} does not exist",
            "a place that jobs/prepare_images.py wrote",
            "prepare the images first",
        ) from err
    return parse_manifest(text, where)


def verify_shards(where: str | Path) -> Manifest:
    """Read every byte of the shards in a directory and compare them with the manifest.

    Those in S3 are compared as they are fetched.

    Raises:
        DataError: a shard is not what was written.
    """
    store = open_store(str(where))
    manifest = load_manifest(store)
    if isinstance(store, LocalStore):
        for shard in manifest.shards:
            expected = {shard.path: shard.sha256, shard.index_path: shard.index_sha256}
            for name, sha256 in expected.items():
                path = store.path(name)
                if name == shard.path and not path.is_file():
                    raise absent(store.uri, name)
                if path.is_file() and sha256_file(path) != sha256:
                    raise broken(store.uri, f"{name} is not the file that was written")
    return manifest


def broken(uri: str, why: str) -> DataError:
    return DataError(f"the shards in {uri} are broken: {why}", "", "prepare the images again")


def _index(store: Store, shard: Shard, cache: NodeCache | None) -> Index:
    """The index of a shard: mapped from its file here or in the cache, else read into memory."""
    whole = Part(0, shard.index_bytes, shard.index_sha256)
    if isinstance(store, LocalStore):
        path = store.path(shard.index_path)
        if not path.is_file():
            return build_index(store.path(shard.path))
        if sha256_file(path) != shard.index_sha256:
            raise broken(store.uri, f"{path.name} is not the index that was written")
        return load_index(path, shard)
    if cache is None:
        content = read_part(store, shard.index_path, whole)
        return parse_index(content, shard)
    name = f"{shard.index_sha256}.index.npy"
    held = _cached(store, shard.index_path, [whole], cache, name)
    try:
        return load_index(cache.directory / name, shard)  # mapped, so it may be evicted afterwards
    finally:
        os.close(held)


def _on_this_node(store: Store, manifest: Manifest, cache: NodeCache | None) -> LocalShards:
    if isinstance(store, LocalStore):
        paths = [store.path(shard.path) for shard in manifest.shards]
        shards = LocalShards(paths, [_opened(store, shard) for shard in manifest.shards])
    else:
        assert cache is not None, "shards that are not on this machine need a cache"
        names = [f"{shard.sha256}.parquet" for shard in manifest.shards]
        held = [
            _cached(store, shard.path, [block.part for block in shard.blocks], cache, name)
            for shard, name in zip(manifest.shards, names, strict=True)
        ]
        shards = LocalShards([cache.directory / name for name in names], held, is_ours=True)
    return shards


def _opened(store: LocalStore, shard: Shard) -> int:
    path = store.path(shard.path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError as err:
        raise absent(store.uri, shard.path) from err
    size = os.fstat(descriptor).st_size
    if size != shard.num_bytes:
        os.close(descriptor)
        raise broken(store.uri, f"{path.name} has {size} bytes, not {shard.num_bytes}")
    return descriptor


def _cached(store: Store, name: str, parts: list[Part], cache: NodeCache, cached_name: str) -> int:
    """A descriptor of a file in the cache, fetched and checked part by part if it is not there."""

    def make(path: Path) -> None:
        try:
            download(store, name, path, parts)
        except FileNotFoundError as err:
            raise absent(store.uri, name) from err
        with path.open("rb") as file:
            os.fsync(file.fileno())

    num_bytes = sum(part.num_bytes for part in parts)
    return cache.hold(cached_name, num_bytes, make)


def _check_counts(dataset: Dataset) -> None:
    """Labels and splits of the rows are those that the manifest counts."""
    manifest, num_classes = dataset.manifest, len(dataset.class_names)
    labels_N, splits_N = dataset.labels_N, dataset.splits_N
    if labels_N.max(initial=-1) >= num_classes:
        raise broken(dataset.uri, f"a label is {labels_N.max()}, there are {num_classes} classes")
    for number, split in enumerate(SPLITS):
        found = np.bincount(labels_N[(splits_N == number) & (labels_N >= 0)], minlength=num_classes)
        if tuple(found.tolist()) != manifest.counts.get(split, (0,) * num_classes):
            raise broken(dataset.uri, "its labels are not those that the manifest counts")


def _column(parts: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)
