"""Between the driver of a search and its trials, on whatever node: that they are to halt.

An actor of its own, in a module that imports nothing large, so that it starts at once.
"""

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

ASK_SECONDS = 0.5


class Bell:
    """Rung once, by the driver."""

    def __init__(self) -> None:
        self.has_rung = False

    def ring(self) -> None:
        self.has_rung = True

    def rings(self) -> bool:
        return self.has_rung


def hang_bell() -> Any:
    """The handle of a bell that is there as long as somebody holds it."""
    # Not in a trial's placement group, which goes when the trial does.
    return ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")(Bell).remote()


@dataclass
class Hearing:
    """Whether a bell has rung, as a trial asks between its steps; the answer is kept for a while.

    Trials whose bell is lost go on: whoever would have rung it is gone, or ends them otherwise.
    """

    bell: Any
    asked_at: float = float("-inf")
    heard: bool = False

    def __call__(self) -> bool:
        if not self.heard and time.monotonic() - self.asked_at > ASK_SECONDS:
            try:
                self.heard = ray.get(self.bell.rings.remote())
            except RayError:
                self.heard = False
            self.asked_at = time.monotonic()
        return self.heard
