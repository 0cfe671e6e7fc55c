import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.data.dataset import open_dataset
from tlrunner.data.prepare import prepare
from tlrunner.train.feed import which
from tlrunner.train.reuse import Reuse
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import EpochReport


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each group that was rendered outside of training."""
    counts: list[int] = []
    render = Reuse._rendered

    def counting(self: Reuse, *arguments: Any) -> Iterator[torch.Tensor]:
        for images_BHWC in render(self, *arguments):
            counts.append(len(images_BHWC))
            yield images_BHWC

    monkeypatch.setattr(Reuse, "_rendered", counting)
    return counts


@pytest.fixture(scope="session")
def folder(colour_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twice as many images, of which batches of at least 16 can be made."""
    root = tmp_path_factory.mktemp("twice") / "images"
    for name in ("one", "two"):
        for file in sorted(colour_folder.rglob("*.jpg")):
            (root / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / file.parent.name / f"{name}-{file.name}")
    return root


@pytest.fixture
def config(tiny_trial: TrialConfig, folder: Path, tmp_path: Path) -> TrialConfig:
    """A head-only trial of three epochs on pretrained weights, and an empty cache.

    Convolutions of less than 16 images round in another way than those of a chunk, and what trains
    from random weights multiplies such differences: neither would do.
    """
    return with_values(
        tiny_trial,
        {
            "data.uri": str(folder),
            "data.cache_dir": str(tmp_path / "cache"),
            "backbone": {"name": "efficientnet_lite0"},
            "freeze": {"strategy": "head"},
            "train.epochs": 3,
            "train.batch_size": 18,
            "data.image_size": 64,
            "reuse.mode": "on",
        },
    )


@pytest.fixture
def run(folder: Path, tiny_trial: TrialConfig) -> Callable[..., list[EpochReport]]:
    images = which(open_dataset(prepare(str(folder), tiny_trial.data.cache_dir)))

    def running(config: TrialConfig, **others: Any) -> list[EpochReport]:
        reports: list[EpochReport] = []
        run_trial(config, reports.append, images=images, **others)
        return reports

    return running
