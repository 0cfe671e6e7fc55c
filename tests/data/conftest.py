"""Data sets that several tests of the data layer read."""

from pathlib import Path

import pytest
from pictures import image_folder

from tlrunner.config import Preprocess
from tlrunner.data.dataset import Dataset, open_dataset
from tlrunner.data.prepare import prepare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images")


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("small")
    image_folder(root / "images", ("ant", "bee", "cat"), each=15)
    return open_dataset(prepare(str(root / "images"), root / "cache"))


@pytest.fixture
def preprocess() -> Preprocess:
    return Preprocess(
        image_size=32,
        crop_fraction=0.875,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.2),
        interpolation="bilinear",
    )
