"""Rows -> batches of uint8 pixels, rendered ahead of time by threads.

A trial calls `train_batches` once an epoch and `eval_batches` once a validation. Which samples a
batch holds, and every pixel of it, is settled by arithmetic before a thread starts; more threads
only make it come sooner.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from tlrunner.data.augment import MIX_STREAM, EvalTransform, TrainTransform, view_of
from tlrunner.data.buffers import Buffers
from tlrunner.data.dataset import Dataset
from tlrunner.data.decode import BadImage
from tlrunner.data.decoded import KeptTransform
from tlrunner.data.mix import mix_pairs
from tlrunner.data.order import (
    Rows,
    cut_batches,
    epoch_order,
    padded_share,
    rank_slice,
    window_order,
)
from tlrunner.data.threads import map_ahead
from tlrunner.data.world import World
from tlrunner.errors import DataError

_CHUNK = 16  # images a thread renders at a time; even, so that no pair is torn
_BATCHES_AHEAD, _BYTES_AHEAD = 3, 256 * 2**20  # of pixels, whichever is less


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch.

    Attributes:
        images_BHWC: uint8, RGB; none of them where there are `values`.
        labels_B: int64.
        partner_labels_B: int64, the label of what was mixed in; equal to `labels_B` if nothing was.
        label_weight_B: float32, the share of `labels_B`; 1 if nothing was mixed in.
        mask_B: bool, False for padding: black images of label 0, which count for nothing.
        num_global: number of images in the global batch, without padding.
        values: what a frozen prefix computed from the images, each of shape (B, ...), instead of
            them.
    """

    images_BHWC: torch.Tensor
    labels_B: torch.Tensor
    partner_labels_B: torch.Tensor
    label_weight_B: torch.Tensor
    mask_B: torch.Tensor
    num_global: int
    values: tuple[torch.Tensor, ...] = ()


Transform = TrainTransform | EvalTransform | KeptTransform


class Share(NamedTuple):
    """What a rank has of a global batch."""

    rows_B: Rows
    num_padding: int
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
    shares = train_shares(
        dataset, rows, seed=seed, epoch=epoch, batch_size=batch_size, world=world
    )[first_batch:]
    view = view_of(epoch, transform.augment.num_views)
    fill = partial(_fill_with_views, dataset, transform, view)
    return _planned_batches(dataset, shares, transform, fill, num_threads, pin_memory)


def eval_batches(
    dataset: Dataset,
    rows: Rows,
    transform: EvalTransform | KeptTransform,
    *,
    batch_size: int,
    world: World,
    num_threads: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Plain batches of `rows`, in their order; over all ranks each row comes exactly once.

    A batch has the same size on every rank; what is missing to that is padding.

    Raises:
        DataError: a stored image cannot be decoded.
    """

    shares = eval_shares(rows, batch_size=batch_size, world=world)
    fill = partial(_fill_plainly, dataset, transform)
    return _planned_batches(dataset, shares, transform, fill, num_threads, pin_memory)


def rendered(
    dataset: Dataset,
    groups: Iterable[Rows],
    transform: Transform,
    *,
    view: int,
    largest: int,
    num_threads: int,
) -> Iterator[torch.Tensor]:
    """Images (B, H, W, C) of each group of rows, as the batches of a view have them, unmixed.

    Groups, of at most `largest` rows, are asked for a few ahead. The data set is not streamed.

    Raises:
        DataError: a stored image cannot be decoded.
    """
    assert dataset.window is None, "rows are read in any order"
    fill = (
        partial(_fill_with_views, dataset, transform, view)
        if isinstance(transform, TrainTransform)
        else partial(_fill_plainly, dataset, transform)
    )
    size = transform.preprocess.image_size
    make = partial(_empty_batch, dataset, _pixels(size, pin_memory=False), False)
    shares = (Share(rows_B, 0, len(rows_B)) for rows_B in groups)
    ahead = _chunks_ahead(largest, size, num_threads)
    return (b.images_BHWC for b in _batches(dataset, shares, make, fill, num_threads, ahead))


# -- What each batch has -------------------------------------------------------------------------


def train_shares(
    dataset: Dataset, rows: Rows, *, seed: int, epoch: int, batch_size: int, world: World
) -> list[Share]:
    """A rank's share of each batch of an epoch, shuffled; `batch_size` is global."""
    rows = rows[_epoch_order(dataset, rows, seed, epoch)]
    cuts = cut_batches(len(rows), batch_size)
    return [Share(rows[rank_slice(cut, world)], 0, cut.stop - cut.start) for cut in cuts]


def eval_shares(rows: Rows, *, batch_size: int, world: World) -> list[Share]:
    """A rank's share of each batch of an evaluation, padded to the size of all others'."""
    shares = []
    for cut in cut_batches(len(rows), batch_size):
        part, num_padding = padded_share(cut, world)
        shares.append(Share(rows[part], num_padding, cut.stop - cut.start))
    return shares


def labelled(dataset: Dataset, share: Share, values: tuple[torch.Tensor, ...]) -> Batch:
    """The batch of a share, with values of its rows and padding instead of their images."""
    batch = _empty_batch(dataset, lambda count: torch.empty((count, 0, 0, 3)), False, share)
    return replace(batch, values=values)


def _epoch_order(dataset: Dataset, rows: Rows, seed: int, epoch: int) -> Rows:
    """Any sample after any other, or within a window where they are streamed."""
    ids_N = dataset.ids_N[rows]
    if dataset.window is None:
        return epoch_order(ids_N, seed, epoch)
    return window_order(ids_N, dataset.groups_N[rows], seed, epoch, dataset.window)


# -- How it is made ------------------------------------------------------------------------------


def _fill_with_views(
    dataset: Dataset, transform: TrainTransform, view: int, chunk: _Chunk
) -> _Chunk:
    images_BHWC, ids_B = chunk.pixels, dataset.ids_N[chunk.rows]
    draws_B = transform.draws(ids_B, view)
    for row, draws, image_HWC in zip(chunk.rows.tolist(), draws_B, images_BHWC, strict=True):
        try:
            transform.render(dataset.picture(row), draws, image_HWC)
        except BadImage as err:
            raise _damaged(dataset, row, err) from err
    weights_B = mix_pairs(
        images_BHWC, ids_B, transform.augment, seed=transform.seed, view=view, stream=MIX_STREAM
    )
    chunk.batch.label_weight_B.numpy()[chunk.part] = weights_B
    return chunk


def _fill_plainly(
    dataset: Dataset, transform: EvalTransform | KeptTransform, chunk: _Chunk
) -> _Chunk:
    for row, image_HWC in zip(chunk.rows.tolist(), chunk.pixels, strict=True):
        try:
            transform.render(dataset.picture(row), image_HWC)
        except BadImage as err:
            raise _damaged(dataset, row, err) from err
    return chunk


def _planned_batches(
    dataset: Dataset,
    shares: Sequence[Share],
    transform: Transform,
    fill: Callable[[_Chunk], _Chunk],
    num_threads: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """The batches of shares that are all known beforehand."""
    size = transform.preprocess.image_size
    is_mixed = isinstance(transform, TrainTransform) and transform.is_mixed
    make = partial(_empty_batch, dataset, _pixels(size, pin_memory), is_mixed)
    if shares:
        dataset.plan(np.concatenate([share.rows_B for share in shares]))
    largest = max((len(share.rows_B) for share in shares), default=0)
    ahead = _chunks_ahead(largest, size, num_threads)
    return _batches(dataset, shares, make, fill, num_threads, ahead)


def _batches(
    dataset: Dataset,
    shares: Iterable[Share],
    make: Callable[[Share], Batch],
    fill: Callable[[_Chunk], _Chunk],
    num_threads: int,
    ahead: int,
) -> Iterator[Batch]:
    """Cut a rank's batches into chunks, have threads fill them, and hand over whole batches."""
    cv2.setNumThreads(0)  # the threads are ours; OpenCV's own would only be in their way

    def chunks() -> Iterator[_Chunk]:
        for share in shares:
            batch, rows_B = make(share), share.rows_B
            for start in range(0, max(len(rows_B), 1), _CHUNK):  # an empty share is one chunk
                part = slice(start, min(start + _CHUNK, len(rows_B)))
                yield _Chunk(batch, rows_B[part], part, is_last=part.stop == len(rows_B))

    def fill_or_stop(chunk: _Chunk) -> _Chunk:
        try:
            return fill(chunk)
        except BaseException:
            dataset.stop()  # its other rows are never read, and other threads may wait for that
            raise

    filled = map_ahead(fill_or_stop, chunks(), num_threads, ahead)
    try:
        for chunk in filled:
            if chunk.is_last:
                yield chunk.batch
    finally:
        dataset.stop()
        filled.close()


def _chunks_ahead(largest: int, size: int, num_threads: int) -> int:
    """How many chunks may be in the making: enough to keep the threads busy, if memory allows.

    `largest`: images of the largest batch.
    """
    wanted = max(_BATCHES_AHEAD * -(-largest // _CHUNK), num_threads + 1)
    return max(1, min(wanted, _BYTES_AHEAD // (_CHUNK * size * size * 3)))


def _pixels(size: int, pin_memory: bool) -> Callable[[int], torch.Tensor]:
    """What makes the pixels of a batch, given its number of images; nothing is in them yet."""
    if pin_memory:
        return lambda count: torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=True)
    buffers = Buffers()
    return lambda count: torch.from_numpy(buffers.take((count, size, size, 3)))


def _empty_batch(
    dataset: Dataset, pixels: Callable[[int], torch.Tensor], is_mixed: bool, share: Share
) -> Batch:
    """A batch with everything but its pixels, and its weights if it is mixed."""
    num_rows, num_images = len(share.rows_B), len(share.rows_B) + share.num_padding
    images_BHWC = pixels(num_images)
    images_BHWC[num_rows:] = 0
    labels_B = np.zeros(num_images, np.int64)
    labels_B[:num_rows] = dataset.labels_N[share.rows_B]
    partners_B = np.arange(num_images)
    if is_mixed:
        num_paired = num_rows // 2 * 2
        partners_B[:num_paired] ^= 1
    return Batch(
        images_BHWC=images_BHWC,
        labels_B=torch.from_numpy(labels_B),
        partner_labels_B=torch.from_numpy(labels_B[partners_B]),
        label_weight_B=torch.ones(num_images),
        mask_B=torch.arange(num_images) < num_rows,
        num_global=share.num_global,
    )


def _damaged(dataset: Dataset, row: int, err: BadImage) -> DataError:
    """Say which image of which data set could not be decoded."""
    return DataError(
        f"image {dataset.keys[row]} in {dataset.uri} cannot be decoded any more ({err})",
        "",
        "the shards are damaged: prepare the images again",
    )
