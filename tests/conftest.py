"""Twelve small images each of three colours, their shards, and a trial that learns them at once."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from tlrunner.config import TrialConfig
from tlrunner.configfile import validate
from tlrunner.data.dataset import open_dataset
from tlrunner.data.prepare import prepare
from tlrunner.train.checkpoint import write_checkpoint
from tlrunner.train.feed import which
from tlrunner.train.images import Images
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import EpochReport, State, TrialDir

pytest_plugins = ["s3_servers"]

COLOURS = {"blue": 2, "green": 1, "red": 0}  # class -> the channel that is bright
IMAGES_PER_CLASS = 12

settings.register_profile("tlrunner", deadline=None)  # machines differ; speed is not tested here
settings.load_profile("tlrunner")

WriteTrial = Callable[..., TrialConfig]


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder that any model tells apart by colour. Not to be changed: copy it."""
    root = tmp_path_factory.mktemp("colours") / "images"
    rng = np.random.default_rng(0)
    for name, channel in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(IMAGES_PER_CLASS):
            pixels_HWC = rng.integers(0, 90, (40, 40, 3), dtype=np.uint8)
            pixels_HWC[..., channel] += 150
            Image.fromarray(pixels_HWC).save(root / name / f"{number:02d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def tiny_tree(colour_folder: Path) -> dict[str, dict[str, object]]:
    """The config of a trial that takes about a tenth of a second an epoch; no BatchNorm in it."""
    return {
        "data": {
            "uri": str(colour_folder),
            "cache_dir": str(colour_folder.parent / "cache"),
            "image_size": 32,
            "val_fraction": 0.25,
        },
        "backbone": {"name": "squeezenet1_1", "weights": "none"},
        "freeze": {"strategy": "full"},
        "train": {"epochs": 2, "batch_size": 8},
        "resources": {"gpus_per_worker": 0},
    }


@pytest.fixture(scope="session")
def tiny_trial(tiny_tree: dict[str, dict[str, object]]) -> TrialConfig:
    return validate(TrialConfig, tiny_tree)


@pytest.fixture(scope="session")
def colour_shards(tiny_trial: TrialConfig) -> Path:
    return prepare(tiny_trial.data.uri, tiny_trial.data.cache_dir)


@pytest.fixture(scope="session")
def colour_images(colour_shards: Path) -> Images:
    return which(open_dataset(colour_shards))


@pytest.fixture(scope="session")
def _trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_trial: TrialConfig, colour_images: Images
) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "0000-abcdef"
    run_trial(
        tiny_trial,
        lambda report: None,
        trial_dir=directory,
        images=colour_images,
    )
    return directory


@pytest.fixture
def trained(_trained: Path, tmp_path: Path) -> TrialDir:
    """The directory of the tiny trial after it ended; a copy, for each test its own."""
    return TrialDir(Path(shutil.copytree(_trained, tmp_path / "trials" / _trained.name)))


@pytest.fixture(scope="session")
def write_trial(tiny_trial: TrialConfig) -> WriteTrial:
    """`write_trial(directory, val_accs, state, ...)`: what a trial leaves, without training."""

    def write(
        directory: Path,
        val_accs: list[float],
        state: State | None = None,
        *,
        val_loss: float = 1.0,
        detail: str = "",
        config: TrialConfig = tiny_trial,
    ) -> TrialConfig:
        trial = TrialDir(directory)
        trial.begin(config)
        if val_accs:
            write_checkpoint(trial.checkpoints, 4, {"weight": torch.zeros(1)}, {})
        for epoch, val_acc in enumerate(val_accs, start=1):
            trial.append(
                EpochReport(
                    epoch, val_acc, val_loss, 2.0, 50.0, 10, 20, 0.01, 1.5 * epoch, "00000004-0"
                )
            )
        if state:
            trial.end(state, detail)
        return config

    return write


@pytest.fixture(autouse=True)
def _close_log() -> Iterator[None]:
    """A job leaves its handlers to the process, which here goes on to the next test."""
    yield
    log = logging.getLogger("tlrunner")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole default tier; slow tests have the machine for themselves."""
    is_slow = "not slow" not in config.option.markexpr
    return 0 if is_slow or config.args != config.getini("testpaths") else 2
