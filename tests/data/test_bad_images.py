import hashlib
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bad_corpus import corpus
from hypothesis import given
from hypothesis import strategies as st
from odd_images import Case
from pictures import encoded, picture
from PIL import Image

from tlrunner.data.dataset import open_dataset
from tlrunner.data.decode import BadImage, decode, normalise
from tlrunner.data.sources import open_source
from tlrunner.data.write import write_shards

CORPUS = corpus()
REASONS = {"empty", "unreadable", "truncated", "too_small", "too_large", "aspect"}
SEEDS = [case.data for case in CORPUS.values() if not isinstance(case.fate, str)]
# With Python's own filters: a test that turned warnings into errors would see what no user sees.
pytestmark = pytest.mark.filterwarnings("default", r"ignore:::PIL.*")

NORMALISE_ALL = """
import sys
sys.path.insert(0, sys.argv[1])
from bad_corpus import corpus
from tlrunner.data.decode import BadImage, decode, normalise
for case in corpus().values():
    try:
        decode(normalise(case.data).data)
    except BadImage:
        pass
"""


@pytest.mark.parametrize("name", CORPUS)
def test_each_kind_of_file_meets_its_fate(name: str) -> None:
    case: Case = CORPUS[name]
    if isinstance(case.fate, str):
        assert case.fate in REASONS
        with pytest.raises(BadImage) as caught:
            normalise(case.data)
        assert caught.value.reason == case.fate
        return
    stored = normalise(case.data)
    pixels_HWC = decode(stored.data)
    assert (stored.height, stored.width) == pixels_HWC.shape[:2] == case.fate
    if case.like is not None:
        wanted_HWC = np.asarray(case.like.convert("RGB")).astype(int)
        assert np.abs(pixels_HWC - wanted_HWC).mean() <= case.tolerance


def test_nothing_is_printed_and_no_other_program_is_started(tmp_path: Path) -> None:
    for program in ("gs", "gswin64c", "convert", "sh"):
        trap = tmp_path / program
        trap.write_text(f"#!/bin/sh\necho {program} >> {tmp_path}/sprung\n")
        trap.chmod(trap.stat().st_mode | stat.S_IXUSR)
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", NORMALISE_ALL, here],
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    assert not (tmp_path / "sprung").exists()


@given(st.sampled_from(SEEDS), st.randoms(use_true_random=False))
def test_what_is_damaged_is_refused_or_can_be_decoded(data: bytes, rng: random.Random) -> None:
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(damaged))
        damaged[at : at + rng.choice((0, 1, 1, 4))] = rng.randbytes(rng.choice((0, 1, 1, 4)))
        if not damaged:
            return
    try:
        stored = normalise(bytes(damaged))
    except BadImage as bad:
        assert bad.reason in REASONS
    else:
        assert decode(stored.data).shape == (stored.height, stored.width, 3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_bad_image(folder: Path, tmp_path: Path) -> None:
    (folder / "ant" / "0.jpg").chmod(0)
    manifest = write_shards(open_source(str(folder)), tmp_path / "shards", max_bad_fraction=0.1)
    assert manifest.num_bad == 1


@pytest.mark.slow
def test_exactly_the_137_bad_ones_of_10000_are_reported(tmp_path: Path) -> None:
    rng = random.Random(0)
    bad = bad_files(137, rng)
    good = {}
    for label in range(2):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True)
    for number in range(10_000 - len(bad)):
        data = encoded(small_picture(number), quality=80)
        good[f"class{number % 2}/{number}.jpg"] = data
    for number, (data, _) in enumerate(bad):
        (tmp_path / "images" / f"class{number % 2}" / f"bad{number}.jpg").write_bytes(data)
    for key, data in good.items():
        (tmp_path / "images" / key).write_bytes(data)
    uri, directory = str(tmp_path / "images"), tmp_path / "shards"
    manifest = write_shards(open_source(uri), directory, max_bad_fraction=0.02)
    assert (manifest.num_images, manifest.num_bad) == (9_863, 137)
    reported = pq.read_table(directory / "bad_images.parquet").to_pylist()
    assert {
        (row["key"], row["source"], row["reason"].split(":")[0], row["sha256"]) for row in reported
    } == {
        (f"class{number % 2}/bad{number}.jpg", uri, reason, hashlib.sha256(data).hexdigest())
        for number, (data, reason) in enumerate(bad)
    }
    assert len(reported) == 137
    dataset = open_dataset(directory)
    assert sorted(dataset.keys) == sorted(good)
    for row, key in enumerate(dataset.keys):
        stored = dataset.image_bytes(row)
        assert stored == good[key]
        assert decode(stored).shape == (16, 16, 3)
        assert dataset.class_names[dataset.labels_N[row]] == key.split("/")[0]


def bad_files(count: int, rng: random.Random) -> list[tuple[bytes, str]]:
    """Files of all kinds that are refused, each with its reason and each different."""
    kinds = [case for case in CORPUS.values() if isinstance(case.fate, str)]
    files = [(case.data, case.fate) for case in kinds]
    number = 0
    while len({data for data, _ in files}) < count:
        data = encoded(picture(1000 + number, 64, 64), quality=90)
        files.append((data[: rng.randrange(700, len(data) - 50)], "truncated"))
        number += 1
    return list(dict.fromkeys(files))[:count]


def small_picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8))
