"""Files in a directory or below an S3 prefix, behind the same verbs: list, read, put, delete.

`fetch.open_store` gives one from a URI; `s3` holds the other kind.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tlrunner.configfile import shown
from tlrunner.errors import StorageError
from tlrunner.files import cannot_write, write_with


def no_check() -> None:
    """Called where nothing is to be asked."""


@dataclass(frozen=True)
class Entry:
    """A file in a store: its name below the store's URI, and its size."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class Part:
    """A range of a file, and the SHA-256 its bytes must have where that is known."""

    start: int
    num_bytes: int
    sha256: str | None = None


class Store(Protocol):
    """A directory or an S3 prefix. Names are relative to it, with `/` between their parts.

    Every method raises StorageError where the store cannot be reached or refuses, and `read`
    raises FileNotFoundError where the file does not exist.
    """

    @property
    def uri(self) -> str: ...

    def list(self) -> list[Entry]:
        """Every file at any depth, by name."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        ...

    def read(self, name: str, part: Part | None = None) -> bytes:
        """A range of a file, all of it by default."""
        ...

    def put(self, name: str, path: Path, before_again: Callable[[], object] = no_check) -> None:
        """Make the local file `path` the file `name`, whole or not at all; `path` may be moved.

        Before a request that failed is repeated, `before_again` is called, and may raise.
        """
        ...

    def delete(self, name: str, before_again: Callable[[], object] = no_check) -> None:
        """Remove a file; one that is not there is no error. `before_again`: as in `put`."""
        ...


@dataclass(frozen=True)
class LocalStore:
    """A directory."""

    root: Path

    @property
    def uri(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path:
        """Where a file lies, so that it can be read without a copy."""
        return self.root / name

    def list(self) -> list[Entry]:
        found = []
        for path in self.root.rglob("*"):
            name = path.relative_to(self.root).as_posix()
            num_bytes = self.size(name)
            if num_bytes is not None:
                found.append(Entry(name, num_bytes))
        return sorted(found, key=lambda entry: entry.name)

    def size(self, name: str) -> int | None:
        path = self.path(name)
        try:
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:  # removed in between
            return None
        except OSError as err:
            raise _cannot_read(path, err) from err

    def read(self, name: str, part: Part | None = None) -> bytes:
        path = self.path(name)
        try:
            with path.open("rb") as file:
                if part is None:
                    return file.read()
                file.seek(part.start)
                content = file.read(part.num_bytes)
        except FileNotFoundError:
            raise
        except OSError as err:
            raise _cannot_read(path, err) from err
        if not is_right(content, part):
            raise unreachable(str(path), WRONG_BYTES)
        return content

    def put(self, name: str, path: Path, before_again: Callable[[], object] = no_check) -> None:
        target = self.path(name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.stat().st_dev != target.parent.stat().st_dev:
                write_with(target, lambda copy: shutil.copyfile(path, copy))
                return
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(target)
        except OSError as err:
            raise cannot_write(target, err) from err

    def delete(self, name: str, before_again: Callable[[], object] = no_check) -> None:
        path = self.path(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as err:
            raise cannot_write(path, err) from err


def check_name(name: str, uri: str) -> None:
    """Check that a name found in a store is that of a file below a directory.

    Raises:
        StorageError: it leads elsewhere.
    """
    if "\0" in name or {"", ".", ".."} & set(name.split("/")):
        raise StorageError(
            f"{uri} holds {shown(name)}, which is no path below it",
            "names without empty parts, . and ..",
            "remove that object",
        )


WRONG_BYTES = "its bytes are not those that were written"


def is_right(content: bytes, part: Part | None) -> bool:
    """Whether bytes are those of a part, as far as is known of it."""
    if part is None:
        return True
    if len(content) != part.num_bytes:
        return False
    return part.sha256 is None or part.sha256 == hashlib.sha256(content).hexdigest()


def unreachable(uri: str, why: str, kind: type[StorageError] = StorageError) -> StorageError:
    """The one line about a place that cannot be used."""
    if uri.startswith("s3://"):
        valid = "a place that the AWS settings in the environment may use"
        return kind(
            f"'{uri}' cannot be read or written: {why}",
            valid,
            "check the URI, the credentials, the region and the endpoint",
        )
    return kind(f"'{uri}' cannot be read: {why}", "", "check the path and its permissions")


def _cannot_read(path: Path, err: OSError) -> StorageError:
    return unreachable(str(path), err.strerror or type(err).__name__)
