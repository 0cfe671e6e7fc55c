"""The place of one worker among the workers of a trial, as a value that is passed around."""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Worker `rank` of `size`, counted from 0."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} of {self.size}"
