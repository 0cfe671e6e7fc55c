"""What a person sees while a search runs: one live table, or a plain line per epoch in a log."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tlrunner.config import TrialConfig
from tlrunner.errors import StorageError
from tlrunner.jobconfig import JobConfig
from tlrunner.train.attempts import read_attempts
from tlrunner.train.place import CHECKPOINTS, Place
from tlrunner.train.trial_dir import State, TrialDir, TrialRecord
from tlrunner.tune.members import Members, as_member
from tlrunner.tune.schedule import num_last
from tlrunner.tune.space import PlannedTrial
from tlrunner.tune.trainable import planned_trial

STATE_STYLES = {"running": "cyan", "completed": "green", "stopped": "yellow"}
MOST_DEATHS = 4  # of a trial's process in a row, before the last one
MAX_ROWS = 30  # of the live table: what does not fit a screen cannot be followed


@dataclass
class Row:
    """One trial as the table shows it."""

    planned: PlannedTrial
    values: dict[str, Any]  # of Ray's trial, that the plan was made from
    state: str = "running"
    epoch: int = 0
    val_acc: float | None = None  # of the best epoch so far
    seconds: float = 0.0
    deaths: int = 0  # of its process, since
    step: int = 0  # of the latest checkpoint that it started from

    def cells(self) -> list[str]:
        config = self.planned.config
        return [
            self.planned.trial_id,
            config.backbone.name,
            str(config.freeze),
            f"{self.epoch}/{config.train.epochs}",
            "" if self.val_acc is None else f"{self.val_acc:.4f}",
            f"{self.seconds:.0f}",
            self.state,
        ]


class NoOtherLines(TrialProgressCallback):  # type: ignore[misc]  # ray is not typed
    """In the place of Ray's own, which tells of trials without a result whatever `verbose` is."""

    def on_trial_complete(self, *_: Any, **info: Any) -> None: ...

    def log_result(self, *_: Any, **info: Any) -> None: ...


class Progress(tune.Callback):  # type: ignore[misc]  # ray is not typed
    """Follows the trials of a search and records in its directory how each of them ended."""

    def __init__(
        self,
        job: JobConfig,
        trials: Place,
        num_trials: int | None,
        console: Console,
        is_halted: Callable[[], bool],
        members: Members | None = None,
    ) -> None:
        """`members`: of the search's population, if it has one."""
        self.job, self.members = job, members
        self.is_halted = is_halted
        self.trials = trials
        self.num_trials = num_trials
        self.console = console
        self.rows: dict[str, Row] = {}
        self.error: StorageError | None = None  # what ended the search; Ray wraps it in its own
        self.started = time.monotonic()
        self.live = Live(
            console=console, get_renderable=self._table, auto_refresh=console.is_terminal
        )

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray saves a copy of callbacks; a terminal cannot be saved and need not be

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def has_error(self) -> bool:
        """Whether the search cannot go on."""
        return self.error is not None

    def config_of(self, trial: Any) -> TrialConfig:
        """The config of Ray's trial as it is now."""
        return self._row(trial).planned.config

    def trial_id_of(self, trial: Any) -> str:
        """Our name of Ray's trial as it is now."""
        return self._row(trial).planned.trial_id

    def has_failed(self, trial: Any) -> bool:
        """Whether a trial that ended has failed."""
        return self._row(trial).state == "failed"

    def record_of(self, ray_id: str) -> TrialRecord | None:
        """What a trial that ended left, by Ray's id of it; None if it never began."""
        if ray_id not in self.rows:
            return None
        directory = self._directory(self.rows[ray_id])
        return directory.read() if directory.has_begun else None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts, goes on, or goes on as a copy of another."""
        self._follow(trial).state = "running"

    def _follow(self, trial: Any) -> Row:
        """The row of what Ray's trial now stands for."""
        row = self._row(trial)
        if trial.config != row.values:
            planned = planned_trial(self.job, trial.config)
            assert planned.copied, "only a copy changes what a trial is"
            donor, epoch = planned.copied
            if self.members:
                self.members.become(as_member(trial.config))
            self._directory(row).end(
                "stopped", f"gave way to a copy of {donor} after epoch {epoch}"
            )
            row.planned, row.values = planned, trial.config
        return row

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        row = self._row(trial)
        if result["epoch"] <= row.epoch:
            return  # told again, behind a start from a checkpoint
        row.epoch, row.seconds = result["epoch"], result["seconds"]
        row.val_acc = max(row.val_acc or 0.0, result["val_acc"])
        if row.epoch < row.planned.config.train.epochs:  # the last one is said with the end
            self._say(row)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended with an error that may pass, or its process died; Ray starts it again.

        What dies again and again without a checkpoint in between is given up, at its next death.
        """
        row = self._row(trial)
        attempts = read_attempts(self._directory(row).place)
        step = max((attempt.step for attempt in attempts), default=0)
        row.deaths = row.deaths + 1 if step <= row.step else 1
        told = attempts[-1:] and attempts[-1].error
        row.step, row.state = step, f"starts again: {told or 'its process died'}"
        trial.max_failures = 0 if row.deaths >= MOST_DEATHS else -1
        self._say(row)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self._row(trial)
        try:
            directory = self._directory(row)
            row.state = state_of(directory)
            if row.state == "interrupted" and not self.is_halted():  # the scheduler ended it
                row.state = "stopped"
                directory.end("stopped")
                if not num_last(self.job) and not directory.place.uri:  # else at the search's end
                    directory.keep_weights()
        except StorageError as err:  # were it raised, Ray would start the trial again
            self.error = err
        self._say(row)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self._follow(trial)  # a copy may fail before it starts
        directory = self._directory(row)
        row.state = state_of(directory)
        # Ray tells, too, of a process that died before it took a trial, which then starts elsewhere
        # or is lost.
        if row.state == "interrupted" and trial.max_failures == 0:
            row.state = "failed"
            self._record_death(directory, row.planned)
        self._say(row)

    def _directory(self, row: Row) -> TrialDir:
        """A trial's directory as its worker, perhaps on another node, left it."""
        directory = TrialDir(self.trials.below(row.planned.trial_id))
        try:
            directory.place.fetch(without=CHECKPOINTS)
        except StorageError as err:
            self.error = err
            raise
        return directory

    def _row(self, trial: Any) -> Row:
        """A trial whose worker cannot even start ends without having started."""
        if trial.trial_id not in self.rows:
            planned = planned_trial(self.job, trial.config)
            self.rows[trial.trial_id] = Row(planned, trial.config)
        return self.rows[trial.trial_id]

    def _record_death(self, directory: TrialDir, planned: PlannedTrial) -> None:
        """A trial whose process was killed could not say so itself."""
        try:
            directory.give_up(planned.config, "its process died or could not start")
        except StorageError as err:
            self.error = err
            raise

    def _say(self, row: Row) -> None:
        if not self.console.is_terminal:
            trial, backbone, strategy, epoch, val_acc, seconds, state = row.cells()
            self.console.print(
                f"trial {trial}  {backbone}  {strategy}  epoch {epoch}  "
                f"best val_acc {val_acc or '-'}  {seconds} s  {state}",
                soft_wrap=True,
                highlight=False,
            )

    def _table(self) -> RenderableType:
        table = Table("trial", "backbone", "strategy", "epoch", "val_acc", "seconds", "state")
        rows = sorted(self.rows.values(), key=lambda row: row.state != "running")
        for row in rows[:MAX_ROWS]:
            table.add_row(*row.cells(), style=STATE_STYLES.get(row.state, "red"))
        ended = sum(row.state != "running" for row in rows)
        best = max((row for row in rows if row.val_acc), key=lambda r: r.val_acc or 0, default=None)
        best_text = f", best {best.val_acc:.4f} ({best.planned.trial_id})" if best else ""
        hidden = f", {len(rows) - MAX_ROWS} not shown" if len(rows) > MAX_ROWS else ""
        seconds = time.monotonic() - self.started
        total = "" if self.num_trials is None else f" of {self.num_trials}"
        text = f"{ended}{total} trials ended, {seconds:.0f} s{best_text}{hidden}"
        return Group(table, Text(text))


def state_of(directory: TrialDir) -> State:
    """How a trial stands by its directory, also where its process could not even begin it."""
    return directory.read().state if directory.has_begun else "interrupted"
