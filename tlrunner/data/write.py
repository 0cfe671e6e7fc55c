"""Any source of images -> a directory of Parquet shards with a manifest.

    image: binary not null, label: int32 not null, width, height: int32, key: string

Plain Parquet that any reader opens. The image column is neither compressed nor dictionary-coded,
so that each JPEG lies in one piece (see `index`). Rows are shuffled once, by hash of their keys.
Everything is written into a temporary sibling and renamed: a directory is whole or absent.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tlrunner.data.decode import BadImage, StoredImage, normalise
from tlrunner.data.index import build_index, write_index
from tlrunner.data.manifest import VERSION, Manifest, Shard, write_manifest
from tlrunner.data.order import epoch_order, limit_rows, sample_ids
from tlrunner.data.sources import Source
from tlrunner.data.threads import map_ahead
from tlrunner.errors import DataError, StorageError
from tlrunner.files import cannot_write, sha256_file, write_with

SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("key", pa.string()),
    ]
)
BAD_SCHEMA = pa.schema([(name, pa.string()) for name in ("source", "key", "reason", "sha256")])
BAD_NAME = "bad_images.parquet"
ROW_GROUP_BYTES = 12 << 20
SHARD_BYTES = 192 << 20
_SAMPLE_OF_BAD = 100  # bad images after which a hopeless data set is not read any further

Progress = Callable[[int, int], None]
Row = tuple[str, int, "StoredImage | dict[str, str]"]


def write_shards(
    source: Source,
    directory: Path,
    *,
    limit: int | None = None,
    max_bad_fraction: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> Manifest:
    """Write a source's images as shards into `directory`, which must be absent or empty.

    `limit`: that many samples, stratified by class. `progress(done, total)` is called per image.

    Raises:
        DataError: too many images cannot be used. `DIRECTORY.bad_images.parquet` lists them.
        StorageError: the directory cannot be written. Nothing is left behind.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise StorageError(f"{directory} holds something already", "", "choose another name")
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        manifest = _write_all(source, temporary, directory, limit, max_bad_fraction, seed, progress)
        temporary.replace(directory)
        _flush_directory(directory.parent)
    except OSError as err:  # pyarrow's I/O errors are OSErrors too
        raise cannot_write(directory, err) from err
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _write_all(
    source: Source,
    temporary: Path,
    directory: Path,
    limit: int | None,
    max_bad_fraction: float,
    seed: int,
    progress: Progress | None,
) -> Manifest:
    order = _shuffled(source, limit, seed)
    allowed = int(max_bad_fraction * len(order))
    shards, bad = _ShardWriter(temporary), list[dict[str, str]]()
    counts = np.zeros(len(source.class_names), np.int64)
    with shards:
        for done, (key, label, image) in enumerate(_normalised(source, order), start=1):
            if isinstance(image, StoredImage):
                shards.add(key, label, image)
                counts[label : label + 1] += label >= 0
            else:
                bad.append(image)
                if len(bad) > max(allowed, _SAMPLE_OF_BAD):
                    break
            if progress:
                progress(done, len(order))
    if len(bad) > allowed or len(bad) == len(order):
        raise _stopped(bad, done, len(order), max_bad_fraction, directory)
    if bad:
        _write_bad(temporary / BAD_NAME, bad)
    manifest = Manifest(
        version=VERSION,
        class_names=source.class_names,
        shards=tuple(shards.done),
        num_images=sum(shard.num_rows for shard in shards.done),
        num_bad=len(bad),
        label_counts=tuple(counts.tolist()),
    )
    write_manifest(temporary, manifest)
    return manifest


def _shuffled(source: Source, limit: int | None, seed: int) -> list[int]:
    """Sample numbers in the order they are written."""
    ids, labels = sample_ids(source.keys), np.asarray(source.labels, np.int64)
    rows = limit_rows(ids, labels, limit)
    return [int(row) for row in rows[epoch_order(ids[rows], seed, 0)]]


def _normalised(source: Source, order: list[int]) -> Iterator[Row]:
    """Each sample's image, or what is wrong with it, in order; read and checked by threads."""

    def one(i: int) -> Row:
        data = b""
        try:
            data = source.read(i)
            return source.keys[i], source.labels[i], normalise(data)
        except (BadImage, OSError) as err:
            reason = str(err) if isinstance(err, BadImage) else f"unreadable: {err.strerror}"
            digest = hashlib.sha256(data).hexdigest()
            facts = {"source": source.uri, "key": source.keys[i]}
            return source.keys[i], source.labels[i], facts | {"reason": reason, "sha256": digest}

    num_threads = min(8, os.cpu_count() or 1)
    return map_ahead(one, order, num_threads, ahead=4 * num_threads)


@dataclass
class _ShardWriter:
    """Rows go in; shards, their indices and their manifest entries come out."""

    directory: Path
    done: list[Shard] = field(default_factory=list)
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _pending_bytes: int = 0
    _writer: Any = None

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._end_shard()
        elif self._writer is not None:
            with suppress(OSError):  # the disk is full, say: what went wrong first is the news
                self._writer.close()

    @property
    def _path(self) -> Path:
        return self.directory / f"shard-{len(self.done):05d}.parquet"

    def add(self, key: str, label: int, image: StoredImage) -> None:
        size = {"width": image.width, "height": image.height}
        self._rows.append({"image": image.data, "label": label, "key": key, **size})
        self._pending_bytes += len(image.data)
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self._end_row_group()
            if self._path.stat().st_size >= SHARD_BYTES:
                self._end_shard()

    def _end_row_group(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path,
                SCHEMA,
                compression="none",
                use_dictionary=False,
                write_statistics=["label", "width", "height", "key"],
                write_page_checksum=True,
            )
        self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA))
        self._rows, self._pending_bytes = [], 0

    def _end_shard(self) -> None:
        if self._rows:
            self._end_row_group()
        if self._writer is None:
            return
        self._writer.close()
        self._writer, path = None, self._path
        index = build_index(path)
        write_index(path, index)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        size = path.stat().st_size
        self.done.append(Shard(path.name, len(index), size, sha256_file(path)))


def _write_bad(path: Path, bad: list[dict[str, str]]) -> None:
    table = pa.Table.from_pylist(sorted(bad, key=lambda row: row["key"]), BAD_SCHEMA)
    write_with(path, lambda temporary: pq.write_table(table, temporary))


def _stopped(
    bad: list[dict[str, str]], seen: int, total: int, max_bad_fraction: float, directory: Path
) -> DataError:
    listing = directory.with_name(f"{directory.name}.{BAD_NAME}")
    _write_bad(listing, bad)
    of = f"{total}" if seen == total else f"the first {seen} of {total}"
    first = ", ".join(f"{row['key']} ({row['reason'].split(':')[0]})" for row in bad[:3])
    which = f"{len(bad)} of {of} images cannot be used: {first}{', ...' * (len(bad) > 3)}"
    return too_many_bad(which, listing, max_bad_fraction)


def too_many_bad(which: str, listing: Path, max_bad_fraction: float) -> DataError:
    return DataError(
        f"{which}; all are listed in {listing}",
        f"at most data.max_bad_fraction={max_bad_fraction} of them",
        "repair or remove them, or raise data.max_bad_fraction",
    )


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
