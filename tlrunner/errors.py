"""What can go wrong for a user, and the exit code each kind ends a job with.

    TlrunnerError
    ├── ConfigError      64   a config value or flag that cannot be used
    ├── DataError        65   images or shards that cannot be used
    ├── ResourceError    69   the machine or cluster cannot satisfy the request
    ├── StorageError     73   a place that cannot be read or written
    │   └── UnavailableError      not now, but perhaps later
    └── InterruptedRun   75   stopped from outside; the same command continues

A user error is one line: the value found, the valid set, the remedy. A broken invariant of the
program is an `assert`, never one of these.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TlrunnerError(Exception):
    """An error a user can act on. Its three parts survive pickling between processes.

    Args:
        found: the value found and where, e.g. "freeze.num_stages is 12, resnet50 has 5 stages".
        valid: the values that would have been accepted.
        remedy: what to do about it.
    """

    exit_code = 70

    def __init__(self, found: str, valid: str = "", remedy: str = "") -> None:
        super().__init__(found, valid, remedy)
        self.found, self.valid, self.remedy = found, valid, remedy

    def __str__(self) -> str:
        valid = f"valid: {self.valid}" if self.valid else ""
        text = "; ".join(part for part in (self.found, valid, self.remedy) if part)
        return " ".join(text.split())  # one line, whatever the values found contain


class ConfigError(TlrunnerError):
    exit_code = 64


class DataError(TlrunnerError):
    exit_code = 65


class ResourceError(TlrunnerError):
    exit_code = 69


class StorageError(TlrunnerError):
    exit_code = 73


class UnavailableError(StorageError):
    """Of a place that may be used again later: a full disk, a store that does not answer."""


class InterruptedRun(TlrunnerError):  # noqa: N818  (not a fault of anybody's)
    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy that names the known names closest to `name`; empty if none is close."""
    close = get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else ""
