import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pictures import encoded, image_folder, picture

from tlrunner.data.dataset import open_dataset, verify_shards
from tlrunner.data.prepare import prepare
from tlrunner.errors import DataError, StorageError

REAL_PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "flowers"
PREPARE = "import sys; from tlrunner.data.prepare import prepare; print(prepare(*sys.argv[1:]))"


def test_shards_are_written_once(folder: Path, tmp_path: Path) -> None:
    first = Path(prepare(str(folder), tmp_path / "cache"))
    written = (first / "manifest.json").stat().st_mtime_ns
    assert prepare(str(folder), tmp_path / "cache") == str(first)
    assert (first / "manifest.json").stat().st_mtime_ns == written


def test_a_change_of_the_images_makes_new_shards(folder: Path, tmp_path: Path) -> None:
    first = prepare(str(folder), tmp_path / "cache")
    (folder / "ant" / "new.jpg").write_bytes(encoded(picture(77)))
    second = prepare(str(folder), tmp_path / "cache")
    assert second != first
    assert (len(open_dataset(first)), len(open_dataset(second))) == (24, 25)


def test_a_directory_of_shards_is_used_where_it_is(folder: Path, tmp_path: Path) -> None:
    shards = prepare(str(folder), tmp_path / "cache")
    assert prepare(str(shards), tmp_path / "unused") == shards
    assert not (tmp_path / "unused").exists()


def test_unlabelled_shards_cannot_be_trained_on(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(encoded(picture()))
    shards = prepare(str(tmp_path / "flat"), tmp_path / "cache", labelled=False)
    assert open_dataset(shards).labels_N.tolist() == [-1]
    with pytest.raises(DataError, match="no labels"):
        prepare(str(shards), tmp_path / "cache")


def test_a_stricter_limit_on_bad_images_holds_for_cached_shards(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "ant" / "bad.jpg").write_bytes(b"no image")
    prepare(str(folder), tmp_path / "cache", max_bad_fraction=0.1)
    with pytest.raises(DataError, match="1 of 25 images cannot be used"):
        prepare(str(folder), tmp_path / "cache", max_bad_fraction=0.01)


def test_progress_counts_every_image(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare(str(folder), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 24) for i in range(1, 25)]


def test_two_at_once_write_once(folder: Path, tmp_path: Path) -> None:
    writers: list[str] = []

    def one(name: str) -> Path:
        return prepare(str(folder), tmp_path / "cache", progress=lambda *_: writers.append(name))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, ["first", "second"])
    assert first == second
    assert len(set(writers)) == 1


def test_a_cache_that_cannot_be_written_is_explained(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be written.*data.cache_dir"):
        prepare(str(folder), tmp_path / "file")


@pytest.mark.slow
def test_processes_that_are_killed_leave_nothing_in_the_way(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", each=3000)
    command = [sys.executable, "-c", PREPARE, str(folder), str(tmp_path / "cache")]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/shards/*/.writing")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not list(tmp_path.glob("cache/shards/*/manifest.json"))
    assert list(tmp_path.glob("cache/shards/*/.writing"))
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0].strip() for process in both)
    assert first == second
    assert verify_shards(Path(first)).num_images == 6000
    assert not list(tmp_path.glob("cache/shards/*/.writing"))


@pytest.mark.slow
@pytest.mark.skipif(not REAL_PHOTOS.is_dir(), reason="needs photos in ../shared/flowers")
def test_real_photos_come_back_byte_for_byte(tmp_path: Path) -> None:
    dataset = open_dataset(prepare(str(REAL_PHOTOS), tmp_path))
    assert dataset.manifest.num_bad == 0
    for row, key in enumerate(dataset.keys):
        assert dataset.image_bytes(row) == (REAL_PHOTOS / key).read_bytes()


@pytest.mark.slow
def test_the_sample_is_prepared_without_a_bad_image(tmp_path: Path) -> None:
    manifest = open_dataset(prepare("sample:flowers", tmp_path)).manifest
    assert (manifest.label_counts, manifest.num_bad) == ((120,) * 5, 0)
