"""A model and images -> predictions: a Parquet file, and metrics where the labels are known.

    OUT/NAME/predictions.parquet   key, label (null if unknown), prediction, probabilities, split
    OUT/NAME/metrics.json          accuracy over all, and over each split the model was made with

`split` says what an image was to the model: train, val, test, or null for an image (or a whole
data set) that its run did not use. metrics.json is written last.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.console import Console

from tlrunner.config import TrialConfig
from tlrunner.data.dataset import Dataset, open_dataset, verify_shards
from tlrunner.data.loader import eval_batches
from tlrunner.data.order import Rows, limit_rows
from tlrunner.data.prepare import prepare
from tlrunner.data.sources import open_source
from tlrunner.data.world import World
from tlrunner.files import write_json, write_with
from tlrunner.jobconfig import PredictJob
from tlrunner.machine import num_cpus
from tlrunner.report.rundir import check_empty, place_for
from tlrunner.screen import preparing
from tlrunner.stored import read_stored
from tlrunner.train.device import keep_freed_memory
from tlrunner.train.export import Deployed, load, local_model, read_config
from tlrunner.train.feed import fits, in_reading_order, node_cache, split_data
from tlrunner.train.loop import ModelInput
from tlrunner.uris import absolute

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class _Origin:
    """`metrics.json` of a model, as far as it is read back."""

    data_sha256: str


@dataclass(frozen=True)
class Predictions:
    """One row an image; K classes. `truth_N` is the model's class number, -1 where unknown."""

    rows_N: Rows
    probabilities_NK: NDArray[np.float32]
    truth_N: NDArray[np.int64]
    splits_N: list[str | None]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The model's class number of each image."""
        return np.asarray(self.probabilities_NK.argmax(1), np.int64)


def predict(job: PredictJob, model_uri: str, job_name: str, out: Console, dry_run: bool) -> int:
    """Predict every image behind a URI. Gives the exit code."""
    model = local_model(model_uri, job.data.cache_dir)
    deployed, config = load(model), read_config(model)
    uri = absolute(job.data.uri)
    if dry_run:
        source = open_source(uri, labelled=False, cache_dir=job.data.cache_dir)
        out.print(f"{len(source)} images in {uri}; labels: {', '.join(deployed.labels)}")
        return 0
    place = place_for(job.output, job_name, job.data.cache_dir)
    check_empty(place)
    with preparing(out) as progress:
        shards = prepare(
            uri,
            job.data.cache_dir,
            max_bad_fraction=job.data.max_bad_fraction,
            labelled=False,
            progress=progress,
        )
    verify_shards(shards)
    cache = node_cache(job.data)
    dataset = open_dataset(shards, cache, streamed=not fits(shards, cache))
    rows_N = limit_rows(dataset.ids_N, dataset.labels_N, job.data.limit)
    rows_N = in_reading_order(dataset, rows_N)
    predictions = Predictions(
        rows_N,
        _probabilities(deployed, config, dataset, rows_N, job),
        _truth(dataset, rows_N, deployed.labels),
        _splits(model, config, dataset, rows_N),
    )
    table = _table(predictions, dataset, deployed.labels)
    write_with(place.path / "predictions.parquet", lambda file: pq.write_table(table, file))
    metrics = measure(predictions)
    write_json(place.path / "metrics.json", {"model": model_uri, "data": uri, **metrics})
    place.save(place.path / "predictions.parquet", place.path / "metrics.json")
    accuracy = "unknown" if metrics["accuracy"] is None else f"{metrics['accuracy']:.4f}"
    out.print(
        f"{metrics['num_images']} images predicted, accuracy {accuracy}: {place}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def measure(predictions: Predictions) -> dict[str, Any]:
    """Accuracy over all images with a known label, and over those of each split."""
    known_N = predictions.truth_N >= 0
    correct_N = predictions.predicted == predictions.truth_N
    splits_N = np.array([split or "" for split in predictions.splits_N])

    def over(chosen_N: NDArray[np.bool_]) -> dict[str, Any]:
        count = int(chosen_N.sum())
        accuracy = int(correct_N[chosen_N].sum()) / count if count else None
        return {"num_labelled": count, "accuracy": accuracy}

    by_split = {split: over(known_N & (splits_N == split)) for split in SPLITS}
    return {
        "num_images": len(predictions.rows_N),
        **over(known_N),
        "by_split": {split: found for split, found in by_split.items() if found["num_labelled"]},
    }


def _probabilities(
    deployed: Deployed, config: TrialConfig, dataset: Dataset, rows_N: Rows, job: PredictJob
) -> NDArray[np.float32]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    model = deployed.model.to(device)
    model_input = ModelInput(deployed.transform.preprocess, device)
    parts = []
    with torch.inference_mode(), _autocast(config, device):
        for images_BHWC in _images(deployed, dataset, rows_N, job):
            logits_BK = model(model_input(images_BHWC))
            parts.append(logits_BK.float().softmax(1).cpu().numpy())
    return np.concatenate(parts)


def _images(
    deployed: Deployed, dataset: Dataset, rows_N: Rows, job: PredictJob
) -> Iterator[torch.Tensor]:
    for batch in eval_batches(
        dataset,
        rows_N,
        deployed.transform.transform,
        batch_size=job.data.batch_size,
        world=World(),
        pin_memory=torch.cuda.is_available(),
        num_threads=job.data.num_workers or num_cpus(),
    ):
        yield batch.images_BHWC


def _autocast(config: TrialConfig, device: torch.device) -> AbstractContextManager[None]:
    """The precision that the model was validated in, as far as the device has it."""
    precision = config.train.mixed_precision
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    enabled = precision == "bf16" or (precision == "fp16" and device.type == "cuda")
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def _truth(dataset: Dataset, rows_N: Rows, labels: tuple[str, ...]) -> NDArray[np.int64]:
    """The model's class number of each row, by class name; -1 for unlabelled and foreign ones."""
    own = [labels.index(name) if name in labels else -1 for name in dataset.class_names]
    return np.array([*own, -1])[dataset.labels_N[rows_N]]  # label -1 meets the last entry


def _splits(model: Path, config: TrialConfig, dataset: Dataset, rows_N: Rows) -> list[str | None]:
    """What each image was to the model; known only for the very images it was made from."""
    split_of: dict[int, str] = {}
    if read_stored(_Origin, model / "metrics.json").data_sha256 == dataset.manifest.sha256:
        splits = split_data(config.data, dataset)
        for name in SPLITS:
            split_of |= dict.fromkeys(getattr(splits, name).tolist(), name)
    return [split_of.get(row) for row in rows_N.tolist()]


def _table(predictions: Predictions, dataset: Dataset, labels: tuple[str, ...]) -> pa.Table:
    names = [*labels, None]  # class number -1 is no name
    keys = dataset.keys
    probabilities_NK = predictions.probabilities_NK
    return pa.table(
        {
            "key": [keys[row] for row in predictions.rows_N],
            "label": pa.array([names[i] for i in predictions.truth_N], pa.string()),
            "prediction": [labels[i] for i in predictions.predicted],
            "probabilities": pa.FixedSizeListArray.from_arrays(
                pa.array(probabilities_NK.ravel()), probabilities_NK.shape[1]
            ),
            "split": pa.array(predictions.splits_N, pa.string()),
        }
    ).replace_schema_metadata({"labels": ",".join(labels)})
