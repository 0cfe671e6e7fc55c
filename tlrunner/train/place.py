"""A directory of results, and the S3 prefix that has them too, if they are kept there.

Results are always written to a local directory first. With a `uri`, that directory is a working
copy: what is saved is put below the URI, and only then spoken of; where the two differ, the URI is
right.

The directory of a run says in `.lease.json` which process holds it, and that holder's number, which
only grows. Whoever writes for a holder carries its number, a fence, and asks before each write, and
before a file is put once more, if a later holder has come: what a dead driver left running writes
no more.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from tlrunner.data.fetch import RANGE_BYTES, download, open_store, ranges
from tlrunner.data.store import LocalStore, Store, check_name
from tlrunner.data.threads import map_ahead
from tlrunner.errors import InterruptedRun, StorageError, UnavailableError
from tlrunner.files import cannot_write, sha256_text, write_with
from tlrunner.stored import check_size, parse_stored
from tlrunner.uris import local_path

T = TypeVar("T")

CHECKPOINTS = "checkpoints"
LEASE = ".lease.json"
READS = 3  # of what does not read back as it was written, before it is refused


@dataclass(frozen=True)
class Place:
    """`path`: a local directory. `uri`: s3://BUCKET/PREFIX that its files are kept below, or None.

    `fence`: of the holder that writes there, if the place is of a run that is held. Every method
    raises StorageError where the disk or the store fails.
    """

    path: Path
    uri: str | None = None
    fence: "Guard | None" = None

    @property
    def store(self) -> Store:
        """Where a reader finds the files."""
        return open_store(self.uri) if self.uri else LocalStore(self.path)

    def __str__(self) -> str:
        return self.uri or str(self.path)

    def below(self, name: str) -> "Place":
        uri = f"{self.uri}/{name}" if self.uri else None
        return Place(self.path / name, uri, self.fence)

    def checked_fence(self) -> int | None:
        """To be asked before each write: the number of the holder that it is for, if there is one.

        Raises:
            InterruptedRun: another process has taken over the run.
        """
        if not self.fence:
            return None
        self.fence.check()
        return self.fence.number

    def read(self, kind: type[T], name: str) -> T | None:
        """What a JSON file says where it is kept; None if there is none."""
        return read_from(self.store, kind, name)

    def save(self, *files: Path) -> None:
        """Put files of the directory where they are kept, in this order."""
        if self.uri:
            for file in files:
                name = file.relative_to(self.path).as_posix()
                self.store.put(name, file, self.checked_fence)

    def save_directory(self, directory: Path, last: str) -> None:
        """Put every file of a directory, the one called `last` after all others."""
        files = sorted(path for path in directory.iterdir() if path.is_file())
        self.save(*(f for f in files if f.name != last), directory / last)

    def drop(self, file: Path) -> None:
        """Remove one file."""
        file.unlink(missing_ok=True)
        if self.uri:
            self.store.delete(file.relative_to(self.path).as_posix(), self.checked_fence)

    def remove(self, directory: Path, first: str = "") -> None:
        """Remove a directory, the file called `first` before all others."""
        if first:
            (directory / first).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        if self.uri:
            below = directory.relative_to(self.path).as_posix() + "/"
            names = [e.name for e in self.store.list() if e.name.startswith(below)]
            self.checked_fence()  # to list them may have taken long
            for name in sorted(names, key=lambda name: (Path(name).name != first, name)):
                self.store.delete(name, self.checked_fence)

    def fetch(self, *, without: str = "", without_suffix: str = "", last: str = "") -> None:
        """Make the working copy hold just what is kept below the URI; each file whole or absent.

        `without`: leave alone what lies in directories of this name, at any depth.
        `without_suffix`: fetch no file whose name ends so. `last`: files of this name are fetched
        after all others.
        """
        if not self.uri:
            return
        path = self.path
        sizes = {entry.name: entry.num_bytes for entry in self.store.list()}
        for name in sizes:
            check_name(name, self.uri)
        # What begins with a dot is of those who hold the run or try to, and comes and goes.
        sizes = {name: size for name, size in sizes.items() if not name.startswith(".")}
        wanted = [name for name in sizes if without not in name.split("/")[:-1]]
        if without_suffix:
            wanted = [name for name in wanted if not name.endswith(without_suffix)]
        try:
            path.mkdir(parents=True, exist_ok=True)
            for file in [file for file in path.rglob("*") if file.is_file()]:
                name = file.relative_to(path).as_posix()
                if name not in sizes and without not in name.split("/"):
                    file.unlink()
        except OSError as err:
            raise cannot_write(path, err) from err

        def fetch_file(name: str) -> None:
            self._fetch_file(name, sizes[name])

        missing = [name for name in wanted if not self._has_attempt(name, sizes[name])]
        at_once = [n for n in missing if sizes[n] <= RANGE_BYTES and Path(n).name != last]
        for _ in map_ahead(fetch_file, at_once, num_threads=8, ahead=16):
            pass
        # Large files come in ranges, side by side, so one after the other; then the last.
        for name in sorted(set(missing) - set(at_once), key=lambda n: (Path(n).name == last, n)):
            fetch_file(name)

    def check(self, name: str, sha256: str) -> None:
        """Read a file back from where it is kept.

        Raises:
            StorageError: it is not there, or its SHA-256 is another.
        """
        store = self.store
        for _ in range(READS if self.uri else 1):  # a bit may be flipped on the way
            digest = hashlib.sha256()
            for part in ranges(store.size(name) or 0):
                digest.update(store.read(name, part))
            if digest.hexdigest() == sha256:
                return
        raise StorageError(f"{self}/{name} does not read back as it was written")

    def _has_attempt(self, name: str, num_bytes: int) -> bool:
        """Whether a file of a checkpoint, whose names are never used again, is here already."""
        file = self.path / name
        is_attempt = CHECKPOINTS in name.split("/")
        return is_attempt and file.is_file() and file.stat().st_size == num_bytes

    def _fetch_file(self, name: str, num_bytes: int) -> None:
        def write(part: Path) -> None:
            try:
                download(self.store, name, part, ranges(num_bytes))
            except FileNotFoundError as err:
                found = f"{self}/{name} was removed while it was being fetched"
                raise UnavailableError(found) from err

        write_with(self.path / name, write)


def read_from(store: Store, kind: type[T], name: str) -> T | None:
    """What a JSON file in a store says; None if there is none.

    Raises:
        StorageError: too large, or not of that kind.
    """
    where = f"{store.uri}/{name}"
    num_bytes = store.size(name)
    if num_bytes is None:
        return None
    check_size(num_bytes, where)
    return parse_stored(kind, store.read(name), where)


class Guard(Protocol):
    """Who is asked before each write: the fence of a run's holder, or of a trial's within it."""

    @property
    def number(self) -> int | None:
        """Of the run's holder, if the run is held."""
        ...

    @property
    def turn(self) -> int:
        """Which start of a trial it is for, counted from 1; 0 of what is no trial's."""
        ...

    def check(self) -> None:
        """Raises InterruptedRun where another writes there now."""
        ...


@dataclass(frozen=True)
class Fence:
    """Which holder of a run, counted from 1, something is written for.

    A write that was under way as a later holder came is not undone: that one reads what it finds
    and goes on from there.
    """

    run: Place
    number: int
    turn: int = 0

    def check(self) -> None:
        """Ask the run's lease.

        Raises:
            InterruptedRun: a later holder has come.
            StorageError: the lease cannot be read.
        """
        try:
            lease = json.loads(self.run.store.read(LEASE))
            number, holder = int(lease["fence"]), str(lease["holder"])
        except FileNotFoundError:
            return
        except (ValueError, TypeError, KeyError) as err:
            raise bad_lease(self.run) from err
        if number > self.number:
            raise taken_over(self.run, holder)


def taken_over(run: Place, holder: str) -> InterruptedRun:
    return InterruptedRun(
        f"run '{run.path.name}' was taken over by {holder}",
        "",
        "let that process end it, or choose another --name",
    )


def bad_lease(run: Place) -> StorageError:
    return StorageError(f"{run}/{LEASE} is no lease", "", "remove it where nobody writes the run")


def working_copy(uri: str, cache_dir: str | Path) -> Path:
    """The local directory that stands for an S3 prefix on this node."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    return local_path(cache_dir) / "runs" / sha256_text(parent)[:16] / name


def place_at(uri: str, cache_dir: str | Path) -> Place:
    """The place that a path, file:// or s3:// URI names."""
    store = open_store(uri)
    if isinstance(store, LocalStore):
        return Place(store.root)
    return Place(working_copy(store.uri, cache_dir), store.uri)
