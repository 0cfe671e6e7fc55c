"""What comes between two steps of an epoch: a checkpoint now and then, or the end for now."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol


class HaltedError(Exception):
    """The trial was asked to halt, and left what it can go on from."""


class Due(IntEnum):
    """What is due between two steps."""

    NOTHING = 0
    CHECKPOINT = 1
    HALT = 2  # behind a checkpoint


class Between(Protocol):
    """Who says what is due, and does it."""

    def due(self) -> Due:
        """What it is time for; the first worker is asked."""

    def __call__(self, due: Due, num_batches: int, totals: Sequence[float]) -> None:
        """Called by all workers behind so many batches of an epoch, with sums over them.

        Raises:
            HaltedError: HALT was due.
        """
