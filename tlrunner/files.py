"""Files that are either whole or absent.

Whatever tlrunner leaves behind is written under a temporary name, flushed to the disk, and renamed;
a reader never meets half a file. Used by every layer that writes.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tlrunner.errors import UnavailableError


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value that is hashed: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_text(text: str) -> str:
    return sha256_bytes(text.encode())


def sha256_json(value: Any) -> str:
    return sha256_text(canonical_json(value))


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Create `path` by calling `write` on a temporary neighbour, then renaming it.

    Raises:
        StorageError: the place cannot be written (denied, full, gone). Nothing is left there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as err:
        raise cannot_write(path, err) from err
    finally:
        with suppress(OSError):  # where it cannot be written, there is nothing to be removed either
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_with(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Indented JSON in the order given; NaN and infinity are refused, not written."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """One more line, on the disk when this returns; what a kill left of a line gives way to it.

    Raises:
        StorageError: the place cannot be written.
    """
    try:
        with path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as err:
        raise cannot_write(path, err) from err


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file lock, which the system gives back however this process ends.

    Raises:
        StorageError: the lock's directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
    except OSError as err:
        raise cannot_write(path, err) from err
    with file:
        yield


def _open_locked(path: Path) -> IO[str]:
    while True:
        file = path.open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # who held it before removed it


def cannot_write(path: Path, err: OSError) -> UnavailableError:
    return UnavailableError(
        f"{path} cannot be written: {err.strerror or err}",
        "a directory with free space that this user may write to",
        "choose another place with --out or --set data.cache_dir=DIR",
    )
