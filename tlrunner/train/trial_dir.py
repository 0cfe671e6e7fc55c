"""What one trial leaves behind: `trials/<id>/{config.json, metrics.jsonl, end.json, checkpoints/}`.

`notes.txt` has a line for each thing that a reader of its figures should know.

The trial writes an epoch's line before it reports the epoch, so that no figure is ever shown that
was not saved. A trial that has neither all its epochs nor an end.json was interrupted.
"""

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tlrunner.config import TrialConfig
from tlrunner.configfile import validate
from tlrunner.errors import StorageError, TlrunnerError
from tlrunner.files import append_line, read_json, whole_lines, write_json, write_text
from tlrunner.train.attempts import note_attempt
from tlrunner.train.checkpoint import (
    COMMIT,
    TRAINING_STATE,
    others,
    resumable,
    without_training_state,
)
from tlrunner.train.place import CHECKPOINTS, Place

State = Literal["completed", "stopped", "diverged", "failed", "interrupted"]


@dataclass(frozen=True)
class EpochReport:
    """The figures of a trial after one more epoch. All are plain Python numbers."""

    epoch: int  # epochs finished, from 1
    val_acc: float
    val_loss: float
    train_loss: float
    images_per_second: float  # of training, validation aside
    trainable_params: int
    total_params: int
    latency_seconds: float  # for one image, on the device it trains on
    seconds: float  # since the trial began
    checkpoint: str | None  # directory name of this epoch's checkpoint, if it has one
    fill_seconds: float = 0.0  # so far, of computing what is kept of frozen stages
    saved_seconds: float = 0.0  # so far, that frozen stages would have taken for what was read
    reused_bytes: int = 0  # of the largest file that values were read from


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
        """Start, or start once more behind an epoch: what was told of later ones is forgotten."""
        self.place.checked_fence()
        write_json(self.path / "config.json", config.model_dump(mode="json"))
        lines = whole_lines(self.path / "metrics.jsonl")
        kept = [line for line in lines if EpochReport(**json.loads(line)).epoch <= after_epoch]
        changed = [self.path / "config.json"]
        if len(kept) < len(lines):
            write_text(self.path / "metrics.jsonl", "".join(f"{line}\n" for line in kept))
            changed.append(self.path / "metrics.jsonl")
        if notes or (self.path / "notes.txt").exists():
            write_text(self.path / "notes.txt", "".join(f"{note}\n" for note in notes))
            changed.append(self.path / "notes.txt")
        self.place.save(*changed)
        note_attempt(self.place, "started", after_step)

    def note(self, note: str) -> None:
        """One more thing that a reader of the trial's figures should know, said once."""
        notes = self.path / "notes.txt"
        known = notes.read_text(encoding="utf-8") if notes.exists() else ""
        if note not in known.splitlines():
            self.place.checked_fence()
            write_text(notes, f"{known}{note}\n")
            self.place.save(notes)

    def keep(self, checkpoint: Path) -> None:
        """Save a checkpoint that is committed."""
        self.place.checked_fence()
        self.place.save_directory(checkpoint, last=COMMIT)

    def keep_only(self, checkpoint: Path | None, num_last: int = 0) -> None:
        """Remove all but this checkpoint, which a line of the metrics speaks of, and the newest."""
        for other in others(self.checkpoints, checkpoint, num_last):
            self.place.checked_fence()
            self.place.remove(other, first=COMMIT)

    def keep_weights(self) -> None:
        """Keep of all checkpoints the weights of the best epoch."""
        self.place.checked_fence()
        best = self.read().best
        checkpoint = self.best_checkpoint(best) if best else None
        self.keep_only(checkpoint)
        if checkpoint and (checkpoint / TRAINING_STATE).exists():
            without_training_state(checkpoint)
            self.place.save(checkpoint / COMMIT)
            self.place.drop(checkpoint / TRAINING_STATE)

    def to_go_on_from(self) -> Place | None:
        """The newest checkpoint that the trial can go on from."""
        checkpoint = resumable(self.checkpoints)
        return self.place.below(CHECKPOINTS).below(checkpoint.name) if checkpoint else None

    def append(self, report: EpochReport) -> None:
        """One more line of metrics, on the disk when this returns."""
        self.place.checked_fence()
        path = self.path / "metrics.jsonl"
        append_line(path, json.dumps(asdict(report), allow_nan=False))
        self.place.save(path)

    def end(self, state: State, detail: str = "") -> None:
        self.place.checked_fence()
        write_json(self.path / "end.json", {"state": state, "detail": detail})
        self.place.save(self.path / "end.json")

    def fail(self, error: BaseException) -> None:
        """Leave one line for the leaderboard, and the traceback for whoever mends it."""
        named = "" if isinstance(error, TlrunnerError) else f"{type(error).__name__}: "
        try:
            self.leave_traceback(error)
            self.end("failed", " ".join(f"{named}{error}".split())[:500])
        except StorageError as err:
            raise error from err  # the disk that fails is often what failed the trial

    def leave_traceback(self, error: BaseException) -> None:
        self.place.checked_fence()
        write_text(self.path / "error.txt", "".join(traceback.format_exception(error)))
        self.place.save(self.path / "error.txt")

    def best_checkpoint(self, report: EpochReport) -> Path:
        assert report.checkpoint is not None, "a best epoch always has a checkpoint"
        return self.checkpoints / report.checkpoint

    def read(self) -> TrialRecord:
        """The record so far. A line torn by a kill is the last one and is left out."""
        config = validate(TrialConfig, read_json(self.path / "config.json"))
        epochs = self._epochs()
        is_whole = bool(epochs) and epochs[-1].epoch == config.train.epochs
        end: Mapping[str, Any] = {"state": "completed" if is_whole else "interrupted"}
        if (self.path / "end.json").exists():
            end = read_json(self.path / "end.json")
        notes = self.path / "notes.txt"
        return TrialRecord(
            self.path.name,
            config,
            epochs,
            end["state"],
            end.get("detail", ""),
            tuple(notes.read_text(encoding="utf-8").splitlines()) if notes.exists() else (),
        )

    def _epochs(self) -> tuple[EpochReport, ...]:
        lines = whole_lines(self.path / "metrics.jsonl")
        return tuple(EpochReport(**json.loads(line)) for line in lines)
