"""Exponential moving average of what trains.

Only trained tensors are averaged: frozen ones equal their average, so nothing else is copied.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """average <- d * average + (1 - d) * weights after each step, with d warmed up from 0.1.

    The warm-up d = min(decay, (1 + step) / (10 + step)) is that of TensorFlow's
    ExponentialMovingAverage; without it a short fine-tuning would mostly average its start.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.num_steps = 0
        self.live: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}

    def follow(self, tensors: Mapping[str, Tensor]) -> None:
        """Average these tensors from now on; those already averaged keep their average."""
        self.live = dict(tensors)
        for name, tensor in self.live.items():
            if name not in self.average:
                self.average[name] = tensor.detach().clone()

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.num_steps) / (10 + self.num_steps))
        self.num_steps += 1
        for name, tensor in self.live.items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - decay)
            else:  # the step counter of BatchNorm
                self.average[name].copy_(tensor)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the averaged weights inside this block."""
        kept = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        self._overwrite(self.average)
        try:
            yield
        finally:
            self._overwrite(kept)

    @torch.no_grad()
    def _overwrite(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.live.items():
            tensor.copy_(tensors[name])
