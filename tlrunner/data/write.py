"""Any source of images -> Parquet shards with a manifest, in a directory or below an S3 prefix.

Rows are shuffled once, by hash of their keys. Each shard is written to a temporary file, read back,
hashed, and renamed or uploaded once. `unfinished.json` says after each of them how far the writing
came, so that the same call continues a broken one; `manifest.json` takes its place at the end. The
same call after that finds it done.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tlrunner.data.dataset import load_manifest
from tlrunner.data.decode import BadImage, StoredImage, normalise
from tlrunner.data.fetch import open_store
from tlrunner.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    UNFINISHED_NAME,
    VERSION,
    Manifest,
    Shard,
    parse_shard,
    to_json,
)
from tlrunner.data.order import epoch_order, limit_rows, sample_ids
from tlrunner.data.shardfile import ShardFile
from tlrunner.data.shrink import shrunk
from tlrunner.data.source import Source
from tlrunner.data.store import LocalStore, Store
from tlrunner.data.threads import map_ahead
from tlrunner.errors import DataError, StorageError
from tlrunner.files import cannot_write, locked, sha256_json
from tlrunner.machine import num_cpus
from tlrunner.stored import not_as_written, parse_stored

_WRITING = ".writing"
MADE_NAME = "made_from.json"  # what a finished data set was made from
BAD_NAME = "bad_images.parquet"
BAD_SCHEMA = pa.schema([(name, pa.string()) for name in ("source", "key", "reason", "sha256")])
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 64 << 20, 192 << 20
FEW_SHARDS = 8  # a small data set is cut into about this many, to be fetched side by side
_SAMPLE_OF_BAD = 100  # bad images after which a hopeless data set is not read any further

Progress = Callable[[int, int], None]
Row = tuple[int, "StoredImage | dict[str, str]"]


@dataclass(frozen=True)
class WriteSettings:
    """What decides the bytes of shards, beside their source.

    `limit`: that many samples, stratified by class. `max_side`: larger images are scaled down to
    it, in pixels. `max_pixels`: larger images are bad.
    """

    limit: int | None = None
    max_side: int | None = None
    max_pixels: int = 50_000_000
    seed: int = 0


@dataclass
class _Done:
    """What is finished of a data set."""

    num_seen: int = 0  # samples, bad ones included, in the order of writing
    shards: list[Shard] = field(default_factory=list)
    counts: dict[str, list[int]] = field(default_factory=dict)
    bad: list[dict[str, str]] = field(default_factory=list)


@dataclass
class _Noted:
    """How far a data set came, in words of JSON; the identity alone of one that is whole."""

    identity: str
    num_seen: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, list[int]] = field(default_factory=dict)
    bad: list[dict[str, str]] = field(default_factory=list)


def write_shards(
    source: Source,
    target: str | Path,
    settings: WriteSettings | None = None,
    *,
    max_bad_fraction: float = 0.01,
    progress: Progress | None = None,
) -> Manifest:
    """Write a source's images as shards into `target`, which must be absent, empty, or unfinished.

    `progress(done, total)` is called per image.

    Raises:
        DataError: too many images cannot be used. `TARGET.bad_images.parquet` lists them.
        StorageError: the target cannot be written. What is finished stays, to be continued.
    """
    store = open_store(str(target))
    with _place_to_write(store) as scratch:
        writing = _Writing(source, settings or WriteSettings(), store, scratch, max_bad_fraction)
        try:
            return writing.run(progress)
        except OSError as err:  # pyarrow's I/O errors are OSErrors too
            raise cannot_write(Path(store.uri), err) from err


@contextmanager
def _place_to_write(store: Store) -> Iterator[Path]:
    """A directory for files that are not whole yet; where a rename will do, beside the others."""
    if not isinstance(store, LocalStore):
        with tempfile.TemporaryDirectory(prefix="tlrunner-write-") as scratch:
            yield Path(scratch)
        return
    root, scratch_dir = store.root, store.root / _WRITING
    lock = root / f"{_WRITING}.lock"
    with locked(lock):
        try:
            shutil.rmtree(scratch_dir, ignore_errors=True)  # what a killed writer left
            scratch_dir.mkdir(parents=True)
        except OSError as err:
            raise cannot_write(root, err) from err
        try:
            yield scratch_dir
        finally:
            shutil.rmtree(scratch_dir, ignore_errors=True)
            lock.unlink(missing_ok=True)
            with suppress(OSError):
                root.rmdir()  # only where nothing was finished


@dataclass
class _Writing:
    """One data set on its way from a source to a store."""

    source: Source
    settings: WriteSettings
    store: Store
    scratch: Path
    max_bad_fraction: float

    def run(self, progress: Progress | None) -> Manifest:
        self.identity = sha256_json([VERSION, self.source.fingerprint, asdict(self.settings)])
        found = self._begun()
        if isinstance(found, Manifest):
            return found
        done = found
        order = _shuffled(self.source, self.settings.limit, self.settings.seed)
        allowed = int(self.max_bad_fraction * len(order))
        rows = _normalised(self.source, order[done.num_seen :], self.settings)
        try:
            self._note(done)
            while done.num_seen < len(order):
                self._write_shard(rows, done, len(order), progress, max(allowed, _SAMPLE_OF_BAD))
        except BaseException:
            if not done.shards:  # nothing to continue
                with suppress(StorageError, OSError):
                    self.store.delete(UNFINISHED_NAME)
            raise
        if len(done.bad) > allowed or len(done.bad) == len(order):
            raise self._stopped(done, len(order))
        return self._finish(done)

    def _begun(self) -> "_Done | Manifest":
        """What an earlier call with the same source and settings finished, in part or in whole."""
        names = {e.name for e in self.store.list() if not e.name.startswith(_WRITING)}
        if not names:
            return _Done()
        noted = next((name for name in (MADE_NAME, UNFINISHED_NAME) if name in names), None)
        if noted is None:
            raise StorageError(
                f"{self.store.uri} holds something already", "", "choose another name"
            )
        where = f"{self.store.uri}/{noted}"
        found = parse_stored(_Noted, self.store.read(noted), where)
        if found.identity != self.identity:
            raise StorageError(
                f"{self.store.uri} was begun from other images or with other settings",
                "the images and settings that it was begun with",
                "choose another name, or delete it",
            )
        if MANIFEST_NAME in names:
            self.store.delete(UNFINISHED_NAME)
            return load_manifest(self.store)
        try:
            shards = [parse_shard(shard) for shard in found.shards]
        except (KeyError, TypeError, ValueError) as err:
            raise not_as_written(where, f"{type(err).__name__}: {err}", "shards") from err
        absent = {shard.path for shard in shards} - names
        if absent:
            raise StorageError(
                f"{self.store.uri} has lost {min(absent)}, which was finished", "", "delete it"
            )
        return _Done(found.num_seen, shards, found.counts, found.bad)

    def _write_shard(
        self,
        rows: Iterator[Row],
        done: _Done,
        total: int,
        progress: Progress | None,
        most_bad: int,
    ) -> None:
        """One more shard; with it goes what was found to be bad on the way."""
        shard = ShardFile(self.scratch / f"shard-{len(done.shards):05d}.parquet")
        enough = min(MAX_SHARD_BYTES, max(MIN_SHARD_BYTES, self.source.num_bytes // FEW_SHARDS))
        try:
            for i, image in rows:
                done.num_seen += 1
                if isinstance(image, StoredImage):
                    split = self.source.splits[i] if self.source.splits else ""
                    shard.add(self.source.keys[i], self.source.labels[i], split, image)
                else:
                    done.bad.append(image)
                    if len(done.bad) > most_bad:
                        raise self._stopped(done, total)
                if progress:
                    progress(done.num_seen, total)
                if shard.num_bytes >= enough:
                    break
            self._keep(shard, done)
        except BaseException:
            shard.abandon()
            raise

    def _keep(self, file: ShardFile, done: _Done) -> None:
        num_classes = len(self.source.class_names)
        if file.num_bytes:
            shard, index = file.finish(num_classes)
            for number in np.unique(index["split"]):
                chosen = index["label"][index["split"] == number]
                counts = np.bincount(chosen[chosen >= 0], minlength=num_classes)
                before = done.counts.get(SPLITS[number], [0] * num_classes)
                done.counts[SPLITS[number]] = (counts + before).tolist()
            for name in (shard.index_path, shard.path):
                self.store.put(name, self.scratch / name)
            done.shards.append(shard)
        self._note(done)

    def _note(self, done: _Done) -> None:
        """Say how far it came, so that the same call goes on from there."""
        self._put_text(UNFINISHED_NAME, json.dumps({"identity": self.identity, **asdict(done)}))

    def _finish(self, done: _Done) -> Manifest:
        if done.bad:
            self._put_bad(self.store, BAD_NAME, done.bad)
        manifest = Manifest(
            version=VERSION,
            class_names=self.source.class_names,
            shards=tuple(done.shards),
            num_images=sum(shard.num_rows for shard in done.shards),
            num_bad=len(done.bad),
            counts={name: tuple(counts) for name, counts in sorted(done.counts.items())},
        )
        # beside the manifest, which is to be the same wherever the same images came from
        self._put_text(MADE_NAME, json.dumps({"identity": self.identity}))
        self._put_text(MANIFEST_NAME, to_json(manifest))
        self.store.delete(UNFINISHED_NAME)
        return manifest

    def _stopped(self, done: _Done, total: int) -> DataError:
        """Too many bad images: list them, and leave no half data set."""
        for shard in done.shards:
            self.store.delete(shard.index_path)
            self.store.delete(shard.path)
        self.store.delete(UNFINISHED_NAME)
        parent, _, name = self.store.uri.rpartition("/")
        listing = f"{name}.{BAD_NAME}"
        self._put_bad(open_store(parent or "/"), listing, done.bad)
        of = f"{total}" if done.num_seen == total else f"the first {done.num_seen} of {total}"
        first = ", ".join(f"{row['key']} ({row['reason'].split(':')[0]})" for row in done.bad[:3])
        more = ", ..." if len(done.bad) > 3 else ""
        which = f"{len(done.bad)} of {of} images cannot be used: {first}{more}"
        return too_many_bad(which, f"{parent}/{listing}", self.max_bad_fraction)

    def _put_text(self, name: str, text: str) -> None:
        path = self.scratch / name
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.store.put(name, path)

    def _put_bad(self, store: Store, name: str, bad: list[dict[str, str]]) -> None:
        path = self.scratch / BAD_NAME
        table = pa.Table.from_pylist(sorted(bad, key=lambda row: row["key"]), BAD_SCHEMA)
        pq.write_table(table, path)
        store.put(name, path)


def _shuffled(source: Source, limit: int | None, seed: int) -> list[int]:
    """Sample numbers in the order they are written."""
    ids, labels = sample_ids(source.keys), np.asarray(source.labels, np.int64)
    rows = limit_rows(ids, labels, limit)
    return [int(row) for row in rows[epoch_order(ids[rows], seed, 0)]]


def _normalised(source: Source, order: list[int], settings: WriteSettings) -> Iterator[Row]:
    """Each sample's image, or what is wrong with it, in order; read and checked by threads."""

    def one(i: int) -> Row:
        data = b""
        try:
            data = source.read(i)
            return i, shrunk(normalise(data, settings.max_pixels), settings.max_side)
        except (BadImage, OSError) as err:
            reason = str(err) if isinstance(err, BadImage) else f"unreadable: {err.strerror or err}"
            digest = hashlib.sha256(data).hexdigest()
            facts = {"source": source.uri, "key": source.keys[i]}
            return i, facts | {"reason": reason, "sha256": digest}

    num_threads = min(8, num_cpus())
    return map_ahead(one, order, num_threads, ahead=3 * num_threads)


def too_many_bad(which: str, listing: str, max_bad_fraction: float) -> DataError:
    return DataError(
        f"{which}; all are listed in {listing}",
        f"at most data.max_bad_fraction={max_bad_fraction} of them",
        "repair or remove them, or raise data.max_bad_fraction",
    )
