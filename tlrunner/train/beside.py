"""A trial among the others of its search: what they read together, and what a process keeps.

Sent to each process that runs trials, so it imports nothing large; that comes with the first trial.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tlrunner.config import TrialConfig
from tlrunner.train.warm import Warm


class Uses(NamedTuple):
    """Of one cut: passes over the training images by view, and over the validation images."""

    train: dict[int, int]
    val: int


Demand = Mapping[int, Uses]  # number of stages frozen from the stem up -> how their values are used


@dataclass
class Beside:
    """The trials of a search, as far as they are known before it starts.

    Attributes:
        configs: of the trials, in the order that they start in.
        demands: what they read, by `demand.sharing_key`.
        warm: what this process keeps from one trial to the next.
    """

    configs: Sequence[TrialConfig]
    demands: Mapping[str, Demand] = field(default_factory=dict)
    warm: Warm = field(default_factory=Warm)
