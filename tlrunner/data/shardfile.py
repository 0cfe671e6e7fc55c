"""One shard: rows in, a plain Parquet file with its index and its manifest entry out.

    image: binary not null, label: int32 not null, width, height: int32, key, split: string

Any Parquet reader opens it. The image column is neither compressed nor dictionary-coded and has no
statistics, so that each JPEG lies in one piece (see `index`); pages carry checksums.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tlrunner.data.decode import StoredImage
from tlrunner.data.index import Index, build_index, index_path, write_index
from tlrunner.data.manifest import Block, Shard
from tlrunner.files import sha256_file

SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("key", pa.string()),
        pa.field("split", pa.string()),
    ]
)
ROW_GROUP_BYTES = 12 << 20  # a group is closed at this size, and before it would pass the next
MAX_ROW_GROUP_BYTES = 16 << 20


class ShardFile:
    """A shard that is being written, to `path`. Rows are kept until their row group is full."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0  # of images, those that wait included
        self._rows: list[dict[str, Any]] = []
        self._waiting_bytes = 0
        self._writer = pq.ParquetWriter(
            path,
            SCHEMA,
            compression="none",
            use_dictionary=False,
            write_statistics=["label", "width", "height", "key", "split"],
            write_page_checksum=True,
        )

    def add(self, key: str, label: int, split: str, image: StoredImage) -> None:
        size = len(image.data)
        if self._waiting_bytes + size > MAX_ROW_GROUP_BYTES:
            self._end_row_group()
        pixels = {"image": image.data, "width": image.width, "height": image.height}
        self._rows.append({"label": label, "key": key, "split": split or None, **pixels})
        self._waiting_bytes += size
        self.num_bytes += size
        if self._waiting_bytes >= ROW_GROUP_BYTES:
            self._end_row_group()

    def finish(self, num_classes: int) -> tuple[Shard, Index]:
        """Close the file, read it back, and write its index beside it.

        Raises:
            OSError, pyarrow.ArrowException, DataError: it cannot be written, or not read back.
        """
        self._end_row_group()
        self._writer.close()
        index = build_index(self.path)
        write_index(self.path, index)
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        return describe_shard(self.path, index, num_classes), index

    def abandon(self) -> None:
        with suppress(OSError):  # the disk is full, say: what went wrong first is the news
            self._writer.close()

    def _end_row_group(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA))
        self._rows, self._waiting_bytes = [], 0


def describe_shard(path: Path, index: Index, num_classes: int) -> Shard:
    """The manifest's entry of a Parquet file that has its index beside it."""
    labels = index["label"][index["label"] >= 0]
    index_file = index_path(path)
    return Shard(
        path=path.name,
        num_rows=len(index),
        num_bytes=path.stat().st_size,
        sha256=sha256_file(path),
        index_bytes=index_file.stat().st_size,
        index_sha256=sha256_file(index_file),
        blocks=_blocks(path),
        label_counts=tuple(np.bincount(labels, minlength=num_classes).tolist()),
    )


def _blocks(path: Path) -> tuple[Block, ...]:
    """The row groups of a file, and what follows the last: each with its SHA-256."""
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    ends = [
        max(c.data_page_offset + c.total_compressed_size for c in _columns(group))
        for group in groups
    ]
    rows = [*(group.num_rows for group in groups), 0]
    starts = [0, *ends]
    blocks = []
    with path.open("rb") as file:
        for start, stop, num_rows in zip(starts, [*ends, path.stat().st_size], rows, strict=True):
            digest = hashlib.sha256(file.read(stop - start)).hexdigest()
            blocks.append(Block(start, stop - start, num_rows, digest))
    return tuple(blocks)


def _columns(group: Any) -> list[Any]:
    return [group.column(i) for i in range(group.num_columns)]
