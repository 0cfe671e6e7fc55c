"""Which batches a trial sees: its images, split once, in the order of each epoch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tlrunner.config import DataConfig, Preprocess, TrialConfig
from tlrunner.data.augment import EvalTransform, TrainTransform, short_side
from tlrunner.data.cache import NodeCache
from tlrunner.data.dataset import Dataset, load_manifest, open_dataset
from tlrunner.data.decoded import DecodedCache, Kept, KeptTransform
from tlrunner.data.fetch import open_store
from tlrunner.data.loader import (
    Batch,
    Share,
    eval_batches,
    eval_shares,
    num_batches,
    train_batches,
    train_shares,
)
from tlrunner.data.manifest import MANIFEST_NAME
from tlrunner.data.order import Rows, Splits, split_rows
from tlrunner.data.prepare import prepare
from tlrunner.data.store import LocalStore
from tlrunner.data.world import World
from tlrunner.errors import ConfigError, DataError
from tlrunner.machine import memory_bytes
from tlrunner.train.demand import seed_of_views
from tlrunner.train.images import Images
from tlrunner.uris import local_path


def which(dataset: Dataset) -> Images:
    return Images(dataset.uri, dataset.manifest.sha256)


def open_data(data: DataConfig, images: Images | None = None) -> tuple[Dataset, Splits]:
    """The images of a config and their split; written as shards first where they are not yet.

    Raises:
        DataError: they are not `images`, or no images.
    """
    is_seen = images is not None and _is_seen(images.shards)
    shards = (
        images.shards
        if images and is_seen
        else prepare(data.uri, data.cache_dir, max_bad_fraction=data.max_bad_fraction)
    )
    data = settle_streaming(data, shards)
    dataset = open_dataset(shards, node_cache(data), streamed=data.streaming == "on")
    if images and dataset.manifest.sha256 != images.sha256:
        raise DataError(
            f"{data.uri} is not on this node what it was where the run began",
            "images that all nodes see, or shards in S3",
            "prepare them to s3:// with jobs/prepare_images.py",
        )
    return dataset, split_data(data, dataset)


def _is_seen(shards: str) -> bool:
    """Whether this node sees shards that another prepared; it makes its own where it does not.

    The directory alone says nothing: a process beside this one may just be writing them.
    """
    store = open_store(shards)
    return not isinstance(store, LocalStore) or (store.root / MANIFEST_NAME).is_file()


def split_data(data: DataConfig, dataset: Dataset) -> Splits:
    """Which rows train, validate and test.

    Raises:
        DataError, ConfigError: see `split_rows`.
    """
    return split_rows(
        dataset.ids_N,
        dataset.labels_N,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        limit=data.limit,
        class_names=dataset.class_names,
        given_N=dataset.splits_N,
    )


class _Kept(Protocol):
    """Config keys that say where a node keeps what it fetched."""

    @property
    def cache_dir(self) -> str: ...
    @property
    def cache_bytes(self) -> int | None: ...


def node_cache(data: _Kept) -> NodeCache:
    return NodeCache(local_path(data.cache_dir) / "node", data.cache_bytes)


def settle_streaming(data: DataConfig, shards: str) -> DataConfig:
    """Decide what `streaming: auto` leaves open: shards in S3 that this node cannot keep.

    Raises:
        ConfigError: they must be streamed, and are to be kept decoded.
    """
    if data.streaming != "auto":
        return data
    cache = node_cache(data)
    is_on = not fits(shards, cache)
    if is_on and data.decoded_cache == "on":
        raise ConfigError(
            f"data.decoded_cache is on, and the shards in {shards} do not fit into the "
            f"{cache.limit:,} bytes of the cache, so they would be streamed",
            "decoded_cache: auto or off",
            "or raise data.cache_bytes",
        )
    return data.model_copy(update={"streaming": "on" if is_on else "off"})


def fits(shards: str, cache: NodeCache) -> bool:
    """Whether shards are on this machine already, or can be kept here."""
    store = open_store(shards)
    return isinstance(store, LocalStore) or load_manifest(store).num_bytes <= cache.limit


def settle_decoded_cache(
    data: DataConfig, dataset: Dataset, splits: Splits, preprocesses: Iterable[Preprocess]
) -> DataConfig:
    """Decide what `decoded_cache: auto` leaves open, for all preprocessings of a search at once.

    `streaming` is settled before.
    """
    if data.decoded_cache != "auto":
        return data
    median = np.median(dataset.sizes_N2[splits.train].min(axis=1))
    different = {repr(preprocess): preprocess for preprocess in preprocesses}.values()
    larger = [preprocess for preprocess in different if median > short_side(preprocess)]
    wanted = sum(_kept(dataset, splits, preprocess).num_bytes for preprocess in larger)
    is_near = isinstance(open_store(dataset.uri), LocalStore)
    shard_bytes = 0 if is_near else dataset.manifest.num_bytes  # which take their room as well
    room = min(node_cache(data).limit - shard_bytes, memory_bytes() // 2)
    is_on = data.streaming != "on" and 0 < wanted <= room
    return data.model_copy(update={"decoded_cache": "on" if is_on else "off"})


def _kept(dataset: Dataset, splits: Splits, preprocess: Preprocess) -> Kept:
    return Kept(splits.train, splits.val, dataset.sizes_N2, preprocess)


def in_reading_order(dataset: Dataset, rows_R: Rows) -> Rows:
    """Rows whose order does not matter, as streaming reads them: each row group once."""
    return rows_R if dataset.window is None else np.sort(rows_R)


def use_decoded_cache(
    data: DataConfig, dataset: Dataset, splits: Splits, preprocess: Preprocess
) -> None:
    """Have the rows' pixels come from the node's cache, if the config says so."""
    if dataset.window is not None:
        return  # streamed: what is not kept encoded is not kept decoded
    if settle_decoded_cache(data, dataset, splits, [preprocess]).decoded_cache == "on":
        kept = _kept(dataset, splits, preprocess)
        dataset.decoded = DecodedCache(
            node_cache(data), dataset.manifest.sha256, kept, dataset.images.read
        )


@dataclass(frozen=True)
class Feed:
    """Training batches by epoch, and validation batches, for one worker.

    Their iterators raise DataError where a shard changed while it was read.
    """

    config: TrialConfig
    dataset: Dataset
    splits: Splits
    preprocess: Preprocess
    world: World
    pin_memory: bool

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return num_batches(len(self.splits.train), self.config.train.batch_size)

    @property
    def num_threads(self) -> int:
        return self.config.data.num_workers or self.config.resources.cpus_per_worker

    @property
    def micro_batch_size(self) -> int:
        """The most images that a worker computes at once."""
        share = -(-self.config.train.batch_size // self.world.size)
        return -(-share // self.config.train.gradient_accumulation_steps)

    @property
    def train_transform(self) -> TrainTransform:
        return TrainTransform(self.config.augment, self.preprocess, seed_of_views(self.config))

    @property
    def eval_transform(self) -> EvalTransform | KeptTransform:
        return (KeptTransform if self.dataset.decoded else EvalTransform)(self.preprocess)

    def train_shares(self, epoch: int) -> list[Share]:
        """What this worker has of each batch of an epoch."""
        return train_shares(
            self.dataset,
            self.splits.train,
            seed=self.config.train.seed,
            epoch=epoch,
            batch_size=self.config.train.batch_size,
            world=self.world,
        )

    def val_shares(self) -> list[Share]:
        """What this worker has of each batch of validation."""
        rows = in_reading_order(self.dataset, self.splits.val)
        return eval_shares(rows, batch_size=self.config.train.batch_size, world=self.world)

    def check_shares(self) -> None:
        """Check that each worker has something of each batch.

        Raises:
            ConfigError: there are more workers than images in a batch.
        """
        smallest = len(self.splits.train) // self.num_steps
        if smallest < self.world.size:
            raise ConfigError(
                f"resources.workers_per_trial is {self.world.size}, and a batch of the "
                f"{len(self.splits.train)} images has {smallest}",
                f"1..{smallest}",
                "or raise train.batch_size",
            )

    def train(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch counted from 0, from one of them on."""
        batches = train_batches(
            self.dataset,
            self.splits.train,
            self.train_transform,
            seed=self.config.train.seed,
            epoch=epoch,
            batch_size=self.config.train.batch_size,
            world=self.world,
            num_threads=self.num_threads,
            first_batch=first_batch,
            pin_memory=self.pin_memory,
        )
        return self._unchanged(batches)

    def val(self) -> Iterator[Batch]:
        rows = in_reading_order(self.dataset, self.splits.val)
        return self.plain(rows, self.config.train.batch_size)

    def plain(self, rows: Rows, batch_size: int) -> Iterator[Batch]:
        """Batches of any rows, in their order, as an evaluation sees them."""
        batches = eval_batches(
            self.dataset,
            rows,
            self.eval_transform,
            batch_size=batch_size,
            world=self.world,
            num_threads=self.num_threads,
            pin_memory=self.pin_memory,
        )
        return self._unchanged(batches)

    def _unchanged(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """No figure is told of an epoch whose shards were not the same to its end."""
        yield from batches
        self.dataset.check_unchanged()
