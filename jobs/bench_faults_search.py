"""One search under fire, for `bench_faults.py`: its command, and what is to be seen of it.

Nothing here asks the program what it did: a search is a command that prints lines and ends with a
code, and a run's directory that is read as anybody could read it, in S3 past the faults. What was
promised and is not so is noted in a `Verdict`, against the latest fault.
"""

import csv
import hashlib
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_faults_ground import LOOK_SECONDS, MARK, ROOT, processes, ray_warnings
from bench_faults_verdict import (
    END,
    FALSE,
    HANG,
    LATE,
    LOST,
    REDONE,
    TWICE,
    StoppedError,
    Verdict,
    worst,
)

from tlrunner.data.fetch import open_store
from tlrunner.errors import StorageError

JOB = ROOT / "jobs" / "tune_flowers.py"
HANG_SECONDS = 60.0
LINGER_SECONDS = 3.0  # that a trial may go on for when its search was killed
TOLERANCE_SECONDS = 5.0  # for a checkpoint to be written, on a machine that does more
CALL = re.compile(r'File "(.+)", line (\d+) in (\w+)')
COMMITTED = re.compile(r"(?P<trial>[^/]+)/checkpoints/(?P<step>\d+)-\d+/COMMIT\.json")
# How a command may end by itself behind a fault, beside with 0: the same command goes on.
STORAGE, INTERRUPTED = 73, 75
ENDS = {
    "sigterm": {INTERRUPTED},
    "head": set(range(1, 256)),
    "storage": {STORAGE, INTERRUPTED},
    "disk": {STORAGE, INTERRUPTED},
}


@dataclass
class Seen:
    """A trial as its directory showed it so far."""

    commits: set[str] = field(default_factory=set)  # names of all there ever were
    committed_at: dict[int, float] = field(default_factory=dict)  # step -> when first seen
    present: int = 0  # step of the newest checkpoint there is
    metrics: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)
    started_at: float = 0.0
    at_fault: int = 0  # step of the newest checkpoint when the latest fault came
    was_training: bool = False  # then, and did not start since
    done: tuple[bytes, int] | None = None  # metrics and number of starts, when it was told as done

    @property
    def newest(self) -> int:
        return max(self.committed_at, default=0)

    @property
    def newest_at(self) -> float:
        return self.committed_at.get(self.newest, -math.inf)


class Search:
    """A search, from its first start to its last.

    Args:
        uri: of the run's directory.
        environment: of its processes, the mark among it.
        directory: for its config and what it prints.
    """

    def __init__(
        self,
        uri: str,
        tree: Mapping[str, Any],
        environment: dict[str, str],
        directory: Path,
        verdict: Verdict,
    ) -> None:
        self.uri, self.environment, self.verdict = uri, environment, verdict
        self.directory = directory
        parent, _, name = uri.rpartition("/")
        config = directory / "config.json"
        config.write_text(json.dumps(tree))
        flags = ["--config", str(config), "--out", parent, "--name", name]
        self.num_trials = tree["search"]["budget"]["num_trials"]
        self.num_epochs = tree["train"]["epochs"]
        self.checkpoint_seconds = tree["train"]["checkpoint_seconds"]
        self.command = [sys.executable, str(JOB), *flags]
        self.kind = "none"
        self.fault_at = self.over_at = self.moved_at = self.born_at = time.monotonic()
        self.num_starts = 0
        self.broken: list[str] = []  # promises
        self.is_killed = False  # from here, so that its end is no news
        self.outputs: dict[int, tuple[Path, float]] = {}  # of each process, and when it began
        self.trials: dict[str, Seen] = {}
        self.texts: dict[str, tuple[int, bytes]] = {}
        self.num_printed = 0
        self.process = self.start()

    # -- Its processes -----------------------------------------------------------------------------
    def start(self, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
        """One more start of the command, whose process is given."""
        self.num_starts += 1
        self.moved_at, self.is_killed = time.monotonic(), False
        path = self.directory / f"output-{self.num_starts}.txt"
        with path.open("wb") as output:
            process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment | dict(environment or {}),
                start_new_session=True,
            )
        self.outputs[process.pid] = path, self.moved_at
        return process

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.is_killed = True

    def _end_where_it_is(self) -> str:
        """Kill a command that hangs; gives the calls it was in, and what Ray said meanwhile."""
        num_bytes = len(self._output())
        running = processes(MARK, self.environment[MARK]).values()
        titles = ", ".join(sorted(title for title in running if title.startswith("ray::")))
        self.process.send_signal(signal.SIGABRT)  # prints the stacks of its threads
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.kill()
        said = ray_warnings(self.environment, HANG_SECONDS)
        told = self._output()[num_bytes:].decode(errors="replace")
        stack = told.partition("Current thread")[2].partition("\n\n")[0]
        calls = [f"{Path(path).name}:{line} {name}" for path, line, name in CALL.findall(stack)]
        return "".join(f"\n    {line}" for line in [" < ".join(calls), titles, *said] if line)

    def pids(self, title: str) -> list[int]:
        """Of this search's processes with something in their command line."""
        found = processes(MARK, self.environment[MARK])
        return sorted(pid for pid, command in found.items() if title in command)

    def last_line(self) -> str:
        lines = self._output().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing was printed"

    def _output(self) -> bytes:
        return self.outputs[self.process.pid][0].read_bytes()

    # -- Looking -----------------------------------------------------------------------------------
    def note(self, promise: str, text: str) -> None:
        text = f"{self.uri.rpartition('/')[2]}: {text}"
        self.broken.append(f"{promise}: {text}")
        self.verdict.broken.append((self.kind, promise, text))

    def wait(self, until: Callable[[], bool], seconds: float = math.inf) -> bool:
        """Look until something is so; gives False where the driver or the time ended before."""
        deadline = time.monotonic() + seconds
        while not self.verdict.is_over.is_set():
            was_running = self.is_running
            self.look()
            if until():
                return True
            if not was_running or time.monotonic() > deadline:
                return False
            if time.monotonic() - self.moved_at > HANG_SECONDS:
                text = f"nothing new for {HANG_SECONDS:.0f} s after {self.last_line()!r}"
                self.note(HANG, f"{text}{self._end_where_it_is()}")
                return False
            time.sleep(LOOK_SECONDS)
        raise StoppedError

    def look(self) -> None:
        """See what is new in the run's directory and in what is printed."""
        now = time.monotonic()
        store = open_store(f"{self.uri}/trials")
        names = {}
        try:
            names = {entry.name: entry.num_bytes for entry in store.list()}
            for name, num_bytes in names.items():
                if name.endswith(".jsonl") and self.texts.get(name, (-1,))[0] != num_bytes:
                    self.texts[name] = (num_bytes, store.read(name))
        except (OSError, StorageError):  # changed just now: the next look sees it whole
            return
        for trial_id in {name.partition("/")[0] for name in names}:
            trial = self.trials.setdefault(trial_id, Seen())
            commits = {}
            for name in names:
                if (found := COMMITTED.fullmatch(name)) and found["trial"] == trial_id:
                    commits[name] = int(found["step"])
            self._see_commits(trial_id, trial, commits, now)
            self._see_events(trial_id, trial, now)
            self._see_metrics(trial_id, trial)
        if (num_printed := len(self._output())) != self.num_printed:
            self.num_printed, self.moved_at = num_printed, now

    def _see_commits(self, trial_id: str, trial: Seen, commits: dict[str, int], now: float) -> None:
        newest = trial.newest
        for name in commits.keys() - trial.commits:
            self.moved_at = now
            if commits[name] < newest:  # the same one again is that of an epoch's last step
                self._redone(trial, f"{name} was written behind step {newest}", commits[name])
            trial.committed_at.setdefault(commits[name], now)
        trial.commits |= commits.keys()
        present = max(commits.values(), default=0)
        if present < trial.present and not (trial.done or self._is_told(trial_id)):
            text = f"of trial {trial_id} step {trial.present} is gone, the newest is {present}"
            self._redone(trial, text, present)
        trial.present = present

    def _see_events(self, trial_id: str, trial: Seen, now: float) -> None:
        text = self.texts.get(f"{trial_id}/attempts.jsonl", (0, b""))[1]
        events = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
        for event in events[len(trial.events) :]:
            self.moved_at = now
            if event["event"] != "started":
                continue
            if event["step"] < trial.at_fault:
                text = f"trial {trial_id} went on from step {event['step']} with {trial.at_fault}"
                self._redone(trial, text, event["step"])
            if trial.was_training:
                saved_at = trial.committed_at.get(event["step"], now)
                worst(self.verdict.redone_seconds, self.kind, self.fault_at - saved_at)
            trial.started_at, trial.was_training = now, False
        trial.events = events

    def _see_metrics(self, trial_id: str, trial: Seen) -> None:
        text = self.texts.get(f"{trial_id}/metrics.jsonl", (0, b""))[1]
        text = text[: text.rfind(b"\n") + 1]
        if text != trial.metrics:
            self.moved_at = time.monotonic()
            epochs = [json.loads(line)["epoch"] for line in text.splitlines()]
            if epochs != list(range(1, len(epochs) + 1)):
                self.note(TWICE, f"trial {trial_id} tells epochs {epochs}")
        trial.metrics = text
        num_starts = sum(event["event"] == "started" for event in trial.events)
        if trial.done and trial.done != (text, num_starts):
            self.note(TWICE, f"trial {trial_id} was told as done, and started again")
            trial.done = None
        if self._is_told(trial_id):
            trial.done = (text, num_starts)

    def _is_told(self, trial_id: str) -> bool:
        text = self.texts.get(f"{trial_id}/metrics.jsonl", (0, b""))[1]
        return text.count(b"\n") == self.num_epochs

    def _redone(self, trial: Seen, text: str, step: int) -> None:
        """A trial went on from before its newest checkpoint; it is told once."""
        self.note(REDONE, text)
        worst(self.verdict.redone_steps, self.kind, trial.newest - step)
        trial.committed_at = {s: at for s, at in trial.committed_at.items() if s <= step}
        trial.at_fault = min(trial.at_fault, step)

    # -- What is promised --------------------------------------------------------------------------
    def training(self) -> list[str]:
        """The trials that left a checkpoint since the latest fault was over, and did not end."""
        since = max(self.over_at, self.outputs[self.process.pid][1]) + LINGER_SECONDS
        return [
            trial_id
            for trial_id, trial in self.trials.items()
            if not trial.done and trial.newest_at > max(since, trial.started_at)
        ]

    def trains(self, since: float, starts_anew: bool) -> bool:
        """Whether a trial left a checkpoint since then; one that started since, if one has to."""
        _, begun_at = self.outputs[self.process.pid]
        started_at = max(begun_at + LINGER_SECONDS, self.fault_at if starts_anew else 0.0)
        return any(
            trial.started_at > started_at and trial.newest_at > max(since, trial.started_at)
            for trial in self.trials.values()
        )

    @property
    def num_done(self) -> int:
        return sum(trial.done is not None for trial in self.trials.values())

    @property
    def is_done(self) -> bool:
        return self.num_done == self.num_trials

    def strike(self, kind: str) -> None:
        """A fault comes now: what is there now is not to be lost."""
        training, now = self.training(), time.monotonic()
        self.kind = kind
        self.verdict.faults[kind] += 1
        for trial_id in training:
            age = now - self.trials[trial_id].newest_at
            worst(self.verdict.checkpoint_age, kind, age)
            if age > self.checkpoint_seconds + TOLERANCE_SECONDS:
                self.note(LATE, f"the newest of trial {trial_id} was {age:.1f} s old at the fault")
        for trial_id, trial in self.trials.items():
            trial.at_fault, trial.was_training = trial.newest, trial_id in training
        self.fault_at = self.moved_at = now

    def has_ended(self) -> bool:
        """Judge how the driver ended; gives whether the search is at its end."""
        code = self.process.wait()
        self.look()
        if code == 0:
            self._check_success()
            return True
        if code in (2, 3):
            self.note(LOST, f"exit code {code}: {self._failures()}")
        elif not self.is_killed and code not in ENDS.get(self.kind, ()):
            self.note(END, f"exit code {code}: {self.last_line()}")
        if open_store(self.uri).size("_SUCCESS") is not None:
            self.note(FALSE, f"_SUCCESS is there behind exit code {code}")
        return False

    def _check_success(self) -> None:
        """Everything that `_SUCCESS` names reads back, and nothing is missing."""
        store = open_store(self.uri)
        try:
            vouched = json.loads(store.read("_SUCCESS"))
            best = json.loads(store.read("best/COMMIT.json"))
            vouched |= {f"best/{name}": facts for name, facts in best.items()}
            for name, facts in vouched.items():
                if hashlib.sha256(store.read(name)).hexdigest() != facts["sha256"]:
                    self.note(FALSE, f"{name} differs from what _SUCCESS says")
            trials = json.loads(store.read("summary.json"))["trials"]
        except (FileNotFoundError, StorageError) as err:
            self.note(FALSE, f"exit code 0, and {err}")
            return
        if trials["completed"] != self.num_trials or not self.is_done:
            self.note(LOST, f"of {self.num_trials} trials {self.num_done} are done: {trials}")

    def _failures(self) -> str:
        """What is told of the trials that failed."""
        rows = csv.DictReader(open_store(self.uri).read("leaderboard.csv").decode().splitlines())
        return ", ".join(f"{r['trial_id']}: {r['detail']}" for r in rows if r["state"] == "failed")
