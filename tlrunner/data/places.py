"""Where a single image lies, as lists and tables of images write it: a local path or an S3 object.

A place is an absolute local path or `s3://BUCKET/KEY`.
"""

import errno
import os
import posixpath
import re
import stat
from pathlib import Path

from tlrunner.data.fetch import open_store

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def place_of(written: str, base: str) -> str:
    """The place that a path means.

    `written`: absolute, relative to `base`, file:// or s3://. `base`: a local directory or an S3
    prefix.

    Raises:
        ValueError: it means none; the message says why.
    """
    if "\0" in written or not _is_text(written):
        raise ValueError(f"{written!r} is no path: it has characters that no path has")
    scheme = _SCHEME.match(written)
    if scheme and scheme[0].lower() not in ("file://", "s3://"):
        raise ValueError(f"{written!r} has a scheme that is neither file:// nor s3://")
    if scheme and scheme[0].lower() == "s3://":
        return _object("s3://" + written[len(scheme[0]) :], written)
    if scheme:
        written, base = f"/{written[len(scheme[0]) :]}", "/"
    if base.startswith("s3://") and not written.startswith("/"):
        bucket, _, prefix = base.removeprefix("s3://").partition("/")
        key = posixpath.normpath(posixpath.join("/", prefix, written)).lstrip("/")
        return _object(f"s3://{bucket}/{key}", written)
    # without following links, and a hundred times faster than Path
    path = os.path.normpath(os.path.join(base, written))  # noqa: PTH118
    return f"/{path.lstrip('/')}"  # POSIX keeps two slashes at the front


def read_place(place: str) -> bytes:
    """The bytes at a place.

    Raises:
        OSError: they cannot be had: absent, denied, no file.
        StorageError: the store that holds them cannot be reached, or refuses.
    """
    if not place.startswith("s3://"):
        return read_file(place)
    bucket, _, key = place.removeprefix("s3://").partition("/")
    try:
        return open_store(f"s3://{bucket}").read(key)
    except FileNotFoundError as err:
        raise FileNotFoundError(errno.ENOENT, "there is no such object", place) from err


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file; a pipe or a device, which could go on for ever, is refused.

    Raises:
        OSError: it cannot be read, or is no such file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or opening a pipe would wait
    with open(descriptor, "rb") as file:  # noqa: PTH123  (of a descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def file_facts(place: str | Path) -> tuple[int, int]:
    """Size in bytes and time of change of a local file; zeros for S3 and for what is not there."""
    if str(place).startswith("s3://"):
        return 0, 0
    try:
        found = os.stat(place)  # noqa: PTH116  (a million of them)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _object(place: str, written: str) -> str:
    bucket, _, key = place.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise ValueError(f"{written!r} names no object (s3://BUCKET/KEY)")
    return place


def _is_text(written: str) -> bool:
    try:
        written.encode()
    except UnicodeEncodeError:
        return False
    return True
