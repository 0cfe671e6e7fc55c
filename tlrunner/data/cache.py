"""What a node keeps on its disk for all trials: fetched shards and decoded images, within a limit.

A file is named by what it must hold, so it is never replaced, only made or evicted. One process
makes it, under a lock that the system gives back however the process ends, while others that want
it wait; it gets its name once it is whole. Who uses a file holds a shared lock on it, and so only
those that nobody uses are evicted, the least recently used first.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tlrunner.errors import StorageError
from tlrunner.files import cannot_write, locked

MOST_BYTES = 200 * 10**9
_NEW = ".new"


@dataclass(frozen=True)
class NodeCache:
    """Files in `directory`, together at most `limit_bytes`.

    `limit_bytes`: None is a third of what is free, and of what the cache has already; at most
    200 GB.
    """

    directory: Path
    limit_bytes: int | None = None

    @property
    def limit(self) -> int:
        """The limit in bytes as things are now."""
        if self.limit_bytes is not None:
            return self.limit_bytes
        there = next(d for d in (self.directory, *self.directory.parents) if d.is_dir())
        free = shutil.disk_usage(there).free
        return min((free + self._used()) // 3, MOST_BYTES)

    def hold(self, name: str, num_bytes: int, make: Callable[[Path], None]) -> int:
        """A descriptor of the file `name`, made first if it is not there.

        The file is not evicted as long as the descriptor is open; closing it is the caller's.

        Args:
            num_bytes: size of the file, which room is made for.
            make: writes the file at a path, into the `num_bytes` zeros that are there already.

        Raises:
            StorageError: no room within the limit, or on the disk; or the file has another size.
        """
        path = self.directory / name
        held = _held(path)
        if held is not None:
            if (found := os.fstat(held).st_size) != num_bytes:
                os.close(held)
                raise StorageError(f"{path} has {found} bytes", str(num_bytes), "remove it")
            return held
        self._exists()
        with locked(self.directory / f"{name}.lock"):
            held = _held(path)  # another process may just have made it
            return self._made(path, num_bytes, make) if held is None else held

    def _made(self, path: Path, num_bytes: int, make: Callable[[Path], None]) -> int:
        new = path.with_name(path.name + _NEW)
        try:
            with self._reserved(new, num_bytes):
                make(new)
                held = _held(new)  # before it has its name, or another process might evict it
                assert held is not None, f"{new} was not made"
                with self._locked():
                    new.replace(path)
                return held
        except OSError as err:
            raise cannot_write(path, err) from err

    @contextmanager
    def _reserved(self, new: Path, num_bytes: int) -> Iterator[None]:
        """`new` takes its room at once, so that no two makers are promised the same."""
        try:
            with self._locked():
                new.unlink(missing_ok=True)
                self._make_room(num_bytes, new.name)
                with new.open("wb") as file:
                    _allocate(file.fileno(), num_bytes)
            yield
        finally:
            new.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int, wanted: str) -> None:
        """Remove files until there is room for so many bytes."""
        limit = self.limit
        if num_bytes <= limit:
            for path in sorted(self._files(), key=_worth):
                if self._used() + num_bytes <= limit:
                    return
                _remove_unused(path)
        used = self._used()
        if used + num_bytes > limit:
            raise StorageError(
                f"the cache {self.directory} has no room for {num_bytes:,} bytes "
                f"({wanted.removesuffix(_NEW)}): of its limit of {limit:,} bytes, {used:,} are in "
                "use",
                "",
                "raise data.cache_bytes or free some disk; training can also stream "
                "(data.streaming=on)",
            )

    def _locked(self) -> AbstractContextManager[None]:
        """Nobody else changes which files there are; or a count of them might miss one."""
        return locked(self.directory / "evict.lock")

    def _files(self) -> list[Path]:
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        return [path for path in found if path.suffix != ".lock"]

    def _used(self) -> int:
        return sum(stat.st_size for stat in map(_stat, self._files()) if stat)

    def _exists(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise cannot_write(self.directory, err) from err


def _allocate(descriptor: int, num_bytes: int) -> None:
    """Take room on the disk now, where the system knows how; OSError if there is none."""
    if num_bytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:
        os.ftruncate(descriptor, num_bytes)


def _held(path: Path) -> int | None:
    """A descriptor with a shared lock on a file; None where there is none."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        except OSError as err:
            raise cannot_write(path, err) from err
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            os.utime(descriptor)  # used just now
            return descriptor
        os.close(descriptor)  # evicted between the two


def _remove_unused(path: Path) -> None:
    """Remove a file, unless somebody uses or makes it."""
    lock = path if path.suffix != _NEW else path.with_suffix(".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR)  # NFS locks only what may be written to
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _worth(path: Path) -> tuple[bool, int]:
    """Leftovers of killed makers go first, then what was used longest ago."""
    stat = _stat(path)
    return path.suffix != _NEW, stat.st_mtime_ns if stat else 0
