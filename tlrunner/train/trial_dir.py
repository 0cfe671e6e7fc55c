"""What one trial leaves behind: `trials/<id>/{config.json, metrics.jsonl, end.json, checkpoints/}`.

`notes.txt` has a line for each thing that a reader of its figures should know.

The trial writes an epoch's line before it reports the epoch, so that no figure is ever shown that
was not saved. A trial that has neither all its epochs nor an end.json was interrupted.
"""

import json
import re
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tlrunner.config import TrialConfig
from tlrunner.errors import StorageError, TlrunnerError
from tlrunner.files import append_line, write_json, write_text
from tlrunner.secrets import redacted
from tlrunner.stored import (
    FINITE,
    not_as_written,
    parse_stored,
    read_stored,
    stored_bytes,
    whole_lines,
)
from tlrunner.train.attempts import note_attempt
from tlrunner.train.checkpoint import (
    COMMIT,
    NAME_PATTERN,
    STATE,
    TRAINING_STATE,
    committed,
    later,
    others,
    read_behind,
    resumable,
    without_training_state,
)
from tlrunner.train.place import CHECKPOINTS, Place

State = Literal["completed", "stopped", "diverged", "failed", "interrupted"]
COPY = re.compile(r"-e([0-9]+)$")  # at the end of its id: the epoch of another that a trial copies


@dataclass(frozen=True)
class EpochReport:
    """The figures of a trial after one more epoch. All are plain Python numbers."""

    __pydantic_config__ = FINITE

    epoch: Annotated[int, Field(ge=1)]  # epochs finished, from 1
    val_acc: float
    val_loss: float
    train_loss: float
    images_per_second: float  # of training, validation aside
    trainable_params: int
    total_params: int
    latency_seconds: float  # for one image, on the device it trains on
    seconds: float  # since the trial began
    # directory name of this epoch's checkpoint, if it has one
    checkpoint: Annotated[str, Field(pattern=NAME_PATTERN)] | None
    fill_seconds: float = 0.0  # so far, of computing what is kept of frozen stages
    saved_seconds: float = 0.0  # so far, that frozen stages would have taken for what was read
    reused_bytes: int = 0  # of the largest file that values were read from


@dataclass(frozen=True)
class End:
    """How a trial ended: `end.json`."""

    state: State
    detail: str = ""


@dataclass(frozen=True)
class TrialRecord:
    """A trial as its directory tells it."""

    trial_id: str
    config: TrialConfig
    epochs: tuple[EpochReport, ...]
    state: State
    detail: str  # the step of a divergence, the error of a failure
    notes: tuple[str, ...] = ()

    @property
    def index(self) -> int:
        """The number of the trial's point; trials that repeat or copy one another share it."""
        return int(self.trial_id.partition("-")[0])

    @property
    def best(self) -> EpochReport | None:
        """The first epoch with the highest val_acc; None before the first epoch ends."""
        return max(self.epochs, key=lambda report: report.val_acc, default=None)

    @property
    def is_settled(self) -> bool:
        """Whether the trial would end the same way if it ran again."""
        return self.state in ("completed", "stopped", "diverged")


class TrialDir:
    """The directory of one trial, for its one writer and for readers.

    What writes raises InterruptedRun where another process has taken over the run.
    """

    def __init__(self, place: Place | Path) -> None:
        self.place = place if isinstance(place, Place) else Place(place)
        self.path = self.place.path
        self.checkpoints = self.path / CHECKPOINTS

    @property
    def has_begun(self) -> bool:
        return (self.path / "config.json").exists()

    def begin(
        self,
        config: TrialConfig,
        notes: Sequence[str] = (),
        *,
        after_epoch: int = 0,
        after_step: int = 0,
    ) -> None:
        """Start, or once more behind an epoch and a step: all that came later is forgotten."""
        self.place.checked_fence()
        for checkpoint in later(self.checkpoints, after_step):
            self.place.remove(checkpoint, first=COMMIT)
        write_json(self.path / "config.json", config.model_dump(mode="json"))
        lines = whole_lines(self.path / "metrics.jsonl")
        kept = [line for line in lines if self._parsed(line).epoch <= after_epoch]
        changed = [self.path / "config.json"]
        if len(kept) < len(lines):
            write_text(self.path / "metrics.jsonl", "".join(f"{line.decode()}\n" for line in kept))
            changed.append(self.path / "metrics.jsonl")
        if notes or (self.path / "notes.txt").exists():
            write_text(self.path / "notes.txt", "".join(f"{note}\n" for note in notes))
            changed.append(self.path / "notes.txt")
        self.place.save(*changed)
        note_attempt(self.place, "started", after_step)

    def note(self, note: str) -> None:
        """One more thing that a reader of the trial's figures should know, said once."""
        notes = self.path / "notes.txt"
        known = self._notes()
        if note not in known:
            self.place.checked_fence()
            write_text(notes, "".join(f"{line}\n" for line in (*known, note)))
            self.place.save(notes)

    def keep(self, checkpoint: Path) -> None:
        """Save a checkpoint that is committed."""
        self.place.checked_fence()
        self.place.save_directory(checkpoint, last=COMMIT)

    def keep_only(self, checkpoint: Path | None, num_newest: int = 0, num_epochs: int = 0) -> None:
        """Remove all but this checkpoint, the newest ones, and those of the latest epochs."""
        latest = self._epochs()[-num_epochs:] if num_epochs else ()
        of_epochs = [self.checkpoints / told.checkpoint for told in latest if told.checkpoint]
        for other in others(self.checkpoints, checkpoint, num_newest, of_epochs):
            self.place.checked_fence()
            self.place.remove(other, first=COMMIT)

    def keep_weights(self) -> None:
        """Keep of all checkpoints the weights of the best epoch. No tensors are read for it."""
        self.place.checked_fence()
        best = self.read().best
        checkpoint = self.best_checkpoint(best) if best else None
        self.keep_only(checkpoint)
        is_there = checkpoint and (checkpoint / TRAINING_STATE).exists()
        if checkpoint and (is_there or TRAINING_STATE in committed(checkpoint)):
            without_training_state(checkpoint)
            self.place.save(checkpoint / COMMIT)
            self.place.drop(checkpoint / TRAINING_STATE)

    def tell_kept(self) -> None:
        """Tell the epoch of a checkpoint that was broken off between being kept and being told."""
        num_told = self._num_told()
        checkpoint = resumable(self.checkpoints, num_told + 1)
        behind = read_behind(checkpoint) if checkpoint else None
        if checkpoint and behind and behind.report and behind.epoch == num_told + 1:
            where = checkpoint / STATE
            text = json.dumps({**behind.report, "checkpoint": checkpoint.name}).encode()
            self.append(parse_stored(EpochReport, text, where))

    def to_go_on_from(self) -> Place | None:
        """The newest checkpoint that the trial can go on from: what is before it was told."""
        checkpoint = resumable(self.checkpoints, self._num_told())
        return self.place.below(CHECKPOINTS).below(checkpoint.name) if checkpoint else None

    def append(self, report: EpochReport) -> None:
        """One more line of metrics, on the disk when this returns."""
        self.place.checked_fence()
        path = self.path / "metrics.jsonl"
        append_line(path, json.dumps(asdict(report), allow_nan=False))
        self.place.save(path)

    def end(self, state: State, detail: str = "") -> None:
        self.place.checked_fence()
        write_json(self.path / "end.json", asdict(End(state, detail)))
        self.place.save(self.path / "end.json")

    def fail(self, error: BaseException, config: TrialConfig) -> None:
        """Leave one line for the leaderboard, and the traceback for whoever mends it.

        `config`: of the trial, which may have failed before it began.
        """
        named = "" if isinstance(error, TlrunnerError) else f"{type(error).__name__}: "
        try:
            if not self.has_begun:
                self.begin(config)
            self.leave_traceback(error)
            self.end("failed", " ".join(redacted(f"{named}{error}").split())[:500])
        except StorageError as err:
            raise error from err  # the disk that fails is often what failed the trial

    def give_up(self, config: TrialConfig, why: str) -> None:
        """End a trial as failed whose process could not say so itself, or never began."""
        if not self.has_begun:
            self.begin(config)
        self.end("failed", why)

    def leave_traceback(self, error: BaseException) -> None:
        self.place.checked_fence()
        told = redacted("".join(traceback.format_exception(error)))
        write_text(self.path / "error.txt", told)
        self.place.save(self.path / "error.txt")

    def best_checkpoint(self, report: EpochReport) -> Path:
        """The checkpoint that a best epoch always has.

        Raises:
            StorageError: it has none, so the line is not one that a trial wrote.
        """
        if report.checkpoint is None:
            found = f"no checkpoint of the best epoch, {report.epoch}"
            raise not_as_written(self.path / "metrics.jsonl", found, "its name")
        return self.checkpoints / report.checkpoint

    def read(self) -> TrialRecord:
        """The record so far. A line torn by a kill is the last one and is left out.

        Raises:
            StorageError: a file is not what a trial writes.
        """
        config = read_stored(TrialConfig, self.path / "config.json")
        epochs = self._epochs()
        is_whole = bool(epochs) and epochs[-1].epoch == config.train.epochs
        end = End("completed" if is_whole else "interrupted")
        if (self.path / "end.json").exists():
            end = read_stored(End, self.path / "end.json")
        return TrialRecord(self.path.name, config, epochs, end.state, end.detail, self._notes())

    def _notes(self) -> tuple[str, ...]:
        path = self.path / "notes.txt"
        text = stored_bytes(path) if path.exists() else b""
        return tuple(text.decode(errors="replace").splitlines())

    def _epochs(self) -> tuple[EpochReport, ...]:
        path = self.path / "metrics.jsonl"
        epochs = tuple(map(self._parsed, whole_lines(path)))
        for before, report in pairwise(epochs):
            if report.epoch != before.epoch + 1:
                found = f"epoch {report.epoch} behind epoch {before.epoch}"
                raise not_as_written(path, found, "each epoch once, in order")
        return epochs

    def _num_told(self) -> int:
        """Epochs that are told; those before a copy began were told by the trial that it copied."""
        if epochs := self._epochs():
            return epochs[-1].epoch
        copied = COPY.search(self.path.name)
        return int(copied[1]) if copied else 0

    def _parsed(self, line: bytes) -> EpochReport:
        return parse_stored(EpochReport, line, self.path / "metrics.jsonl")
