"""From a URI to a store or a file: `open_store`, `download` in ranges, `fetch` once and for all."""

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tlrunner.data.s3 import S3Store
from tlrunner.data.store import LocalStore, Part, Store, unreachable
from tlrunner.errors import StorageError
from tlrunner.files import sha256_file, write_with
from tlrunner.machine import num_cpus
from tlrunner.uris import local_path

RANGE_BYTES = 8 << 20
_PLACES = "a path, file://PATH or s3://BUCKET/KEY"
_BUCKET = re.compile(r"[A-Za-z0-9._-]+")


def open_store(uri: str) -> LocalStore | S3Store:
    """The store at a path, file:// or s3:// URI; nothing is looked at yet.

    Raises:
        StorageError: another scheme, or no bucket.
    """
    if "://" not in uri or uri.startswith("file://"):
        return LocalStore(local_path(uri))
    bucket, prefix = _split_s3(uri)
    return S3Store(bucket, prefix.strip("/"))


def download(store: Store, name: str, path: Path, parts: Iterable[Part]) -> None:
    """Write ranges of a file to their places in `path`, which may hold others of them already.

    Raises:
        FileNotFoundError, StorageError: see `Store.read`.
        OSError: `path` cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)

    def one(part: Part) -> None:
        _write_at(descriptor, store.read(name, part), part.start)

    num_checking = num_cpus()  # threads whose connection rests while they hash and write
    pool = ThreadPoolExecutor(num_threads() + num_checking, thread_name_prefix="tlrunner-fetch")
    try:
        for _ in pool.map(one, parts):
            pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        os.close(descriptor)


def num_threads() -> int:
    """Requests under way at once, for one file: enough to hide latency, no more than CPUs serve."""
    return min(32, 4 * num_cpus())


def ranges(num_bytes: int) -> list[Part]:
    """A whole file in ranges of 8 MiB."""
    starts = range(0, num_bytes, RANGE_BYTES)
    return [Part(start, min(RANGE_BYTES, num_bytes - start)) for start in starts]


def fetch(uri: str, cache_dir: str | Path, sha256: str | None = None) -> Path:
    """A local path to the file that a URI names; S3 objects are downloaded once.

    `sha256`: hex digest that the file must have.

    Raises:
        StorageError: it cannot be had, or is not the file that was meant.
    """
    if "://" in uri and not uri.startswith("file://"):
        return _fetch_s3(uri, local_path(cache_dir), sha256)
    path = local_path(uri)
    if not path.is_file():
        raise StorageError(f"{path} is not a file", _PLACES, "check the path")
    _check_digest(uri, path, sha256)
    return path


def _fetch_s3(uri: str, cache_dir: Path, sha256: str | None) -> Path:
    bucket, key = _split_s3(uri)
    prefix, _, name = key.rpartition("/")
    if not name:
        raise StorageError(f"'{uri}' names no object", "s3://BUCKET/KEY")
    store = S3Store(bucket, prefix)
    head = store.head(name)
    if head is None:
        raise unreachable(uri, "there is no such object")
    num_bytes, etag = head
    # an object that is replaced gets another ETag, and so another place here
    version = hashlib.sha256(f"{uri}\n{etag}".encode()).hexdigest()[:32]
    path = cache_dir / "fetched" / version / name

    def write(temporary: Path) -> None:
        try:
            download(replace(store, etag=etag), name, temporary, ranges(num_bytes))
        except FileNotFoundError:
            raise unreachable(uri, "it was removed while it was read") from None
        _check_digest(uri, temporary, sha256)

    if not path.is_file():
        write_with(path, write)
    else:
        _check_digest(uri, path, sha256)
    return path


def _check_digest(uri: str, path: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    found = sha256_file(path)
    if found != sha256.lower():
        raise StorageError(
            f"'{uri}' has SHA-256 {found}", sha256, "check that the URI names the right file"
        )


def _split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key of s3://BUCKET/KEY; the key may be empty."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3":  # only the scheme is repeated: addresses can hold passwords and signatures
        raise StorageError(f"'{scheme}://' is no place", _PLACES)
    if ":" in bucket or "@" in bucket:
        raise StorageError(
            "an s3:// URI has more than a bucket before its first slash",
            "s3://BUCKET/KEY",
            "give credentials as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or as AWS_PROFILE",
        )
    if not _BUCKET.fullmatch(bucket):
        raise StorageError(f"'{uri}' names no bucket", "s3://BUCKET/KEY")
    return bucket, key


def _write_at(descriptor: int, content: bytes, start: int) -> None:
    """Write all of it: a single call may write less, and does before a disk is full."""
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, start)
        rest, start = rest[written:], start + written
