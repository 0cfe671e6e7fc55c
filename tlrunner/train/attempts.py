"""What became of each start of a trial: `attempts.jsonl`, a line for each thing that happened.

A start that is followed by none of the others ended with its process.

A search takes a trial before it looks where that stands: the process of a node that died can live
on for some seconds, and would else write beside the one that goes on. What it still writes then is
refused, see `Turn`.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

from tlrunner.errors import InterruptedRun
from tlrunner.files import append_line, cannot_write, write_text
from tlrunner.stored import parse_stored, whole_lines
from tlrunner.train.place import Guard, Place

ATTEMPTS = "attempts.jsonl"
What = Literal["taken", "started", "halted", "failed", "stalled"]


@dataclass(frozen=True)
class Attempt:
    """`step`: of the checkpoint that the trial started from, or halted behind; 0 without one."""

    event: What
    step: int
    error: str = ""


def note_attempt(trial: Place, event: What, step: int, error: str = "") -> None:
    """One more line, on the disk when this returns.

    Raises:
        StorageError: it cannot be written.
        InterruptedRun: another process has taken over the run.
    """
    trial.checked_fence()
    try:
        trial.path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(trial.path, err) from err
    append_line(trial.path / ATTEMPTS, json.dumps(asdict(Attempt(event, step, error))))
    trial.save(trial.path / ATTEMPTS)


def read_attempts(trial: Place) -> list[Attempt]:
    path = trial.path / ATTEMPTS
    return [parse_stored(Attempt, line, path) for line in whole_lines(path)]


@dataclass(frozen=True)
class Turn:
    """The fence of one of those who took a trial, one after the other, within a run.

    Args:
        run: the fence of the run.
        place: the trial's directory.
        turn: which one it is, counted from 1.
    """

    run: Guard | None
    place: Place
    turn: int

    @property
    def number(self) -> int | None:
        return self.run.number if self.run else None

    def check(self) -> None:
        """Ask the trial's attempts, and the run's lease.

        Raises:
            InterruptedRun: a later one has taken the trial, or another process the run.
        """
        if self.run:
            self.run.check()
        if _num_taken(self.place) > self.turn:
            raise InterruptedRun(
                f"trial {self.place.path.name} was started again elsewhere",
                "",
                "that start goes on with it",
            )


def take(trial: Place) -> Place:
    """The directory of a trial for the one who writes it from here on; no one before does.

    Raises:
        StorageError: it cannot be read or written.
        InterruptedRun: another process has taken over the run.
    """
    if trial.uri:  # what others wrote there, to be added to
        write_text(trial.path / ATTEMPTS, _kept(trial).decode())
    note_attempt(trial, "taken", 0)
    return replace(trial, fence=Turn(trial.fence, trial, _num_taken(trial)))


def _num_taken(trial: Place) -> int:
    return _kept(trial).count(b'{"event": "taken"')


def _kept(trial: Place) -> bytes:
    try:
        return trial.store.read(ATTEMPTS)
    except FileNotFoundError:
        return b""


def is_hopeless(attempts: list[Attempt], max_failures: int) -> bool:
    """Whether a trial that failed would do so again.

    It has failed more often than it may, or twice in the same way behind the same step.
    """
    failures = [a for a in attempts if a.event in ("failed", "stalled")]
    return len(failures) > max_failures or failures[-1:] == failures[-2:-1]
