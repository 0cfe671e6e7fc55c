"""What a disk that is really full does to the jobs. Slow, and only where one can be mounted."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from s3_servers import Bucket

from tlrunner.cli import run_job
from tlrunner.data import shardfile, write
from tlrunner.data.dataset import open_dataset
from tlrunner.jobconfig import PrepareJob, TrainJob

pytestmark = pytest.mark.slow
Captured = pytest.CaptureFixture[str]
KIB = 1 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`disk(n)`: a file system of n bytes, the same one each time."""
    place = tmp_path / "disk"
    place.mkdir()

    def of_size(num_bytes: int) -> Path:
        options = f"size={num_bytes}" + (",remount" if place.is_mount() else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return place

    if not shutil.which("mount"):
        pytest.skip("there is no mount here")
    yield of_size
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """Sixty images of 12 kB."""
    rng = np.random.default_rng(0)
    for number in range(60):
        file = tmp_path / "noise" / ("ant", "bee")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file)
    return tmp_path / "noise"


def the_line(capsys: Captured) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_writing_shards_stops_in_one_line_and_continues_once_there_is_room(
    disk: Callable[[int], Path], noise: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(shardfile, "ROW_GROUP_BYTES", 40 * KIB)
    monkeypatch.setattr(write, "MIN_SHARD_BYTES", 100 * KIB)
    place = disk(400 * KIB)
    flags = ["--data", str(noise), "--out", str(place), "--name", "made"]

    def prepare() -> int:
        return run_job("prepare_images", PrepareJob, "tlrunner.run:prepare_images", argv=flags)

    assert prepare() == 73
    assert "No space left on device" in the_line(capsys)
    finished = {path.name: path.stat().st_mtime_ns for path in (place / "made").glob("*.parquet")}
    assert 0 < len(finished) < 5
    disk(4000 * KIB)
    assert prepare() == 0
    for name, when in finished.items():
        assert (place / "made" / name).stat().st_mtime_ns == when
    assert len(open_dataset(place / "made")) == 60


def test_a_run_that_cannot_be_kept_ends_in_one_line(
    disk: Callable[[int], Path], tiny_tree: dict[str, Any], tmp_path: Path, capsys: Captured
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_tree))
    flags = ["--config", str(config), "--out", str(disk(64 * KIB)), "--name", "mine"]
    assert run_job("train", TrainJob, "tlrunner.run:train", argv=flags) == 73
    assert "No space left on device" in the_line(capsys)
    assert not (tmp_path / "disk" / "mine" / "_SUCCESS").exists()
    disk(64_000 * KIB)
    assert run_job("train", TrainJob, "tlrunner.run:train", argv=flags) == 0


def test_a_node_cache_on_a_full_disk_ends_in_one_line(
    disk: Callable[[int], Path],
    noise: Path,
    rclone_bucket: Bucket,
    tiny_tree: dict[str, Any],
    tmp_path: Path,
    capsys: Captured,
) -> None:
    flags = ["--data", str(noise), "--out", rclone_bucket.uri, "--name", "noise"]
    assert run_job("prepare_images", PrepareJob, "tlrunner.run:prepare_images", argv=flags) == 0
    data = {**tiny_tree["data"], "uri": f"{rclone_bucket.uri}/noise", "cache_bytes": 10**9}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**tiny_tree, "data": data}))
    capsys.readouterr()
    cache = ["--set", f"data.cache_dir={disk(200 * KIB)}", "--set", "data.decoded_cache=off"]
    flags = ["--config", str(config), "--out", str(tmp_path / "runs"), "--name", "mine", *cache]
    assert run_job("train", TrainJob, "tlrunner.run:train", argv=flags) == 73
    assert "No space left on device" in the_line(capsys)
    disk(64_000 * KIB)
    assert run_job("train", TrainJob, "tlrunner.run:train", argv=flags) == 0


def test_a_full_disk_costs_what_is_kept_of_frozen_stages_and_not_the_trial(
    disk: Callable[[int], Path],
    noise: Path,
    tiny_tree: dict[str, Any],
    tmp_path: Path,
    capsys: Captured,
) -> None:
    place = disk(64_000 * KIB)
    data = {**tiny_tree["data"], "uri": str(noise), "cache_bytes": 10**9, "cache_dir": str(place)}
    config = tmp_path / "config.json"
    head = {"freeze": {"strategy": "head"}, "data": {**data, "decoded_cache": "off"}}
    config.write_text(json.dumps({**tiny_tree, **head}))

    def train(name: str, mode: str) -> dict[str, Any]:
        flags = ["--config", str(config), "--out", str(tmp_path / "runs"), "--name", name]
        flags += ["--set", f"reuse.mode={mode}"]
        assert run_job("train", TrainJob, "tlrunner.run:train", argv=flags) == 0
        return json.loads((tmp_path / "runs" / name / "summary.json").read_text())

    without = train("without", "off")
    used = sum(file.stat().st_blocks * 512 for file in place.rglob("*"))
    disk(used + 16 * KIB)
    capsys.readouterr()
    full = train("full", "on")
    line = "nothing frozen is reused any more"
    assert line in capsys.readouterr().err
    assert line in (tmp_path / "runs" / "full" / "leaderboard.csv").read_text()
    assert full["reuse"]["saved_seconds"] == 0
    assert full["best"]["val_loss"] == without["best"]["val_loss"]
    disk(64_000 * KIB)
    assert train("room", "on")["reuse"]["saved_seconds"] > 0
