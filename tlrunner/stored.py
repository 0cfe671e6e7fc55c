"""State that is read back: JSON of a known kind, none of which is believed before it is checked.

What lies on a disk or in S3 may be torn, from another version, or meant to do harm. Every kind is
a dataclass, a config or a container of them, and pydantic, which runs no code of a file's, says
whether a file holds one.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tlrunner.configfile import shown
from tlrunner.errors import StorageError

T = TypeVar("T")

FINITE = ConfigDict(allow_inf_nan=False)  # as `__pydantic_config__` of a dataclass
MAX_BYTES = 64 << 20  # of one file; a search of ten thousand trials stays far below


def read_stored(kind: type[T], path: Path) -> T:
    """What a JSON file of tlrunner's says.

    Raises:
        StorageError: absent, unreadable, too large, or not of that kind.
    """
    return parse_stored(kind, stored_bytes(path), path)


def parse_stored(kind: type[T], text: bytes, where: object) -> T:
    """The same of bytes; `where` names them in errors."""
    try:
        found: T = _adapter(kind).validate_json(text)  # type: ignore[arg-type]  # it is hashable
    except ValidationError as err:
        fault = err.errors(include_url=False)[0]
        valid = fault["msg"].removeprefix("Input should be ")
        if fault["type"] == "json_invalid":
            raise not_as_written(where, valid, "JSON") from None
        place = ".".join(map(str, fault["loc"])) or "all of it"
        raise not_as_written(where, f"{place} is {shown(fault['input'])}", valid) from None
    return found


def stored_bytes(path: Path) -> bytes:
    """A small file of tlrunner's, whole.

    Raises:
        StorageError: absent, unreadable, or too large.
    """
    try:
        check_size(path.stat().st_size, path)
        return path.read_bytes()
    except OSError as err:
        raise StorageError(
            f"{path} cannot be read: {err.strerror or err}",
            "",
            "check the path and its permissions",
        ) from err


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that end; none if there is no file.

    Raises:
        StorageError: unreadable, or too large.
    """
    text = stored_bytes(path) if path.exists() else b""
    return text[: text.rfind(b"\n") + 1].splitlines()


def check_size(num_bytes: int, where: object) -> None:
    if num_bytes > MAX_BYTES:
        raise not_as_written(where, f"{num_bytes:,} bytes", f"at most {MAX_BYTES:,}")


def not_as_written(where: object, found: str, valid: str) -> StorageError:
    """The one line about a file that tlrunner did not write so."""
    return StorageError(
        f"{where} cannot be read: {found}",
        valid,
        "restore it from a copy, or remove what it belongs to and run again",
    )


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
