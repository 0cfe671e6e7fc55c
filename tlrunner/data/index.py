"""Where each image lies inside a Parquet file, so that a row is read by its offset.

An image column that is plain, uncompressed and without dictionary holds each image in one piece,
behind its length. The index of `NAME.parquet` is `NAME.index.npy`: one record a row with `offset`
and `length` of the image in bytes, its `width` and `height` in pixels, its `label`, its `split`
(a number of `manifest.SPLITS`) and its sample `id`. Made by reading the file back, which also
proves that it can be read.
"""

import io
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tlrunner.data.manifest import SPLITS, UNSPLIT, Shard
from tlrunner.data.order import sample_ids
from tlrunner.errors import DataError
from tlrunner.files import write_with

INDEX_DTYPE = np.dtype(
    [
        *(("offset", "<u8"), ("length", "<u8"), ("id", "<u8"), ("label", "<i4")),
        *(("width", "<u4"), ("height", "<u4"), ("split", "<u4")),
    ]
)
Index = NDArray[np.void]


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.npy")


def build_index(shard: Path) -> Index:
    """Read a shard back and locate every image.

    Raises:
        DataError: the file's images are not stored contiguously, or a column is missing.
        OSError, pyarrow.ArrowException: the file cannot be read.
    """
    groups = []
    with (
        shard.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        pq.ParquetFile(shard, page_checksum_verification=True) as parquet,
    ):
        names = parquet.schema_arrow.names
        missing = [n for n in ("image", "label", "width", "height", "key") if n not in names]
        if missing:
            raise DataError(f"{shard} has no column '{missing[0]}'", ", ".join(names))
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=[*names])
            column = parquet.metadata.row_group(group).column(names.index("image"))
            groups.append(_index_group(table, content, column.data_page_offset, shard))
    return np.concatenate(groups) if groups else np.empty(0, INDEX_DTYPE)


def _index_group(table: pa.Table, content: mmap.mmap, start: int, shard: Path) -> Index:
    images = [value.as_buffer() for value in table["image"]]
    index = np.empty(len(images), INDEX_DTYPE)
    index["offset"] = locate(content, images, start, shard)
    index["length"] = [len(image) for image in images]
    for name in ("label", "width", "height"):
        index[name] = table[name].to_numpy()
    index["id"] = sample_ids(table["key"].to_pylist())
    has_splits = "split" in table.column_names
    splits = table["split"].to_pylist() if has_splits else [None] * len(images)
    index["split"] = [SPLITS.index(split or UNSPLIT) for split in splits]
    return index


def write_index(shard: Path, index: Index) -> None:
    """Write the index of a shard beside it; whole or not at all."""

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, index, allow_pickle=False)

    write_with(index_path(shard), save)


def load_index(path: Path, shard: Shard) -> Index:
    """The index of a shard, mapped into memory.

    Raises:
        DataError: the index does not belong to the shard.
    """
    try:
        index: Index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as err:
        raise _wrong_index(str(path), str(err)) from err
    return _checked(index, shard)


def parse_index(content: bytes, shard: Shard) -> Index:
    """The index of a shard from its file's bytes; raises as `load_index` does."""
    try:
        index: Index = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError) as err:
        raise _wrong_index(shard.index_path, str(err)) from err
    return _checked(index, shard)


def _checked(index: Index, shard: Shard) -> Index:
    if index.dtype != INDEX_DTYPE or index.shape != (shard.num_rows,):
        found = f"{index.shape} of {index.dtype}, {shard.num_rows} rows expected"
        raise _wrong_index(shard.index_path, found)
    if len(index) and int((index["offset"] + index["length"]).max()) > shard.num_bytes:
        raise _wrong_index(shard.index_path, "it points past the end of the shard")
    return index


def locate(content: Any, images: list[pa.Buffer], start: int, shard: Path) -> list[int]:
    """Offsets of images that lie in this order from `start` on, with a page header here and there.

    An earlier match of the same bytes would be as good as the right one.

    Raises:
        DataError: they do not lie there.
    """
    offsets = []
    for image in images:
        stored = len(image).to_bytes(4, "little") + bytes(image)
        found = start if content[start : start + len(stored)] == stored else -1
        found = content.find(stored, start) if found < 0 else found
        if found < 0:
            raise DataError(
                f"{shard} does not hold its images contiguously",
                "an uncompressed, plain 'image' column without dictionary",
                "prepare the images again",
            )
        offsets.append(found + 4)
        start = found + len(stored)
    return offsets


def _wrong_index(where: str, why: str) -> DataError:
    return DataError(
        f"{where} is not the index of its shard: {why}", "", "prepare the images again"
    )
