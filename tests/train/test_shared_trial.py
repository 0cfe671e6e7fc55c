"""One trial in several workers: equal figures wherever no BatchNorm trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from workers import run_in_parts, run_in_workers

from tlrunner.config import BackboneConfig, HeadConfig, TrialConfig
from tlrunner.configfile import with_values
from tlrunner.model.classifier import build_classifier
from tlrunner.model.freeze import Level
from tlrunner.train.images import Images
from tlrunner.train.trial_dir import TrialDir

FIGURES = ("val_acc", "val_loss", "train_loss", "trainable_params")
SHUFFLENET = {"backbone.name": "shufflenet_v2_x0_5"}
# Frozen BatchNorm, no norm at all, LayerNorm; phases, accumulation, averaging, mixing.
WITHOUT_MOVING_STATISTICS: dict[str, dict[str, Any]] = {
    "head only": SHUFFLENET | {"freeze.strategy": "head", "optim.lr": 0.01},
    "every phase": {
        "freeze.strategy": "gradual",
        "train.epochs": 3,
        "train.gradient_accumulation_steps": 2,
        "train.ema_decay": 0.9,
        "optim.max_grad_norm": 1.0,
        "optim.layer_decay": 0.8,
        "augment.mixup": 0.4,
    },
    "vit": {
        "backbone.name": "timm/vit_tiny_patch16_224",
        "freeze.strategy": "last_stages",
        "freeze.num_stages": 2,
    },
    "convnext": {
        "backbone.name": "timm/convnext_atto",
        "freeze.strategy": "full",
        "optim.lr": 1e-4,
    },
}


@pytest.fixture(scope="module")
def small(tiny_trial: TrialConfig) -> TrialConfig:
    """Without dropout, which is random in each worker; 27 images, in batches of 9."""
    return with_values(tiny_trial, {"train.batch_size": 9, "head.dropout": 0.0})


@pytest.mark.slow
def test_figures_do_not_depend_on_the_number_of_workers(
    small: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    configs = [with_values(small, values) for values in WITHOUT_MOVING_STATISTICS.values()]
    one, two, three = (run_in_workers(n, configs, colour_images, tmp_path) for n in (1, 2, 3))
    for name, alone, *shared in zip(WITHOUT_MOVING_STATISTICS, one, two, three, strict=True):
        for several in shared:
            assert len(several) == len(alone)
            for report, expected in zip(several, alone, strict=True):
                for figure in FIGURES:
                    assert report[figure] == pytest.approx(expected[figure], rel=1e-5), name
    for number in range(len(configs)):
        assert not TrialDir(tmp_path / "2" / str(number)).read().notes


@pytest.mark.slow
def test_batch_norm_that_trains_in_several_workers_on_cpus_is_noted_and_ends_the_same_in_all(
    small: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    config = with_values(small, {**SHUFFLENET, "freeze.strategy": "full", "train.ema_decay": 0.9})
    run_in_workers(2, [config], colour_images, tmp_path)
    record = TrialDir(tmp_path / "2" / "0").read()
    assert record.notes == ("BatchNorm statistics are of each worker's part of a batch",)
    assert record.state == "completed"


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_worker_ends_all_of_them(
    small: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    config = with_values(small, {"optim.lr": 100.0, "optim.optimizer": "sgd"})
    (reports,) = run_in_workers(2, [config], colour_images, tmp_path)
    assert TrialDir(tmp_path / "2" / "0").read().state == "diverged"
    assert len(reports) < config.train.epochs


def test_synchronised_norms_keep_names_stages_and_pins() -> None:
    config = BackboneConfig(name="timm/efficientnet_b0", weights="none")
    classifier, _ = build_classifier(config, HeadConfig(), num_classes=3, image_size=32)
    num_stages = len(classifier.stages.names)
    half = (Level.FROZEN,) * (num_stages - 2) + (Level.TRAINED,) * 2
    classifier.set_levels(half)
    names = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    moving = classifier.num_moving_norms
    classifier.synchronise_norms()
    synchronised = [m for m in classifier.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert sum(m.training for m in synchronised) == moving == classifier.num_moving_norms > 0
    assert len(synchronised) > moving
    after = classifier.state_dict()
    assert after.keys() == names.keys()
    assert all(torch.equal(after[name], names[name]) for name in names)


def test_more_workers_than_images_in_a_batch_are_refused(
    tiny_trial: TrialConfig, tmp_path: Path
) -> None:
    from tlrunner.errors import ConfigError

    with pytest.raises(ConfigError, match=r"workers_per_trial times .* is 9, valid: at most"):
        with_values(tiny_trial, {"resources.workers_per_trial": 9})


@pytest.mark.slow
@pytest.mark.parametrize("case", ["every phase", "vit"])
def test_a_trial_goes_on_with_another_number_of_workers_from_any_step(
    small: TrialConfig, colour_images: Images, tmp_path: Path, case: str
) -> None:
    config = with_values(small, WITHOUT_MOVING_STATISTICS[case])
    whole, parts = TrialDir(tmp_path / "whole"), TrialDir(tmp_path / "parts")
    run_in_parts([(1, None)], config, colour_images, whole.path)
    # Epochs of three steps: it changes in the first one, in the second, and goes on to the end.
    run_in_parts([(1, 2), (2, 3), (1, None)], config, colour_images, parts.path)
    one, other = whole.read(), parts.read()
    assert other.state == "completed"
    for expected, found in zip(one.epochs, other.epochs, strict=True):
        for name in FIGURES:
            assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-5)
