import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path

import mutation
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, picture

from tlrunner.data.sources import open_source
from tlrunner.data.write import write_shards

NUMBERS = [*range(1998), 4702, 6598]  # the last two once ended Python inside of pyarrow
NUM_IMAGES = 60
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workers() -> Iterator[Executor]:
    """Two processes; one that crashes or hangs breaks the pool, and with it the test."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn, mutation.be_a_worker) as pool:
        yield pool


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Parquet file in each form, all with the same images."""
    root = tmp_path_factory.mktemp("foreign")
    images = [encoded(picture(i)) for i in range(NUM_IMAGES)]
    structs = pa.array([{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)])
    labels = pa.array([i % 3 for i in range(NUM_IMAGES)])
    words = pa.array(["ant" if i % 2 else "bee" for i in range(NUM_IMAGES)])
    forms = {
        "plain": (structs, labels, {"compression": "none", "use_dictionary": False}),
        "snappy": (structs, words, {"compression": "snappy"}),
        "zstd": (pa.array(images), labels, {"compression": "zstd", "write_page_checksum": True}),
        "checked": (pa.array(images), words, {"compression": "none", "write_page_checksum": True}),
    }
    for name, (image, label, options) in forms.items():
        table = pa.table({"image": image, "label": label})
        pq.write_table(table, root / f"{name}.parquet", row_group_size=25, **options)
    return {name: root / f"{name}.parquet" for name in forms}


@pytest.fixture(scope="module")
def shards(foreign: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    write_shards(open_source(str(foreign["plain"]), cache_dir=root), root / "shards")
    return root / "shards"


def test_damaged_shards_never_read_as_other_data(
    shards: Path, workers: Executor, tmp_path: Path
) -> None:
    fates = fates_of(shards, workers, tmp_path, verify=True)
    assert set(fates) <= {"refused", "equal"}, fates
    assert fates.total() == len(NUMBERS)


def test_damaged_shards_that_nobody_verified_end_in_one_line(
    shards: Path, workers: Executor, tmp_path: Path
) -> None:
    fates = fates_of(shards, workers, tmp_path, verify=False)
    assert set(fates) <= {"refused", "equal", "different"}, fates


def fates_of(shards: Path, workers: Executor, work: Path, *, verify: bool) -> "Counter[str]":
    files = sorted(path.name for path in shards.iterdir() if path.suffix != ".json")
    assert {Path(name).suffix for name in files} == {".parquet", ".npy"}
    read = partial(mutation.read_with_manifest, shards)
    tasks = [partial(read, files[n // 8 % len(files)], verify, n, work) for n in NUMBERS]
    return Counter(workers.map(_called, tasks, chunksize=20))


def test_damaged_foreign_parquet_is_refused_or_read_without_a_crash(
    foreign: dict[str, Path], workers: Executor, tmp_path: Path
) -> None:
    paths = list(foreign.values())
    tasks = [
        # one kind of damage after the other, and all of them for each form
        partial(mutation.read_as_foreign, paths[number // 8 % len(paths)], number, tmp_path)
        for number in NUMBERS
    ]
    fates = Counter(workers.map(_called, tasks, chunksize=20))
    assert set(fates) <= {"refused", "some bad", "written"}, fates
    assert min(fates[fate] for fate in ("refused", "some bad", "written")) > 20, fates
    assert fates.total() == len(NUMBERS)


def _called(task: "partial[str]") -> str:
    return task()
