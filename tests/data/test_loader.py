import threading
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.config import AugmentConfig, Preprocess
from tlrunner.data import loader
from tlrunner.data.augment import EvalTransform, TrainTransform
from tlrunner.data.buffers import Buffers
from tlrunner.data.dataset import Dataset, open_dataset
from tlrunner.data.decode import Encoded
from tlrunner.data.loader import (
    _BYTES_AHEAD,
    _CHUNK,
    Batch,
    _chunks_ahead,
    eval_batches,
    num_batches,
    train_batches,
)
from tlrunner.data.order import split_rows
from tlrunner.data.prepare import prepare
from tlrunner.data.sources import open_source
from tlrunner.data.world import World
from tlrunner.data.write import WriteSettings, write_shards
from tlrunner.errors import DataError

MIXED = AugmentConfig(mixup=0.4, cutmix=1.0, rotation=10, random_erasing=0.3)


def loaded(
    dataset: Dataset, preprocess: Preprocess, augment: AugmentConfig = MIXED, **changed: Any
) -> list[Batch]:
    settings = {"seed": 0, "epoch": 0, "batch_size": 10, "world": World(), "num_threads": 2}
    transform = TrainTransform(augment, preprocess, 0)
    rows = changed.pop("rows", np.arange(len(dataset)))
    return list(train_batches(dataset, rows, transform, **settings | changed))


def joined(batches: list[Batch]) -> list[torch.Tensor]:
    """All images of some batches, labels, partners' labels and weights, without padding."""
    parts = ("images_BHWC", "labels_B", "partner_labels_B", "label_weight_B")
    return [torch.cat([getattr(x, part)[x.mask_B] for x in batches]) for part in parts]


def same(first: list[Batch], second: list[Batch]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(joined(first), joined(second), strict=True))


def test_a_batch_is_what_it_says(small_dataset: Dataset, preprocess: Preprocess) -> None:
    batches = loaded(small_dataset, preprocess)
    assert len(batches) == num_batches(45, 10) == 5
    assert [batch.num_global for batch in batches] == [9] * 5
    for batch in batches:
        assert batch.images_BHWC.shape == (9, 32, 32, 3)
        assert batch.images_BHWC.dtype == torch.uint8
        assert batch.labels_B.dtype == batch.partner_labels_B.dtype == torch.int64
        assert batch.label_weight_B.dtype == torch.float32
        assert batch.mask_B.tolist() == [True] * 9
        assert batch.partner_labels_B[[1, 0]].tolist() == batch.labels_B[[0, 1]].tolist()


def test_pixels_do_not_depend_on_the_number_of_threads(
    small_dataset: Dataset, preprocess: Preprocess
) -> None:
    one, many = (loaded(small_dataset, preprocess, num_threads=n) for n in (1, 5))
    assert same(one, many)


@pytest.mark.parametrize("chunk", [2, 4, 64])
def test_pixels_do_not_depend_on_how_work_is_cut(
    small_dataset: Dataset, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    usual = loaded(small_dataset, preprocess, batch_size=45)
    monkeypatch.setattr(loader, "_CHUNK", chunk)
    assert same(usual, loaded(small_dataset, preprocess, batch_size=45))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_together_load_the_batches_of_one(
    small_dataset: Dataset, preprocess: Preprocess, size: int
) -> None:
    whole = loaded(small_dataset, preprocess)
    ranks = [loaded(small_dataset, preprocess, world=World(r, size)) for r in range(size)]
    for i, batch in enumerate(whole):
        assert same([batch], [rank[i] for rank in ranks])
        assert {rank[i].num_global for rank in ranks} == {batch.num_global}


def test_an_epoch_continues_where_it_stopped(
    small_dataset: Dataset, preprocess: Preprocess
) -> None:
    whole = loaded(small_dataset, preprocess, epoch=2)
    assert same(whole[3:], loaded(small_dataset, preprocess, epoch=2, first_batch=3))
    assert loaded(small_dataset, preprocess, first_batch=5) == []


def test_epochs_differ_and_each_loads_every_row_once(
    small_dataset: Dataset, preprocess: Preprocess
) -> None:
    plain = AugmentConfig(crop_scale=None, horizontal_flip=0)
    first, second = (loaded(small_dataset, preprocess, plain, epoch=e) for e in (0, 1))
    images = [sorted(im.numpy().tobytes() for im in joined(b)[0]) for b in (first, second)]
    assert images[0] == images[1]
    assert len(set(images[0])) == 45
    assert not same(first, second)


def test_layout_of_the_shards_does_not_matter(
    tmp_path: Path, folder: Path, preprocess: Any
) -> None:
    batches = []
    for seed in (0, 1):
        write_shards(open_source(str(folder)), tmp_path / str(seed), WriteSettings(seed=seed))
        dataset = open_dataset(tmp_path / str(seed))
        rows = split_rows(dataset.ids_N, dataset.labels_N, 0.25, 0).train
        batches.append(loaded(dataset, preprocess, rows=rows))
    assert same(*batches)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_evaluation_keeps_the_order_of_rows(
    small_dataset: Dataset, preprocess: Preprocess, size: int
) -> None:
    rows = np.arange(44, 2, -1)  # 42: six batches of seven
    transform = EvalTransform(preprocess)
    settings: dict[str, Any] = {"batch_size": 7, "num_threads": 2}
    ranks = [
        list(eval_batches(small_dataset, rows, transform, world=World(r, size), **settings))
        for r in range(size)
    ]
    batches = [rank[i] for i in range(6) for rank in ranks]
    assert {len(rank) for rank in ranks} == {6}
    assert {len(batch.labels_B) for batch in batches} == {-(-7 // size)}
    assert all((batch.images_BHWC[~batch.mask_B] == 0).all() for batch in batches)
    assert all((batch.labels_B[~batch.mask_B] == 0).all() for batch in batches)
    images, labels, partners, weights = joined(batches)
    assert labels.tolist() == partners.tolist() == small_dataset.labels_N[rows].tolist()
    assert (weights == 1).all()
    expected = np.zeros((32, 32, 3), np.uint8)
    transform.render(Encoded(small_dataset.image_bytes(int(rows[12]))), expected)
    assert (images[12].numpy() == expected).all()


def test_a_rank_without_any_row_has_padding_alone(
    small_dataset: Dataset, preprocess: Preprocess
) -> None:
    world = World(7, 8)
    (batch,) = eval_batches(
        small_dataset,
        np.arange(3),
        EvalTransform(preprocess),
        batch_size=3,
        world=world,
        num_threads=1,
    )
    assert batch.mask_B.tolist() == [False]
    assert batch.num_global == 3


def streamed(dataset: Dataset, window: int) -> tuple[Dataset, list[int]]:
    """The data set as if it lay in groups of five rows; and the rows that are announced."""
    announced: list[int] = []
    other = copy(dataset)
    other.window = window
    other.__dict__["groups_N"] = np.arange(len(dataset)) // 5
    other.plan = announced.extend
    return other, announced


@pytest.mark.parametrize("size", [1, 3])
def test_a_streamed_data_set_is_read_in_the_order_that_was_announced(
    small_dataset: Dataset, preprocess: Preprocess, size: int
) -> None:
    for rank in range(size):
        dataset, announced = streamed(small_dataset, window=2)
        settings: dict[str, Any] = {"world": World(rank, size), "epoch": 1, "first_batch": 1}
        labels = joined(loaded(dataset, preprocess, **settings))[1].tolist()
        assert labels == small_dataset.labels_N[announced].tolist()
        live = [
            set(np.array(announced[i:]) // 5) & set(np.array(announced[: i + 1]) // 5)
            for i in range(len(announced))
        ]
        assert max(map(len, live)) <= 2


def test_evaluation_announces_no_padding(small_dataset: Dataset, preprocess: Preprocess) -> None:
    dataset, announced = streamed(small_dataset, window=2)
    settings: dict[str, Any] = {"batch_size": 7, "num_threads": 1, "world": World(1, 2)}
    batches = eval_batches(dataset, np.arange(7), EvalTransform(preprocess), **settings)
    assert sum(int(batch.mask_B.sum()) for batch in batches) == 3
    assert announced == [4, 5, 6]


def test_no_rows_make_no_batches(small_dataset: Dataset, preprocess: Preprocess) -> None:
    assert loaded(small_dataset, preprocess, rows=np.empty(0, np.int64)) == []


@given(st.integers(1, 600), st.integers(16, 1024), st.integers(1, 200))
def test_what_is_made_ahead_is_bounded_in_bytes(batch: int, size: int, threads: int) -> None:
    chunks = _chunks_ahead(batch, size, threads)
    chunk_bytes = _CHUNK * size * size * 3
    assert chunks == 1 or chunks * chunk_bytes <= _BYTES_AHEAD
    in_three_batches = 3 * -(-batch // _CHUNK)
    assert chunks in (max(in_three_batches, threads + 1), max(1, _BYTES_AHEAD // chunk_bytes))


def test_images_are_read_no_further_ahead_than_the_bytes_allow(
    small_dataset: Dataset, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_BYTES_AHEAD", 2 * _CHUNK * 32 * 32 * 3)
    dataset, read = copy(small_dataset), []
    dataset.image_bytes = lambda row: read.append(row) or small_dataset.image_bytes(row)
    transform = TrainTransform(MIXED, preprocess, 0)
    settings: dict[str, Any] = {"seed": 0, "epoch": 0, "world": World(), "num_threads": 8}
    batches = train_batches(dataset, np.arange(45), transform, batch_size=4, **settings)
    next(batches)
    batches.close()
    assert 3 <= len(read) <= 8


@given(st.lists(st.integers(0, 5), max_size=60))
def test_memory_is_used_again_but_never_under_a_tensor_that_is_held(drops: list[int]) -> None:
    buffers, held = Buffers(), []
    for number, drop in enumerate(drops):
        whole = torch.from_numpy(buffers.take((2, 3)))
        whole[:] = number % 256
        held.append((number % 256, whole.view(3, 2)[1:]))  # a view is enough
        del whole
        if drop < len(held):
            del held[drop]
    assert all((view == number).all() for number, view in held)
    assert len(buffers._buffers) <= 1 + 6 + len(held)


def test_memory_of_dropped_batches_is_used_again() -> None:
    buffers = Buffers()
    first = torch.from_numpy(buffers.take((2, 3)))
    place = first.data_ptr()
    other = buffers.take((2, 3))
    assert other.ctypes.data != place
    assert buffers.take((3, 2)).shape == (3, 2)
    del first
    assert buffers.take((2, 3)).ctypes.data == place


def data_threads() -> int:
    return sum(thread.name.startswith("tlrunner-data") for thread in threading.enumerate())


def test_closing_early_ends_the_threads(small_dataset: Dataset, preprocess: Preprocess) -> None:
    batches = train_batches(
        small_dataset,
        np.arange(45),
        TrainTransform(MIXED, preprocess, 0),
        seed=0,
        epoch=0,
        batch_size=4,
        world=World(),
        num_threads=3,
    )
    next(batches)
    assert data_threads() > 0
    batches.close()
    assert data_threads() == 0


def test_a_damaged_image_is_named_where_batches_are_consumed(
    tmp_path: Path, folder: Path, preprocess: Preprocess
) -> None:
    shards = Path(prepare(str(folder), tmp_path / "cache"))
    dataset = open_dataset(shards)
    image = bytes(dataset.image_bytes(5))
    path = shards / "shard-00000.parquet"
    path.write_bytes(path.read_bytes().replace(image, b"x" * len(image)))
    with pytest.raises(DataError, match=f"image {dataset.keys[5]} .*cannot be decoded any more"):
        loaded(open_dataset(shards), preprocess)
    assert data_threads() == 0
