"""What is deployed: a directory that `load` turns back into a model, its labels and its transform.

model.safetensors   every tensor of the model, frozen ones included
trial.json          the TrialConfig, which `jobs/train.py --config` reproduces
labels.json         class names by output
preprocess.json     how an image becomes input
metrics.json        what the model reached, and when
COMMIT.json         size and SHA-256 of each of the above
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tlrunner.config import CACHE_DIR, BackboneConfig, Preprocess, TrialConfig
from tlrunner.data.augment import EvalTransform
from tlrunner.data.decode import (
    Decoded,
    Encoded,
    Picture,
    encode_jpeg,
    is_encoded_anew,
    normalise,
    upright_rgb,
)
from tlrunner.data.manifest import Manifest
from tlrunner.errors import StorageError
from tlrunner.files import locked, write_json
from tlrunner.model.classifier import Classifier, build_classifier
from tlrunner.model.freeze import levels
from tlrunner.stored import not_as_written, read_stored
from tlrunner.train.checkpoint import (
    COMMIT,
    load_tensors,
    read_checkpoint,
    save_tensors,
    verify_commit,
    write_commit,
)
from tlrunner.train.loaded import load_classifier
from tlrunner.train.loop import ModelInput
from tlrunner.train.place import place_at
from tlrunner.train.trial_dir import TrialDir, TrialRecord


class ImageTransform:
    """An image -> the normalised float tensor (3, H, W) the model expects.

    Takes a path, the bytes of an image file, a PIL image, or a uint8 array (H, W, 3) in RGB. All
    are turned upright and laid on white as the images of a data set are. (Of a plain JPEG, path
    and bytes are decoded straight to a smaller size, which a PIL image cannot be any more.)
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        self.transform = EvalTransform(preprocess)
        self.model_input = ModelInput(preprocess, torch.device("cpu"))

    def __call__(self, image: str | Path | bytes | Image.Image | np.ndarray) -> Tensor:
        side = self.preprocess.image_size
        pixels_HWC = np.empty((side, side, 3), np.uint8)
        self.transform.render(_picture(image), pixels_HWC)
        batch_BHWC = torch.from_numpy(pixels_HWC)[None]
        return self.model_input(batch_BHWC)[0].contiguous()


class Deployed(NamedTuple):
    """A model in eval mode, the names of its outputs, and what turns an image into its input."""

    model: Classifier
    labels: tuple[str, ...]
    transform: ImageTransform


def export_model(record: TrialRecord, trial: TrialDir, images: Manifest, out: Path) -> None:
    """Write the best epoch of a trial into the directory `out`, its commit last.

    `images`: the manifest of what it was trained on.

    Raises:
        StorageError: the checkpoint is not whole, the pretrained weights are others than it was
            trained with, or `out` cannot be written.
    """
    best = record.best
    assert best is not None, "only a trial with a finished epoch is exported"
    trained, state = read_checkpoint(trial.best_checkpoint(best))
    num_classes, weights_sha256 = len(images.class_names), state.get("weights_sha256")
    classifier, preprocess = load_classifier(record.config, num_classes, weights_sha256)
    num_stages = len(classifier.stages.names)
    classifier.set_levels(levels(record.config.freeze, num_stages, best.epoch - 1))
    classifier.load_trainable_state(trained)
    save_tensors(out / "model.safetensors", classifier.state_dict())
    write_json(out / "trial.json", record.config.model_dump(mode="json"))
    write_json(out / "labels.json", list(images.class_names))
    write_json(out / "preprocess.json", preprocess.model_dump(mode="json"))
    origin = {"trial_id": record.trial_id, "data_sha256": images.sha256}
    write_json(out / "metrics.json", {**origin, **asdict(best)})
    write_commit(out)


def load(path: str | Path, cache_dir: str | Path = CACHE_DIR) -> Deployed:
    """The model in a directory that a run exported (`RUN/best`), ready to predict.

    `path`: the directory, or its s3:// URI; from there it is fetched into `cache_dir` once.

    Raises:
        StorageError: not such a directory, or a file in it is not what was written.
    """
    directory = local_model(path, cache_dir)
    verify_commit(directory)
    config = read_config(directory)
    labels = read_stored(tuple[str, ...], directory / "labels.json")
    if not labels:
        raise not_as_written(directory / "labels.json", "no labels", "at least one")
    preprocess = read_stored(Preprocess, directory / "preprocess.json")
    architecture = BackboneConfig(name=config.backbone.name, weights="none")
    classifier, _ = build_classifier(architecture, config.head, len(labels), preprocess.image_size)
    weights = directory / "model.safetensors"
    try:
        classifier.load_state_dict(load_tensors(weights))
    except RuntimeError as err:  # names or shapes that are not the model's
        raise not_as_written(weights, str(err)[:200], "the tensors of that model") from err
    return Deployed(classifier.eval(), labels, ImageTransform(preprocess))


def local_model(path: str | Path, cache_dir: str | Path) -> Path:
    """The directory of an exported model on this node.

    Raises:
        StorageError: it is in S3 and cannot be fetched.
    """
    place = place_at(str(path), cache_dir)
    if place.uri:
        try:
            commit = place.store.read(COMMIT)
        except FileNotFoundError as err:
            raise StorageError(f"{place} holds no {COMMIT}", "RUN/best of a finished run") from err
        with locked(place.path.with_name(f"{place.path.name}.lock")):
            if not _is_here(place.path, commit):
                place.fetch(last=COMMIT)
    return place.path


def _is_here(directory: Path, commit: bytes) -> bool:
    """Whether a directory holds what a COMMIT.json vouches for."""
    if not (directory / COMMIT).is_file() or (directory / COMMIT).read_bytes() != commit:
        return False
    try:
        verify_commit(directory)
    except StorageError:
        return False
    return True


def read_config(directory: Path) -> TrialConfig:
    """The config that trained an exported model."""
    return read_stored(TrialConfig, directory / "trial.json")


def _picture(image: Any) -> Picture:
    """Any image as a data set would hold it, so that it is rendered like one of its."""
    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        is_anew, pixels_HWC = is_encoded_anew(image), upright_rgb(image)
        return Encoded(encode_jpeg(pixels_HWC)) if is_anew else Decoded(pixels_HWC)
    return Encoded(normalise(image).data)
