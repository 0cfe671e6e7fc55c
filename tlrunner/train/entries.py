"""Values at a cut <-> bytes of a file: how one image's values lie in an entry."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tlrunner.data.activations import Bytes

_ALIGNED = 8  # bytes: every number type can be read at such a place
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Part:
    """One of the values: of `shape` without the batch, in NHWC order if `channels_last`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype
    channels_last: bool
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape) * self.stored.itemsize


@dataclass(frozen=True)
class EntryLayout:
    """Where each value lies in an entry of `num_bytes`."""

    parts: tuple[_Part, ...]
    num_bytes: int

    @property
    def is_exact(self) -> bool:
        """Whether values come back as they were computed."""
        return all(part.dtype == part.stored for part in self.parts)

    def pack(self, values: Sequence[Tensor]) -> Bytes:
        """Values of shapes (B, ...) -> entries (B, num_bytes)."""
        columns = [self._stored(part, v) for part, v in zip(self.parts, values, strict=True)]
        if len(columns) == 1 and columns[0].shape[1] == self.num_bytes:
            return columns[0]
        entries = np.zeros((len(values[0]), self.num_bytes), np.uint8)
        for part, column in zip(self.parts, columns, strict=True):
            entries[:, part.start : part.stop] = column
        return entries

    def _stored(self, part: _Part, value: Tensor) -> Bytes:
        value = value.detach().to(part.stored)
        rows = value.permute(0, 2, 3, 1) if part.channels_last else value
        rows = rows.to("cpu").contiguous().reshape(len(value), -1)
        return np.asarray(rows.view(torch.uint8).numpy())

    def unpack(self, entries: Bytes) -> tuple[Tensor, ...]:
        """Entries (B, num_bytes), which may be written to -> values of shapes (B, ...)."""
        return tuple(_value(part, entries) for part in self.parts)


def _value(part: _Part, entries: Bytes) -> Tensor:
    column = np.ascontiguousarray(entries[:, part.start : part.stop])
    rows = torch.from_numpy(column).view(part.stored)
    if not part.channels_last:
        return rows.view(len(rows), *part.shape).to(part.dtype)
    channels, height, width = part.shape
    value = rows.view(len(rows), height, width, channels).permute(0, 3, 1, 2)
    return value.to(part.dtype, memory_format=torch.preserve_format)


def layout_of(values: Sequence[Tensor], dtype: str) -> EntryLayout:
    """The layout for values like these; `dtype` is fp32, bf16, fp16, or auto: as computed."""
    parts, start = [], 0
    for value in values:
        is_map = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
        stored = STORED.get(dtype, value.dtype) if value.is_floating_point() else value.dtype
        part = _Part(tuple(value.shape[1:]), value.dtype, stored, is_map, start)
        parts.append(part)
        start = -(-part.stop // _ALIGNED) * _ALIGNED
    return EntryLayout(tuple(parts), start)
