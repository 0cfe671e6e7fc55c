import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

import tlrunner
from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.data.dataset import open_dataset
from tlrunner.data.order import split_rows
from tlrunner.errors import StorageError
from tlrunner.model.freeze import levels
from tlrunner.train import loaded
from tlrunner.train.checkpoint import read_checkpoint
from tlrunner.train.export import export_model, read_config
from tlrunner.train.images import Images
from tlrunner.train.loaded import load_classifier
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import EpochReport, TrialDir

FILES = ("model.safetensors", "trial.json", "labels.json", "preprocess.json", "metrics.json")


@pytest.fixture
def best(trained: TrialDir, colour_shards: Path, tmp_path: Path) -> Path:
    """The tiny trial, exported."""
    return export(trained, colour_shards, tmp_path / "best")


def export(trial: TrialDir, shards: Path, out: Path) -> Path:
    export_model(trial.read(), trial, open_dataset(shards).manifest, out)
    return out


def val_images(shards: Path, config: TrialConfig) -> list[tuple[bytes, int]]:
    """Stored bytes and label of each image that validates."""
    dataset = open_dataset(shards)
    splits = split_rows(
        dataset.ids_N, dataset.labels_N, config.data.val_fraction, config.data.test_fraction
    )
    return [
        (bytes(dataset.image_bytes(row)), int(dataset.labels_N[row])) for row in splits.val.tolist()
    ]


def reaches_what_was_reported(best: Path, shards: Path, reported: EpochReport) -> bool:
    """Whether a deployed model has the accuracy and the loss of an epoch of its trial."""
    model, _, transform = tlrunner.load(best)
    images = val_images(shards, read_config(best))
    labels = torch.tensor([label for _, label in images])
    with torch.inference_mode():
        logits = model(torch.stack([transform(data) for data, _ in images]))
    acc = (logits.argmax(1) == labels).sum().item() / len(images)
    loss = cross_entropy(logits, labels).item()
    return acc == reported.val_acc and loss == pytest.approx(reported.val_loss, rel=1e-4)


@pytest.mark.parametrize(
    "values",
    [
        {"train.epochs": 5},
        {"train.epochs": 3, "train.ema_decay": 0.8},
        {"backbone.name": "shufflenet_v2_x0_5", "freeze.strategy": "last_stages"},
        {"head.kind": "flatten_mlp", "head.hidden_sizes": (8,)},
    ],
    ids=["plain", "averaged", "batch_norm", "flatten_mlp"],
)
def test_a_deployed_model_reaches_what_was_reported(
    tiny_trial: TrialConfig,
    colour_shards: Path,
    colour_images: Images,
    tmp_path: Path,
    values: dict[str, Any],
) -> None:
    trial = TrialDir(tmp_path / "trial")
    config = with_values(tiny_trial, values)
    result = run_trial(config, lambda report: None, trial_dir=trial.path, images=colour_images)
    best = export(trial, colour_shards, tmp_path / "best")
    assert reaches_what_was_reported(best, colour_shards, result.best)


def test_a_deployed_model_gives_the_logits_of_the_trial(
    best: Path, trained: TrialDir, colour_shards: Path
) -> None:
    record = trained.read()
    classifier, _ = load_classifier(record.config, num_classes=3)
    classifier.set_levels(levels(record.config.freeze, len(classifier.stages.names), 0))
    tensors, _ = read_checkpoint(trained.best_checkpoint(record.best))
    classifier.load_trainable_state(tensors)
    model, labels, transform = tlrunner.load(best)
    images = torch.stack([transform(data) for data, _ in val_images(colour_shards, record.config)])
    with torch.inference_mode():
        assert torch.allclose(model(images), classifier.eval()(images), atol=1e-5)
    assert labels == ("blue", "green", "red")
    assert not model.training


def test_weights_that_changed_since_the_training_are_not_exported(
    tiny_trial: TrialConfig,
    colour_shards: Path,
    colour_images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trial = TrialDir(tmp_path / "trial")
    config = with_values(tiny_trial, {"backbone.name": "efficientnet_lite0"})
    config = with_values(config, {"backbone.weights": "default", "freeze.strategy": "head"})
    run_trial(config, lambda report: None, trial_dir=trial.path, images=colour_images)
    export(trial, colour_shards, tmp_path / "best")
    monkeypatch.setattr(loaded, "fingerprint_state", lambda state: "0" * 64)
    with pytest.raises(StorageError, match="the weights of backbone efficientnet_lite0 changed"):
        export(trial, colour_shards, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["lp_ft", "gradual"])
def test_the_best_epoch_can_be_of_any_phase(
    tiny_trial: TrialConfig,
    colour_shards: Path,
    colour_images: Images,
    tmp_path: Path,
    strategy: str,
    epoch: int,
) -> None:
    trial = TrialDir(tmp_path / "trial")
    config = with_values(tiny_trial, {"freeze.strategy": strategy, "train.epochs": 3})

    def stop(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(config, stop, trial_dir=trial.path, images=colour_images)
    best = export(trial, colour_shards, tmp_path / "best")
    assert reaches_what_was_reported(best, colour_shards, trial.read().best)


def test_an_image_gives_the_same_input_in_whatever_form_it_comes(
    best: Path, colour_folder: Path
) -> None:
    transform = tlrunner.load(best).transform
    path = colour_folder / "red" / "00.jpg"
    from_path = transform(path)
    assert from_path.shape == (3, 32, 32)
    assert from_path.dtype == torch.float32
    assert torch.equal(transform(str(path)), from_path)
    assert torch.equal(transform(path.read_bytes()), from_path)

    pixels_HWC = np.asarray(Image.open(path))
    png = io.BytesIO()
    Image.fromarray(pixels_HWC).save(png, "PNG")
    from_array: Tensor = transform(pixels_HWC)
    assert torch.equal(transform(Image.fromarray(pixels_HWC)), from_array)
    assert torch.equal(transform(png.getvalue()), from_array)


def test_a_pil_image_gives_the_same_input_as_its_file(best: Path, tmp_path: Path) -> None:
    transform = tlrunner.load(best).transform
    levels_HW = np.linspace(0, 255, 40 * 60).astype(np.uint8).reshape(40, 60)
    pixels_HWC = np.stack([levels_HW, levels_HW.T.reshape(40, 60), 255 - levels_HW], 2)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(pixels_HWC).save(tmp_path / "rotated.jpg", exif=rotated)
    alpha_HWC = np.dstack([pixels_HWC, levels_HW])
    Image.fromarray(alpha_HWC).save(tmp_path / "alpha.png")
    Image.fromarray(levels_HW.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("rotated.jpg", "alpha.png", "deep.png"):
        path = tmp_path / name
        with Image.open(path) as image:
            given = transform(image)
        assert torch.equal(given, transform(path)), name
        assert torch.equal(given, transform(path.read_bytes())), name
        with Image.open(path) as image:
            plain = transform(np.asarray(image.convert("RGB")))
        assert not torch.equal(given, plain), name


def test_the_exported_config_is_the_one_that_trained(best: Path, trained: TrialDir) -> None:
    assert read_config(best) == trained.read().config


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_a_deployed_model_is_named(best: Path, name: str) -> None:
    content = bytearray((best / name).read_bytes())
    content[len(content) // 2] ^= 1
    (best / name).write_bytes(content)
    with pytest.raises(StorageError, match=f"{name} differs from what was committed"):
        tlrunner.load(best)


def test_a_directory_that_is_no_model_is_a_storage_error(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StorageError, match=r"holds no COMMIT\.json"):
            tlrunner.load(directory)


def test_a_rotten_checkpoint_is_not_exported(
    trained: TrialDir, colour_shards: Path, tmp_path: Path
) -> None:
    path = next(trained.checkpoints.glob("*/trainable.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"trainable\.safetensors differs"):
        export(trained, colour_shards, tmp_path / "best")
    assert not (tmp_path / "best" / "COMMIT.json").exists()


def test_a_deployed_model_can_be_moved(best: Path, tmp_path: Path) -> None:
    moved = shutil.move(best, tmp_path / "elsewhere")
    assert tlrunner.load(moved).labels == ("blue", "green", "red")
