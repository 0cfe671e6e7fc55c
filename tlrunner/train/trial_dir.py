"""What one trial leaves behind: `trials/<id>/{config.json, metrics.jsonl, end.json, checkpoints/}`.

The trial writes an epoch's line before it reports the epoch, so that no figure is ever shown that
was not saved. A trial that has neither all its epochs nor an end.json was interrupted.
"""

import json
import os
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tlrunner.config import TrialConfig
from tlrunner.configfile import validate
from tlrunner.errors import StorageError, TlrunnerError
from tlrunner.files import cannot_write, read_json, write_json, write_text
from tlrunner.train.checkpoint import COMMIT, others
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
    seconds: float  # since the trial began
    checkpoint: str | None  # directory name of this epoch's checkpoint, if it is the best so far


@dataclass(frozen=True)
class TrialRecord:
    """A trial as its directory tells it."""

    trial_id: str
    config: TrialConfig
    epochs: tuple[EpochReport, ...]
    state: State
    detail: str  # the step of a divergence, the error of a failure

    @property
    def best(self) -> EpochReport | None:
        """The first epoch with the highest val_acc; None before the first epoch ends."""
        return max(self.epochs, key=lambda report: report.val_acc, default=None)

    @property
    def is_settled(self) -> bool:
        """Whether the trial would end the same way if it ran again."""
        return self.state in ("completed", "stopped", "diverged")


class TrialDir:
    """The directory of one trial, for its one writer and for readers."""

    def __init__(self, place: Place | Path) -> None:
        self.place = place if isinstance(place, Place) else Place(place)
        self.path = self.place.path
        self.checkpoints = self.path / CHECKPOINTS

    @property
    def has_begun(self) -> bool:
        return (self.path / "config.json").exists()

    def begin(self, config: TrialConfig) -> None:
        write_json(self.path / "config.json", config.model_dump(mode="json"))
        self.place.save(self.path / "config.json")

    def keep(self, checkpoint: Path) -> None:
        """Save a checkpoint that is committed."""
        self.place.save_directory(checkpoint, last=COMMIT)

    def keep_only(self, checkpoint: Path) -> None:
        """Remove the other checkpoints, once a line of the metrics speaks of this one."""
        for other in others(checkpoint):
            self.place.remove(other, first=COMMIT)

    def append(self, report: EpochReport) -> None:
        """One more line of metrics, on the disk when this returns."""
        path = self.path / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(report), allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as err:
            raise cannot_write(path, err) from err
        self.place.save(path)

    def end(self, state: State, detail: str = "") -> None:
        write_json(self.path / "end.json", {"state": state, "detail": detail})
        self.place.save(self.path / "end.json")

    def fail(self, error: BaseException) -> None:
        """Leave one line for the leaderboard, and the traceback for whoever mends it."""
        named = "" if isinstance(error, TlrunnerError) else f"{type(error).__name__}: "
        try:
            write_text(self.path / "error.txt", "".join(traceback.format_exception(error)))
            self.place.save(self.path / "error.txt")
            self.end("failed", " ".join(f"{named}{error}".split())[:500])
        except StorageError as err:
            raise error from err  # the disk that fails is often what failed the trial

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
        return TrialRecord(self.path.name, config, epochs, end["state"], end.get("detail", ""))

    def _epochs(self) -> tuple[EpochReport, ...]:
        path = self.path / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole_lines = text[: text.rfind("\n") + 1].splitlines()
        return tuple(EpochReport(**json.loads(line)) for line in whole_lines)
