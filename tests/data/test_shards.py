"""Shards read from files and streamed from a store: the same bytes, and what can go wrong."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import encoded, image_folder, picture

from tlrunner.config import AugmentConfig, Preprocess
from tlrunner.data import dataset as dataset_module
from tlrunner.data import shardfile, write
from tlrunner.data.augment import TrainTransform
from tlrunner.data.dataset import Dataset, StoredImages, open_dataset
from tlrunner.data.loader import Batch, eval_batches, train_batches
from tlrunner.data.order import window_order
from tlrunner.data.shards import StreamedShards
from tlrunner.data.sources import open_source
from tlrunner.data.store import LocalStore, Part
from tlrunner.data.world import World
from tlrunner.data.write import write_shards
from tlrunner.errors import DataError, StorageError

WINDOW = 2


class CountingStore(LocalStore):
    """Keeps a list of what was read."""

    def read(self, name: str, part: Part | None = None) -> bytes:
        READS.append((name, part))
        return super().read(name, part)


READS: list[tuple[str, Part | None]] = []


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty images in several shards of several row groups."""
    monkeypatch.setattr(shardfile, "ROW_GROUP_BYTES", 3000)
    monkeypatch.setattr(shardfile, "MAX_ROW_GROUP_BYTES", 4000)
    monkeypatch.setattr(write, "MIN_SHARD_BYTES", 8000)
    monkeypatch.setattr(dataset_module, "WINDOW", WINDOW)
    image_folder(tmp_path / "images", each=30)
    write_shards(open_source(str(tmp_path / "images")), tmp_path / "shards")
    return tmp_path / "shards"


def loaded(dataset: Dataset, preprocess: Preprocess, **changed: Any) -> Iterator[Batch]:
    """Training batches of all rows."""
    transform = TrainTransform(AugmentConfig(), preprocess, 0)
    settings = {"seed": 0, "epoch": 0, "batch_size": 8, "world": World(), "num_threads": 2}
    return train_batches(dataset, np.arange(len(dataset)), transform, **settings | changed)


def test_streamed_rows_are_the_rows_of_the_files(shards: Path) -> None:
    near, far = open_dataset(shards), open_dataset(shards, streamed=True)
    assert far.keys == near.keys
    order = window_order(far.ids_N, far.groups_N, 0, 0, WINDOW)
    far.plan(order)
    with ThreadPoolExecutor(4) as pool:
        for row, content in zip(order, pool.map(far.image_bytes, order.tolist()), strict=True):
            assert content == near.image_bytes(int(row))
    assert far.image_bytes(7) == near.image_bytes(7)  # also when nothing is planned


def test_each_row_group_is_fetched_once_an_epoch_and_few_are_held(shards: Path) -> None:
    dataset = open_dataset(shards, streamed=True)
    assert isinstance(dataset.shards, StreamedShards)
    dataset.shards.store = CountingStore(shards)
    READS.clear()
    order = window_order(dataset.ids_N, dataset.groups_N, 0, 3, WINDOW)
    dataset.plan(order)
    for row in order.tolist():
        dataset.image_bytes(row)
        assert len(dataset.shards._held) <= 2 * WINDOW
    num_groups = len(np.unique(dataset.groups_N))
    assert num_groups > 4 * WINDOW
    assert len(READS) == len(set(READS)) == num_groups
    assert not dataset.shards._held


def test_an_epoch_that_is_left_early_can_be_followed_by_another(
    shards: Path, preprocess: Preprocess
) -> None:
    dataset = open_dataset(shards, streamed=True)
    for epoch, taken in ((0, 2), (1, 100)):
        batches = loaded(dataset, preprocess, epoch=epoch)
        seen = [batch for batch, _ in zip(batches, range(taken), strict=False)]
        batches.close()  # type: ignore[attr-defined]
    assert sum(len(batch.labels_B) for batch in seen) == len(dataset)


def test_ranks_stream_the_same_global_batches(shards: Path, preprocess: Preprocess) -> None:
    def labels(size: int) -> list[list[int]]:
        ranks = []
        for rank in range(size):
            dataset = open_dataset(shards, streamed=True)
            batches = loaded(dataset, preprocess, epoch=1, world=World(rank, size))
            ranks.append([batch.labels_B.tolist() for batch in batches])
        return [[label for part in parts for label in part] for parts in zip(*ranks, strict=True)]

    assert labels(1) == labels(2) == labels(3)


def test_a_streamed_group_with_other_bytes_is_refused(shards: Path) -> None:
    path = shards / "shard-00001.parquet"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    dataset = open_dataset(shards, streamed=True)
    path.write_bytes(content)
    rows = np.arange(len(dataset))
    dataset.plan(rows)
    with pytest.raises((StorageError, DataError), match=r"shard-00001\.parquet"):
        for row in rows.tolist():
            dataset.image_bytes(row)


def test_a_shard_that_is_listed_but_absent_is_named(shards: Path) -> None:
    dataset = open_dataset(shards, streamed=True)
    (shards / "shard-00001.parquet").unlink()
    dataset.plan(np.arange(len(dataset)))
    absent = pytest.raises(DataError, match=r"shard-00001\.parquet is not in .*manifest lists it")
    with absent:
        for row in range(len(dataset)):
            dataset.image_bytes(row)
    with absent:
        open_dataset(shards)


@pytest.mark.parametrize("change", ["cut", "other", "gone"])
def test_a_shard_that_changes_under_a_run_is_noticed(shards: Path, change: str) -> None:
    dataset = open_dataset(shards)
    path = shards / "shard-00000.parquet"
    if change == "cut":
        os.truncate(path, 100)
        with pytest.raises(DataError, match=r"shard-00000\.parquet changed while"):
            dataset.image_bytes(3)
    elif change == "other":
        path.write_bytes(path.read_bytes())
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"shard-00000\.parquet changed while"):
        dataset.check_unchanged()


def test_evaluation_streams_in_the_order_of_the_files(shards: Path, preprocess: Preprocess) -> None:
    from tlrunner.data.augment import EvalTransform
    from tlrunner.train.feed import in_reading_order

    near, far = open_dataset(shards), open_dataset(shards, streamed=True)
    rows = np.arange(0, 60, 3)[::-1]
    assert (in_reading_order(near, rows) == rows).all()
    ordered = in_reading_order(far, rows)
    pixels = []
    for dataset in (near, far):
        batches = eval_batches(
            dataset, ordered, EvalTransform(preprocess), batch_size=7, world=World(), num_threads=2
        )
        pixels.append(np.concatenate([batch.images_BHWC.numpy() for batch in batches]))
    assert (pixels[0] == pixels[1]).all()


@pytest.mark.parametrize("fault", ["absent shards", "a damaged image", "left early"])
def test_no_thread_waits_for_groups_that_will_not_be_read(
    shards: Path, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(dataset_module, "WINDOW", 1)  # so that look-ahead goes beyond it
    dataset = open_dataset(shards, streamed=True)
    if fault == "absent shards":
        for path in shards.glob("*.parquet"):
            path.unlink()
    if fault == "a damaged image":
        monkeypatch.setattr(type(dataset), "image_bytes", _damaged_but_read)
    batches = loaded(dataset, preprocess, batch_size=16, num_threads=6)
    if fault == "left early":
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        return
    with pytest.raises(DataError):
        list(batches)


def _damaged_but_read(dataset: Dataset, row: int) -> bytes:
    StoredImages.read(dataset.images, row)
    return b"no image" if row % 7 == 3 else encoded(picture())
