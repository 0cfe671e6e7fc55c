"""Sums of a pass over batches; they become metrics once, at the border.

Adding up correct, loss and seen, and dividing once at the end, gives the same figures for any
batch size and number of workers, which an average of averages does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Plain numbers over `seen` images."""

    acc: float
    loss: float
    seen: int


class Begun(NamedTuple):
    """An epoch that was broken off: batches that are behind, and their (correct, loss, seen)."""

    num_batches: int = 0
    totals: Sequence[float] = ()

    @property
    def num_images(self) -> int:
        return int(self.totals[2]) if self.totals else 0


NOT_BEGUN = Begun()


class Sums:
    """Running (correct, loss, seen), kept on the device so that adding never waits for it.

    `totals`: what there is to begin with.
    """

    def __init__(self, device: torch.device, totals: Sequence[float] = ()) -> None:
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        if totals:
            self.totals += torch.tensor(totals, dtype=torch.float64, device=device)

    def add(self, correct: Tensor, loss: Tensor, seen: int) -> None:
        """Add one batch: number correct, summed loss (scalars), and images, all without padding."""
        self.totals[0] += correct
        self.totals[1] += loss
        self.totals[2] += seen

    def metrics(self, over_workers: Callable[[Tensor], Tensor]) -> Metrics:
        """The division, and the only wait for the device.

        Args:
            over_workers: gives each worker the sum of what all of them have.
        """
        correct, loss, seen = over_workers(self.totals).tolist()
        assert seen > 0, "metrics of no images"
        return Metrics(acc=correct / seen, loss=loss / seen, seen=int(seen))
