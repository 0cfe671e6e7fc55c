"""Rows -> batches of uint8 pixels, rendered ahead of time by threads.

A trial calls `train_batches` once an epoch and `eval_batches` once a validation. Which samples a
batch holds, and every pixel of it, is settled by arithmetic before a thread starts; more threads
only make it come sooner.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from tlrunner.data.augment import MIX_STREAM, EvalTransform, TrainTransform, view_of
from tlrunner.data.dataset import Dataset
from tlrunner.data.decode import BadImage, Encoded, Picture
from tlrunner.data.mix import mix_pairs
from tlrunner.data.order import Rows, cut_batches, epoch_order, rank_slice
from tlrunner.data.threads import map_ahead
from tlrunner.data.world import World
from tlrunner.errors import DataError

_CHUNK = 8  # images a thread renders at a time; even, so that no pair is torn
_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch.

    Attributes:
        images_BHWC: uint8, RGB.
        labels_B: int64.
        partner_labels_B: int64, the label of what was mixed in; equal to `labels_B` if nothing was.
        label_weight_B: float32, the share of `labels_B`; 1 if nothing was mixed in.
        num_global: number of images in the global batch.
    """

    images_BHWC: torch.Tensor
    labels_B: torch.Tensor
    partner_labels_B: torch.Tensor
    label_weight_B: torch.Tensor
    num_global: int


@dataclass(frozen=True)
class _Chunk:
    """Work of one thread: a part of a batch."""

    batch: Batch
    rows: Rows
    part: slice
    is_last: bool

    @property
    def pixels(self) -> NDArray[np.uint8]:
        return np.asarray(self.batch.images_BHWC.numpy()[self.part])


def num_batches(num_samples: int, batch_size: int) -> int:
    """Batches of an epoch, the same for every rank."""
    return -(-num_samples // batch_size)


def train_batches(
    dataset: Dataset,
    rows: Rows,
    transform: TrainTransform,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    world: World,
    num_threads: int,
    first_batch: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The shuffled, augmented batches of an epoch, from number `first_batch` on.

    `rows` are rows of the data set; `batch_size` is global. A rank's share may be empty.

    Raises:
        DataError: a stored image cannot be decoded.
    """
    rows = rows[epoch_order(dataset.ids_N[rows], seed, epoch)]
    augment, view = transform.augment, view_of(epoch, transform.augment.num_views)

    def fill(chunk: _Chunk) -> _Chunk:
        images_BHWC, ids_B = chunk.pixels, dataset.ids_N[chunk.rows]
        draws_B = transform.draws(ids_B, view)
        for row, draws, image_HWC in zip(chunk.rows.tolist(), draws_B, images_BHWC, strict=True):
            try:
                transform.render(_picture(dataset, row), draws, image_HWC)
            except BadImage as err:
                raise _damaged(dataset, row, err) from err
        weights_B = mix_pairs(
            images_BHWC, ids_B, augment, seed=transform.seed, view=view, stream=MIX_STREAM
        )
        chunk.batch.label_weight_B.numpy()[chunk.part] = weights_B
        return chunk

    size, is_mixed = transform.preprocess.image_size, bool(augment.mixup or augment.cutmix)
    slices = cut_batches(len(rows), batch_size)[first_batch:]
    make = partial(_empty_batch, dataset, size, is_mixed, pin_memory)
    return _batches(rows, slices, world, make, fill, num_threads)


def eval_batches(
    dataset: Dataset,
    rows: Rows,
    transform: EvalTransform,
    *,
    batch_size: int,
    world: World,
    num_threads: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Plain batches of `rows`, in their order; over all ranks each row comes exactly once.

    Raises:
        DataError: a stored image cannot be decoded.
    """

    def fill(chunk: _Chunk) -> _Chunk:
        for row, image_HWC in zip(chunk.rows.tolist(), chunk.pixels, strict=True):
            try:
                transform.render(_picture(dataset, row), image_HWC)
            except BadImage as err:
                raise _damaged(dataset, row, err) from err
        return chunk

    slices = cut_batches(len(rows), batch_size)
    make = partial(_empty_batch, dataset, transform.preprocess.image_size, False, pin_memory)
    return _batches(rows, slices, world, make, fill, num_threads)


def _batches(
    rows: Rows,
    slices: Sequence[slice],
    world: World,
    make: Callable[[Rows, int], Batch],
    fill: Callable[[_Chunk], _Chunk],
    num_threads: int,
) -> Iterator[Batch]:
    """Cut a rank's batches into chunks, have threads fill them, and hand over whole batches."""
    cv2.setNumThreads(0)  # the threads are ours; OpenCV's own would only be in their way

    def chunks() -> Iterator[_Chunk]:
        for cut in slices:
            rows_B = rows[rank_slice(cut, world)]
            batch = make(rows_B, cut.stop - cut.start)
            for start in range(0, max(len(rows_B), 1), _CHUNK):  # an empty share is one chunk
                part = slice(start, min(start + _CHUNK, len(rows_B)))
                yield _Chunk(batch, rows_B[part], part, is_last=part.stop == len(rows_B))

    largest = max((cut.stop - cut.start for cut in slices), default=0)
    ahead = max(_BATCHES_AHEAD * -(-largest // (world.size * _CHUNK)), num_threads + 1)
    for chunk in map_ahead(fill, chunks(), num_threads, ahead):
        if chunk.is_last:
            yield chunk.batch


def _empty_batch(
    dataset: Dataset, size: int, is_mixed: bool, pin_memory: bool, rows_B: Rows, num_global: int
) -> Batch:
    """A batch with everything but its pixels, and its weights if it is mixed."""
    labels_B = dataset.labels_N[rows_B]
    partners_B = np.arange(len(rows_B))
    if is_mixed:
        num_paired = len(rows_B) // 2 * 2
        partners_B[:num_paired] ^= 1
    return Batch(
        images_BHWC=torch.empty(
            (len(rows_B), size, size, 3), dtype=torch.uint8, pin_memory=pin_memory
        ),
        labels_B=torch.from_numpy(labels_B),
        partner_labels_B=torch.from_numpy(labels_B[partners_B]),
        label_weight_B=torch.ones(len(rows_B)),
        num_global=num_global,
    )


def _picture(dataset: Dataset, row: int) -> Picture:
    """Where pixels come from; the only place that knows."""
    return Encoded(dataset.image_bytes(row))


def _damaged(dataset: Dataset, row: int, err: BadImage) -> DataError:
    """Say which image of which data set could not be decoded."""
    return DataError(
        f"image {dataset.keys[row]} in {dataset.directory} cannot be decoded any more ({err})",
        "",
        "the shards are damaged: delete the directory, prepare again",
    )
