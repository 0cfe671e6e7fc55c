"""Which batches a trial sees: its images, split once, in the order of each epoch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tlrunner.config import DataConfig, Preprocess, TrialConfig
from tlrunner.data.augment import EvalTransform, TrainTransform
from tlrunner.data.dataset import Dataset, open_dataset
from tlrunner.data.loader import Batch, eval_batches, num_batches, train_batches
from tlrunner.data.order import Splits, split_rows
from tlrunner.data.prepare import prepare
from tlrunner.data.world import World


def open_data(data: DataConfig, shards: Path | None = None) -> tuple[Dataset, Splits]:
    """The images of a config and their split; written as shards first where they are not yet."""
    if shards is None or not shards.is_dir():
        shards = prepare(data.uri, data.cache_dir, max_bad_fraction=data.max_bad_fraction)
    dataset = open_dataset(shards)
    splits = split_rows(
        dataset.ids_N,
        dataset.labels_N,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        limit=data.limit,
        class_names=dataset.class_names,
    )
    return dataset, splits


@dataclass(frozen=True)
class Feed:
    """Training batches by epoch, and validation batches, for one worker."""

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

    def train(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch counted from 0."""
        seed = self.config.train.seed
        return train_batches(
            self.dataset,
            self.splits.train,
            TrainTransform(self.config.augment, self.preprocess, seed),
            seed=seed,
            epoch=epoch,
            batch_size=self.config.train.batch_size,
            world=self.world,
            num_threads=self.num_threads,
            pin_memory=self.pin_memory,
        )

    def val(self) -> Iterator[Batch]:
        return eval_batches(
            self.dataset,
            self.splits.val,
            EvalTransform(self.preprocess),
            batch_size=self.config.train.batch_size,
            world=self.world,
            num_threads=self.num_threads,
            pin_memory=self.pin_memory,
        )
