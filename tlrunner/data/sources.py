"""Where images come from: a URI becomes keys, labels, and a way to read each image's bytes.

sample:flowers            drawn by tlrunner itself
DIR with manifest.json    shards, already prepared
DIR/CLASS/**/IMAGE        an ImageFolder; classes are numbered in the order of their names
DIR/IMAGE                 unlabelled images, where those are of use
LIST.csv, LIST.jsonl      paths and labels (`listing`); local or s3://
FILE.parquet, DIR         Parquet files with images in them (`foreign`); local or s3://. In a
                          directory that holds images as well, it is the images that count
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from tlrunner.config import CACHE_DIR
from tlrunner.data import sample
from tlrunner.data.cache import NodeCache
from tlrunner.data.dataset import Dataset, open_dataset, verify_shards
from tlrunner.data.fetch import open_store
from tlrunner.data.folders import holds_images, open_folder
from tlrunner.data.foreign import open_tables
from tlrunner.data.listing import LIST_EXTENSIONS, open_list
from tlrunner.data.manifest import MANIFEST_NAME, SPLITS, UNFINISHED_NAME
from tlrunner.data.source import Source, unlabelled
from tlrunner.data.tables import local_tables, s3_tables
from tlrunner.errors import DataError
from tlrunner.files import sha256_json
from tlrunner.uris import local_path

__all__ = ["Source", "open_source", "shards_at", "unlabelled"]

_KINDS = (
    "sample:flowers, an ImageFolder directory (DIR/CLASS/IMAGE), a directory or s3:// prefix of"
    " shards or Parquet files, a .csv or .jsonl list, a .parquet file"
)


def open_source(uri: str, *, labelled: bool = True, cache_dir: str | Path = CACHE_DIR) -> Source:
    """List the samples behind a URI, without reading their images.

    `labelled`: refuse images that have no class; without it they are taken, with label -1.
    `cache_dir`: where Parquet files from S3 go, and copies of images that lie compressed in one.

    Raises:
        DataError: nothing usable is there.
        StorageError: it is in S3, and that cannot be read.
    """
    scheme, colon, name = uri.partition(":")
    if scheme == "sample" and colon:
        return _open_sample(uri, name)
    with _reading(uri):
        if scheme == "s3" and name.startswith("//"):
            return _open_s3(uri, labelled, cache_dir)
        path = _local_path(uri)
        if path.is_dir():
            return _open_directory(uri, path, labelled, cache_dir)
        if path.name.lower().endswith(LIST_EXTENSIONS):
            return open_list(uri, labelled=labelled)
        if path.name.lower().endswith(".parquet"):
            tables = local_tables(path.parent, [path])
            return open_tables(uri, tables, labelled=labelled, spool_dir=cache_dir)
        raise DataError(f"{uri} is a file", _KINDS, "give a list, or the directory that holds it")


def shards_at(uri: str) -> Path | str | None:
    """The directory, or the s3:// URI, if it holds shards; None for every other source.

    Raises:
        DataError: there is nothing.
        StorageError: it is in S3, and that cannot be read.
    """
    if uri.startswith("sample:"):
        return None
    with _reading(uri):
        if uri.startswith("s3://"):
            return uri if _holds_shards(uri) else None
        root = _local_path(uri)
        return root if (root / MANIFEST_NAME).is_file() else None


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Turn what the system refuses into an error about the data."""
    try:
        yield
    except OSError as err:
        raise DataError(
            f"{err.filename or uri} cannot be read: {err.strerror or err}",
            "",
            "check the path and its permissions",
        ) from err


def _local_path(uri: str) -> Path:
    """The file or directory that a path or file:// URI names."""
    scheme, separator, _ = uri.removeprefix("file://").partition("://")
    if separator:
        raise DataError(f"data.uri is '{uri}': unknown scheme {scheme}://", _KINDS)
    if uri in ("", "file://") or "\0" in uri:
        raise DataError(f"data.uri is {uri!r}", _KINDS)
    place = local_path(uri)
    if not place.exists():
        raise DataError(f"{uri} does not exist", _KINDS, _similar_path(place))
    return place


def _open_sample(uri: str, name: str) -> Source:
    if name != "flowers":
        raise DataError(f"data.uri is '{uri}'", "sample:flowers", "did you mean sample:flowers?")
    each = range(sample.NUM_PER_CLASS)
    pairs = [(label, i) for label in range(len(sample.CLASS_NAMES)) for i in each]
    return Source(
        uri=uri,
        class_names=sample.CLASS_NAMES,
        keys=[f"{sample.CLASS_NAMES[label]}/{i:04d}.jpg" for label, i in pairs],
        labels=[label for label, _ in pairs],
        fingerprint=sha256_json([uri, sample.VERSION]),
        num_bytes=0,
        read=lambda i: sample.draw_jpeg(*pairs[i]),
    )


def _open_directory(uri: str, root: Path, labelled: bool, cache_dir: str | Path) -> Source:
    if (root / MANIFEST_NAME).is_file():
        return _open_shards(root, labelled, cache_dir)
    if (root / UNFINISHED_NAME).is_file():
        raise _unfinished(uri)
    if not holds_images(root):
        tables = local_tables(root, root.rglob("*"))
        if tables:
            return open_tables(uri, tables, labelled=labelled, spool_dir=cache_dir)
    return open_folder(uri, root, labelled)


def _open_s3(uri: str, labelled: bool, cache_dir: str | Path) -> Source:
    if uri.lower().endswith(LIST_EXTENSIONS):
        return open_list(uri, labelled=labelled)
    if _holds_shards(uri):
        return _open_shards(uri, labelled, cache_dir)
    if open_store(uri).size(UNFINISHED_NAME) is not None:
        raise _unfinished(uri)
    tables = s3_tables(uri, cache_dir)
    if tables:
        return open_tables(uri, tables, labelled=labelled, spool_dir=cache_dir)
    raise DataError(
        f"{uri} holds neither shards (manifest.json) nor .parquet files",
        "shards, Parquet files, or a .csv or .jsonl list, in S3",
        "for single images in S3 write a list of them (path,label), or prepare them once to shards"
        " with jobs/prepare_images.py",
    )


def _holds_shards(uri: str) -> bool:
    """Whether a manifest is there; not asked of a name that says otherwise: it may be denied."""
    is_file = uri.lower().endswith((*LIST_EXTENSIONS, ".parquet"))
    return not is_file and open_store(uri).size(MANIFEST_NAME) is not None


def _open_shards(where: str | Path, labelled: bool, cache_dir: str | Path) -> Source:
    """Shards as a source: what is known of their rows now, keys and images once they are read."""
    kept = NodeCache(local_path(cache_dir) / "node")
    known = open_dataset(where, kept, streamed=True)
    if labelled and not known.class_names:
        raise unlabelled(str(where))
    lock = Lock()

    @cache
    def opened() -> Dataset:
        verify_shards(where)
        return open_dataset(where, kept)

    def read(i: int) -> bytes:
        with lock:  # or each thread that comes first would open them
            dataset = opened()
        return dataset.image_bytes(i)

    says = ("", *SPLITS[1:])
    return Source(
        uri=str(where),
        class_names=known.class_names,
        keys=_Keys(known),
        labels=known.labels_N.tolist(),
        fingerprint=known.manifest.sha256,
        num_bytes=known.manifest.num_bytes,
        read=read,
        splits=[says[split] for split in known.splits_N] if known.splits_N.any() else (),
    )


def _unfinished(uri: str) -> DataError:
    return DataError(
        f"{uri} holds shards that were not written to their end",
        "shards with manifest.json",
        "the command that began them continues them",
    )


class _Keys(Sequence[str]):
    """A data set's keys, which are read with the first of them."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: Any) -> Any:
        return self._dataset.keys[i]


def _similar_path(path: Path) -> str:
    parent = path.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {parent / close[0]}?" if close else "check the path"
