"""What a trial leaves on its way: checkpoints to go on from, the best of them, and its figures.

A checkpoint of the best epoch stays for the model, the newest ones for a trial that is broken off.
Nothing goes before what takes its place is committed and spoken of.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import NoReturn

from tlrunner.train.attempts import note_attempt
from tlrunner.train.between import Due, HaltedError
from tlrunner.train.checkpoint import write_checkpoint
from tlrunner.train.feed import Feed
from tlrunner.train.loop import Loop
from tlrunner.train.resume import training_state
from tlrunner.train.reuse import Reuse
from tlrunner.train.trial_dir import EpochReport, State, TrialDir

LAST = 2  # newest checkpoints that are kept for the trial itself to go on from


class Keeper:
    """Of one trial; each of its workers has one, and the first of them the `record`.

    Args:
        record: the trial's directory; None if nothing is kept.
        origin: hashes of what the trial has from elsewhere, its images and pretrained weights.
        num_last: latest epochs whose checkpoints somebody needs, even behind the trial's end.
        goes_on: whether each epoch is kept to go on from, and what is due within it; else the best
            ones and those that end late enough.
        elapsed: seconds of the trial so far.
        is_halted: whether the trial was asked to halt.

    Attributes:
        best: the best epoch so far.
    """

    def __init__(
        self,
        record: TrialDir | None,
        loop: Loop,
        reuse: Reuse,
        num_last: int,
        *,
        origin: Mapping[str, str | None],
        goes_on: bool,
        elapsed: Callable[[], float],
        is_halted: Callable[[], bool],
    ) -> None:
        self.record, self.loop, self.reuse, self.num_last = record, loop, reuse, num_last
        self.origin = origin
        self.goes_on, self.elapsed, self.is_halted = goes_on, elapsed, is_halted
        self.best = record.read().best if record else None
        self.epoch = 0  # under way, from 0
        self.kept_at = time.monotonic()

    @property
    def feed(self) -> Feed:
        return self.reuse.feed

    def due(self) -> Due:
        if self.is_halted():
            return Due.HALT
        return Due.CHECKPOINT if self.record and self.goes_on and self._is_late else Due.NOTHING

    @property
    def _is_late(self) -> bool:
        return time.monotonic() - self.kept_at >= self.feed.config.train.checkpoint_seconds

    def halt(self) -> NoReturn:
        """Keep a checkpoint between two epochs, of a trial that keeps none in them.

        Raises:
            HaltedError: always.
        """
        if self.record and self.epoch and self.loop.has_moments:
            self._write(self.record, 0, {"epoch": self.epoch}, True)
            note_attempt(self.record.place, "halted", self.feed.num_steps * self.epoch)
        raise HaltedError

    def __call__(self, due: Due, num_batches: int, totals: Sequence[float]) -> None:
        """Keep a checkpoint within an epoch."""
        if self.record:
            begun = {"num_batches": num_batches, "totals": list(totals)}
            self._write(self.record, num_batches, {"epoch": self.epoch, "begun": begun}, True)
            best = self.record.best_checkpoint(self.best) if self.best else None
            self.record.keep_only(best, LAST, self.num_last)
        if due == Due.HALT:
            if self.record:
                step = self.feed.num_steps * self.epoch + num_batches
                note_attempt(self.record.place, "halted", step)
            raise HaltedError

    def keep(self, finished: EpochReport) -> EpochReport:
        """Keep and tell an epoch, whose report then names its checkpoint."""
        is_best = self.best is None or finished.val_acc > self.best.val_acc
        is_last = finished.epoch == self.feed.config.train.epochs
        can_go_on = self.loop.has_moments and not is_last
        is_due = self.goes_on or is_best or self._is_late
        goes_on = bool(self.num_last) or (can_go_on and is_due)
        if self.record and (is_best or goes_on):
            state: dict[str, object] = {"epoch": finished.epoch, "report": asdict(finished)}
            name = self._write(self.record, self.feed.num_steps, state, goes_on)
            finished = replace(finished, checkpoint=name)
        if is_best:
            self.best = finished
        if self.record and self.best:
            self._tell(self.record, finished)
            if is_last and not self.num_last:
                self.record.keep_weights()
            else:
                best = self.record.best_checkpoint(self.best)
                self.record.keep_only(best, LAST if can_go_on else 0, self.num_last)
        return finished

    def end(self, state: State, detail: str) -> None:
        """Nothing goes on from here: of the best epoch the weights stay."""
        if self.record:
            self.record.end(state, detail)
            if not self.num_last:
                self.record.keep_weights()

    def _write(
        self, record: TrialDir, num_batches: int, state: dict[str, object], goes_on: bool
    ) -> str:
        """Commit a checkpoint behind so many batches of the epoch under way. Gives its name."""
        tensors, numbers = training_state(self.loop) if goes_on else (None, {})
        state |= {
            "fence": record.place.checked_fence(),
            "seconds": self.elapsed(),
            **self.origin,
            **numbers,
        }
        step = self.feed.num_steps * self.epoch + num_batches
        trained = self.loop.trained_state()
        fence = record.place.fence
        directory = write_checkpoint(
            record.checkpoints,
            step,
            trained,
            state,
            tensors,
            may_commit=record.place.checked_fence,
            turn=fence.turn if fence else 0,
        )
        record.keep(directory)
        self.kept_at = time.monotonic()
        return directory.name

    def _tell(self, record: TrialDir, finished: EpochReport) -> None:
        """Save the figures of an epoch, and what a reader of them should know."""
        if self.loop.has_statistics_apart:
            record.note("BatchNorm statistics are of each worker's part of a batch")
        for note in self.reuse.notes:
            record.note(note)
        record.append(finished)
