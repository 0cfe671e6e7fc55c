"""The one process that writes a run: how it takes the run, keeps it, and gives it back.

On one machine a file lock keeps two starts apart, which goes with the process that holds it. For a
run in S3 there is a lease, too, among its objects, that its holder renews. A start that finds one
watches on its own monotonic clock whether it changes: clocks of two machines can be a day apart. It
need not where the lock names that lease: its holder was here, and has let go of the lock. Each
holder's number is one higher than that of the last, see `place.Fence`.
"""

import fcntl
import json
import logging
import math
import os
import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from io import FileIO
from threading import Event, Thread
from typing import NamedTuple

from tlrunner.data.s3 import Patience, S3Store
from tlrunner.errors import InterruptedRun, StorageError
from tlrunner.files import cannot_write, write_json
from tlrunner.stored import read_stored
from tlrunner.train.place import LEASE, Fence, Place, bad_lease, taken_over

RENEW_SECONDS = 5.0
LEASE_SECONDS = 20.0  # a holder that was silent for so long has died
SETTLE_SECONDS = 0.5  # for two writes at once to come out, where a store takes both

log = logging.getLogger("tlrunner")


@dataclass
class Lease:
    """A run that this process holds.

    Args:
        seconds: for which it may not have been renewed, and still is relied on.

    Attributes:
        lost: what became of it once another has the run.
        renewed_at: on the monotonic clock.
    """

    fence: Fence
    seconds: float = math.inf
    lost: InterruptedRun | None = None
    renewed_at: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """To be asked before each commit of the holder's own.

        Raises:
            InterruptedRun: another process has taken over the run, or may have.
            StorageError: the lease cannot be read.
        """
        if self.lost:
            raise self.lost
        if time.monotonic() - self.renewed_at > self.seconds:
            raise InterruptedRun(
                f"the lease of run {self.fence.run} could not be renewed for {self.seconds:.0f} s",
                "",
                "the same command continues it",
            )
        self.fence.check()


@contextmanager
def held(
    run: Place, *, renew_seconds: float = RENEW_SECONDS, lease_seconds: float = LEASE_SECONDS
) -> Iterator[Lease]:
    """Be the one process that writes this run.

    Args:
        lease_seconds: several times as long as `renew_seconds`; the same for all starts.

    Raises:
        InterruptedRun: another process writes it.
        StorageError: the lease cannot be read or written.
    """
    with _locked_here(run) as lock:
        if run.uri is None:
            yield _taken_here(run)
            return
        former = _given_up(run, lock.last_token, renew_seconds, lease_seconds)
        slot = _Slot(run, honours_conditions(run))
        if not slot.is_conditional:
            log.warning(
                "%s is in a store without conditional writes: a start on another machine at the "
                "same moment may not be kept out",
                run,
            )
        claim = Claim((former.claim.fence if former else 0) + 1, _myself(), lock.token)
        etag = slot.replace(former.etag if former else None, claim)
        if etag is None:
            winner = slot.read()
            raise _is_written(run, winner.claim.holder if winner else "another process")
        keeping = _Keeping(slot, Seen(claim, etag), renew_seconds, lease_seconds)
        keeping.start()
        try:
            yield keeping.lease
        finally:
            keeping.give_back()


class _Lock(NamedTuple):
    """Tokens of leases, as the file that is locked has them: this holder's and the last one's."""

    token: str
    last_token: str


@contextmanager
def _locked_here(run: Place) -> Iterator[_Lock]:
    """Be the one process of this machine; the system lets go however the process ends."""
    path = run.path.with_name(f".{run.path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+", buffering=0)
    except OSError as err:
        raise cannot_write(path, err) from err
    with file:
        try:
            lock = _locked(file, run)
        except OSError as err:
            raise cannot_write(path, err) from err
        yield lock


def _locked(file: FileIO, run: Place) -> _Lock:
    is_held = False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_held = True
    file.seek(0)
    holder, _, last_token = file.read().decode(errors="replace").partition("\n")
    if is_held:
        raise _is_written(run, holder or "another process")
    lock = _Lock(secrets.token_hex(16), last_token)
    file.truncate(0)
    file.write(f"{_myself()}\n{lock.token}".encode())
    return lock


@dataclass(frozen=True)
class _Former:
    fence: int


def _taken_here(run: Place) -> Lease:
    """The lease of a local run, whose lock this process holds."""
    path = run.path / LEASE
    former = read_stored(_Former, path).fence if path.exists() else 0
    write_json(path, {"fence": former + 1, "holder": _myself()})
    return Lease(Fence(run, former + 1))


# -- Runs in S3 ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What a lease says. `token`: nobody else's; `renewals`: counted, so that it changes."""

    fence: int
    holder: str
    token: str
    renewals: int = 0
    released: bool = False


class Seen(NamedTuple):
    claim: Claim
    etag: str


@dataclass(frozen=True)
class _Slot:
    """The object that is a run's lease."""

    run: Place
    is_conditional: bool = True
    patience: Patience = Patience()  # noqa: RUF009  (it is frozen)

    @property
    def store(self) -> S3Store:
        store = self.run.store
        assert isinstance(store, S3Store), "a local run has a lock"
        return replace(store, patience=self.patience)

    def read(self) -> Seen | None:
        try:
            content, etag = self.store.read_version(LEASE)
            return Seen(Claim(**json.loads(content)), etag)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as err:
            raise bad_lease(self.run) from err

    def replace(self, etag: str | None, claim: Claim) -> str | None:
        """Write a claim over the lease of this ETag, None for no lease. None if it is another."""
        content = json.dumps(asdict(claim)).encode()
        if self.is_conditional:
            return self.store.put_if(LEASE, content, etag=etag)
        before = self.read()
        if (before.etag if before else None) != etag:
            return None
        self.store.write(LEASE, content)
        time.sleep(SETTLE_SECONDS)
        after = self.read()
        return after.etag if after and after.claim == claim else None


class _Keeping(Thread):
    """Renews a lease until it is given back or lost."""

    def __init__(self, slot: _Slot, mine: Seen, renew_seconds: float, lease_seconds: float) -> None:
        super().__init__(name="tlrunner-lease", daemon=True)
        # soon again, rather than for long
        patience = Patience(attempts=3, timeout_seconds=renew_seconds, longest_pause_seconds=1.0)
        self.slot = replace(slot, patience=patience)
        self.mine, self.renew_seconds = mine, renew_seconds
        self.lease = Lease(Fence(slot.run, mine.claim.fence), lease_seconds)
        self.is_over = Event()

    def run(self) -> None:
        while not (self.is_over.wait(self.renew_seconds) or self.lease.lost):
            try:
                self._say(released=False)
            except StorageError as err:
                log.debug("%s", err)

    def give_back(self) -> None:
        self.is_over.set()
        self.join()
        if self.lease.lost:
            return
        try:
            self._say(released=True)
        except StorageError as err:
            log.warning("the next start of %s waits a moment: %s", self.slot.run, err)

    def _say(self, *, released: bool) -> None:
        """Write our claim once more, or find that it is ours no longer."""
        claim = replace(self.mine.claim, renewals=self.mine.claim.renewals + 1, released=released)
        asked_at = time.monotonic()
        etag, found = self.slot.replace(self.mine.etag, claim), None
        if etag is None:  # also where an attempt that seemed to fail was a success
            found = self.slot.read()
            if found and found.claim.token == claim.token:
                etag = self.slot.replace(found.etag, claim)
        if etag:
            self.mine, self.lease.renewed_at = Seen(claim, etag), asked_at
        else:
            holder = found.claim.holder if found else "whoever removed its lease"
            self.lease.lost = taken_over(self.slot.run, holder)


def honours_conditions(run: Place) -> bool:
    """Whether the store refuses to write over an object that was not to be there: it is tried."""
    store, name = _Slot(run).store, f".probe-{secrets.token_hex(8)}"
    store.write(name, b"first")
    try:
        return store.put_if(name, b"second", etag=None) is None
    except StorageError:  # some stores refuse what they do not know
        return False
    finally:
        store.delete(name)


def _given_up(
    run: Place, last_token: str, renew_seconds: float, lease_seconds: float
) -> Seen | None:
    """The lease as its last holder left it; None if there was none.

    Args:
        last_token: of the holder that was here before, and is no more.

    Raises:
        InterruptedRun: its holder lives.
    """
    slot = _Slot(run)
    first = slot.read()
    if first is None or first.claim.released or first.claim.token == last_token:
        return first
    log.info("%s was not given back by %s: looking if that lives", run, first.claim.holder)
    since = time.monotonic()
    while time.monotonic() - since < lease_seconds:
        time.sleep(renew_seconds / 5)
        asked_at = time.monotonic()
        now = slot.read()
        if now is None or now.claim.released:
            return now
        if now.etag != first.etag:
            raise _is_written(run, now.claim.holder)
        if time.monotonic() - asked_at > renew_seconds:
            since = time.monotonic()  # what kept us from the store may keep the holder from it
    return first


def _myself() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _is_written(run: Place, holder: str) -> InterruptedRun:
    return InterruptedRun(
        f"run '{run.path.name}' is being written by {holder}",
        "",
        "wait for it, or choose another --name",
    )
