import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import tlrunner
from tlrunner.config import TrialConfig
from tlrunner.data.dataset import open_dataset
from tlrunner.data.manifest import Manifest
from tlrunner.errors import StorageError
from tlrunner.files import sha256_file, write_text
from tlrunner.report import finish
from tlrunner.report.finish import copy_bad_images, exit_code, finish_run
from tlrunner.report.rundir import RunDir
from tlrunner.train.trial_dir import TrialDir

WriteTrial = Callable[..., TrialConfig]
REPORTS = {"leaderboard.csv", "report.html", "summary.json"}


@pytest.fixture
def images(colour_shards: Path) -> Manifest:
    return open_dataset(colour_shards).manifest


@pytest.fixture
def run(trained: TrialDir) -> RunDir:
    """A run with one trial that completed; `trained` stands in its trials/."""
    run = RunDir(trained.path.parents[1], "0123456789ab")
    write_text(run.path / "run.json", "{}")
    return run


def files_of(run: RunDir) -> set[str]:
    return {path.name for path in run.path.iterdir()}


def test_a_run_whose_trials_all_ended_is_a_success(run: RunDir, images: Manifest) -> None:
    summary = finish_run(run, images, 2.5)
    assert (summary["status"], exit_code(summary)) == ("ok", 0)
    assert files_of(run) == {*REPORTS, "trials", "best", "run.json", "_SUCCESS"}
    assert json.loads((run.path / "summary.json").read_text()) == summary
    assert run.is_finished


def test_the_success_file_vouches_for_what_stands_beside_it(run: RunDir, images: Manifest) -> None:
    finish_run(run, images, 2.5)
    vouched = json.loads((run.path / "_SUCCESS").read_text())
    assert set(vouched) == {*REPORTS, "best/COMMIT.json", "run.json"}
    for name, facts in vouched.items():
        assert facts["sha256"] == sha256_file(run.path / name)


def test_the_best_model_is_that_of_the_first_row(
    run: RunDir, images: Manifest, write_trial: WriteTrial
) -> None:
    write_trial(run.trials / "0001-worse", [0.0, 0.0])
    summary = finish_run(run, images, 2.5)
    with (run.path / "leaderboard.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    metrics = json.loads((run.path / "best" / "metrics.json").read_text())
    assert metrics["trial_id"] == first["trial_id"] == summary["best"]["trial_id"]
    assert metrics["val_acc"] == float(first["val_acc"]) == summary["best"]["val_acc"]
    assert metrics["data_sha256"] == images.sha256
    assert tlrunner.load(run.path / "best").labels == images.class_names


def test_a_failed_trial_makes_a_run_partial(
    run: RunDir, images: Manifest, write_trial: WriteTrial
) -> None:
    write_trial(run.trials / "0001-broken", [], "failed", detail="OSError: broken")
    summary = finish_run(run, images, 2.5)
    assert (summary["status"], exit_code(summary)) == ("partial", 2)
    assert files_of(run) == {*REPORTS, "trials", "best", "run.json"}
    assert not run.is_finished
    assert "OSError: broken" in (run.path / "leaderboard.csv").read_text()


@pytest.mark.parametrize("state", ["failed", "diverged"])
def test_a_run_without_a_usable_trial_has_failed(
    tmp_path: Path, images: Manifest, write_trial: WriteTrial, state: str
) -> None:
    run = RunDir(tmp_path / "run", "")
    write_trial(run.trials / "0000-a", [], state)
    summary = finish_run(run, images, 2.5)
    assert (summary["status"], exit_code(summary)) == ("failed", 3)
    assert files_of(run) == {*REPORTS, "trials"}


def test_an_interrupted_run_has_a_report_but_no_best_and_no_success(
    run: RunDir, images: Manifest, write_trial: WriteTrial
) -> None:
    write_trial(run.trials / "0001-cut", [0.9])
    summary = finish_run(run, images, 2.5, interrupted=True)
    assert (summary["status"], exit_code(summary)) == ("interrupted", 75)
    assert files_of(run) == {*REPORTS, "trials", "run.json"}


def test_a_run_interrupted_before_its_first_trial_can_be_told(
    tmp_path: Path, images: Manifest
) -> None:
    run = RunDir(tmp_path / "run", "")
    assert finish_run(run, images, 0.1, interrupted=True)["trials"]["total"] == 0


def test_a_best_of_an_earlier_end_is_replaced_whole(run: RunDir, images: Manifest) -> None:
    stale = run.path / "best"
    stale.mkdir()
    (stale / "old.safetensors").write_text("x")
    (stale / "COMMIT.json").write_text("{}")
    finish_run(run, images, 2.5)
    assert not (stale / "old.safetensors").exists()
    assert tlrunner.load(stale).labels == images.class_names


def test_what_does_not_read_back_is_no_success(
    run: RunDir, images: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(path: Path, text: str) -> None:
        write_text(path, text[:-1])

    monkeypatch.setattr(finish, "write_text", lossy)
    with pytest.raises(StorageError, match="does not read back as it was written"):
        finish_run(run, images, 2.5)
    assert not run.is_finished


def test_a_rotten_checkpoint_of_the_best_trial_is_no_success(
    run: RunDir, trained: TrialDir, images: Manifest
) -> None:
    path = next(trained.checkpoints.glob("*/trainable.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"trainable\.safetensors differs"):
        finish_run(run, images, 2.5)
    assert not run.is_finished


def test_bad_images_are_listed_where_people_look(run: RunDir, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    images = SimpleNamespace(uri=str(shards), manifest=SimpleNamespace(num_bad=1))
    copy_bad_images(images, run)
    assert "bad_images.parquet" not in files_of(run)
    (shards / "bad_images.parquet").write_bytes(b"listing")
    copy_bad_images(images, run)
    assert (run.path / "bad_images.parquet").read_bytes() == b"listing"
