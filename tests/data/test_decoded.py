import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, picture
from PIL import Image

from tlrunner.config import Preprocess
from tlrunner.data.augment import EvalTransform, short_side
from tlrunner.data.cache import NodeCache
from tlrunner.data.dataset import Dataset, open_dataset
from tlrunner.data.decode import Decoded, decode
from tlrunner.data.decoded import DecodedCache, Kept, KeptTransform, train_sizes
from tlrunner.data.prepare import prepare

SIZES = [(48, 40), (300, 200), (97, 211), (36, 36), (30, 20), (400, 301)]  # width, height


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("photos")
    for name in ("ant", "bee"):
        (root / "images" / name).mkdir(parents=True)
        for i, (width, height) in enumerate(SIZES):
            image = picture(i, width=width, height=height)
            data = encoded(image, "PNG") if i == 2 else encoded(image, quality=92)
            (root / "images" / name / f"{i}.img.{'png' if i == 2 else 'jpg'}").write_bytes(data)
    return open_dataset(prepare(str(root / "images"), root / "cache"))


def kept_of(dataset: Dataset, preprocess: Preprocess) -> Kept:
    """Even rows train, odd ones validate, but the last, which is for tests."""
    rows = np.arange(len(dataset) - 1)
    return Kept(rows[::2], rows[1::2], dataset.sizes_N2, preprocess)


def cache_of(
    dataset: Dataset, directory: Path, preprocess: Preprocess, reads: list[int], limit: int = 10**8
) -> DecodedCache:
    def read(row: int) -> bytes:
        reads.append(row)
        return dataset.image_bytes(row)

    kept = kept_of(dataset, preprocess)
    return DecodedCache(NodeCache(directory, limit), dataset.manifest.sha256, kept, read)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_evaluation_sees_the_same_pixels(
    photos: Dataset, tmp_path: Path, preprocess: Preprocess, interpolation: str
) -> None:
    preprocess = preprocess.model_copy(update={"interpolation": interpolation})
    cache = cache_of(photos, tmp_path, preprocess, [])
    for row in range(1, len(photos) - 1, 2):
        plain, kept = np.zeros((2, 32, 32, 3), np.uint8)
        EvalTransform(preprocess).render(photos.picture(row), plain)
        for _ in range(2):
            KeptTransform(preprocess).render(Decoded(cache.pixels(row)), kept)
            assert (plain == kept).all(), photos.keys[row]


def test_smaller_training_images_stay_and_larger_ones_are_as_evaluation_needs_them(
    photos: Dataset, tmp_path: Path, preprocess: Preprocess
) -> None:
    short = short_side(preprocess)
    assert short == 36
    cache = cache_of(photos, tmp_path, preprocess, [])
    sizes_N2 = train_sizes(photos.sizes_N2, preprocess)
    for row in range(0, len(photos) - 1, 2):
        height, width = photos.sizes_N2[row].tolist()
        pixels = cache.pixels(row)
        assert pixels.shape == (*sizes_N2[row], 3)
        whole = decode(photos.image_bytes(row))
        if min(height, width) <= short:
            assert (pixels == whole).all()
        else:
            assert min(pixels.shape[:2]) == short
            exact = Image.fromarray(whole).resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)
            assert np.abs(pixels.astype(int) - np.asarray(exact)).mean() < 3
    assert cache.pixels(len(photos) - 1) is None


def test_each_image_is_decoded_once_for_all(
    photos: Dataset, tmp_path: Path, preprocess: Preprocess
) -> None:
    reads: list[int] = []
    first, second = (cache_of(photos, tmp_path, preprocess, reads) for _ in range(2))
    rows = list(range(len(photos) - 1))
    with ThreadPoolExecutor(4) as pool:
        one = list(pool.map(first.pixels, rows))
        two = list(pool.map(second.pixels, rows))
    assert sorted(reads) == rows
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_without_room_the_pixels_are_the_same(
    photos: Dataset, tmp_path: Path, preprocess: Preprocess
) -> None:
    num_bytes = kept_of(photos, preprocess).num_bytes
    reads: list[int] = []
    kept = cache_of(photos, tmp_path / "a", preprocess, [], limit=num_bytes)
    without = cache_of(photos, tmp_path / "b", preprocess, reads, limit=num_bytes - 1)
    rows = range(len(photos) - 1)
    for _ in range(2):
        assert all((kept.pixels(row) == without.pixels(row)).all() for row in rows)
    assert len(reads) == 2 * len(rows)
    assert sum(path.stat().st_size for path in (tmp_path / "a").iterdir()) == num_bytes


FILL = """
import sys
import numpy as np
from pathlib import Path
from tlrunner.config import Preprocess
from tlrunner.data.cache import NodeCache
from tlrunner.data.dataset import open_dataset
from tlrunner.data.decoded import DecodedCache, Kept
dataset = open_dataset(sys.argv[1])
preprocess = Preprocess.model_validate_json(sys.argv[3])
def read(row):
    print(row, flush=True)
    return dataset.image_bytes(row)
kept = Kept(np.arange(6), np.arange(6, 12), dataset.sizes_N2, preprocess)
cache = DecodedCache(NodeCache(Path(sys.argv[2]), 10**8), dataset.manifest.sha256, kept, read)
for _ in range(3):
    for row in range(len(dataset)):
        cache.pixels(row)
"""


@pytest.mark.slow
def test_processes_at_once_decode_each_image_once_together(
    photos: Dataset, tmp_path: Path, preprocess: Preprocess
) -> None:
    command = [sys.executable, "-c", FILL, photos.uri, str(tmp_path), preprocess.model_dump_json()]
    fillers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [filler.communicate()[0].split() for filler in fillers]
    assert all(filler.returncode == 0 for filler in fillers)
    found = [int(row) for rows in printed for row in rows]
    assert sorted(found) == list(range(len(photos)))


def test_another_recipe_has_pixels_of_its_own(
    photos: Dataset, tmp_path: Path, preprocess: Preprocess
) -> None:
    larger = preprocess.model_copy(update={"image_size": 64})
    for recipe in (preprocess, larger):
        cache_of(photos, tmp_path, recipe, []).pixels(1)
    kept = [path for path in tmp_path.iterdir() if path.suffix == ".decoded"]
    assert len(kept) == 2
    assert all(os.access(path, os.W_OK) for path in kept)
