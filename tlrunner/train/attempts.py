"""What became of each start of a trial: `attempts.jsonl`, a line for each thing that happened.

A start that is followed by none of the others ended with its process.
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from tlrunner.files import append_line
from tlrunner.stored import parse_stored, whole_lines
from tlrunner.train.place import Place

ATTEMPTS = "attempts.jsonl"
What = Literal["started", "halted", "failed", "stalled"]


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
    append_line(trial.path / ATTEMPTS, json.dumps(asdict(Attempt(event, step, error))))
    trial.save(trial.path / ATTEMPTS)


def read_attempts(trial: Place) -> list[Attempt]:
    path = trial.path / ATTEMPTS
    return [parse_stored(Attempt, line, path) for line in whole_lines(path)]


def is_hopeless(attempts: list[Attempt], max_failures: int) -> bool:
    """Whether a trial that failed would do so again.

    It has failed more often than it may, or twice in the same way behind the same step.
    """
    failures = [a for a in attempts if a.event in ("failed", "stalled")]
    return len(failures) > max_failures or failures[-1:] == failures[-2:-1]
