"""The jobs in this process, from their flags to exit codes and files: train, prepare, predict."""

import csv
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from s3_servers import Bucket

import tlrunner
from tlrunner import run as module
from tlrunner.cli import run_job
from tlrunner.config import BackboneConfig
from tlrunner.data.dataset import open_dataset, verify_shards
from tlrunner.data.s3 import S3Store
from tlrunner.files import sha256_file
from tlrunner.jobconfig import JobConfig, PredictJob, PrepareJob, TrainJob
from tlrunner.paths import with_absolute_paths
from tlrunner.run import train
from tlrunner.train.checkpoint import verify_commit
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import EpochReport

Captured = pytest.CaptureFixture[str]
Job = Callable[..., int]
FINISHED = {
    ".lease.json",
    "run.json",
    "trials",
    "best",
    "leaderboard.csv",
    "summary.json",
    "report.html",
    "_SUCCESS",
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def train_job(tiny_tree: dict[str, Any], tmp_path: Path, out: Path) -> Job:
    """`train_job(*flags)`: jobs/train.py on the tiny trial, as run `mine`."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_tree))

    def job(*flags: str) -> int:
        given = ["--config", str(config), "--out", str(out), "--name", "mine", *flags]
        return run_job("train", TrainJob, train, argv=given)

    return job


def prepare_job(*flags: str) -> int:
    return run_job("prepare_images", PrepareJob, "tlrunner.run:prepare_images", argv=flags)


def predict_job(*flags: str) -> int:
    job = "tlrunner.predict:predict"
    return run_job("predict", PredictJob, job, needs_model=True, argv=flags)


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def content_of(directory: Path) -> dict[str, str]:
    """Every file below a directory, hashed."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): sha256_file(path) for path in files}


def error_of(capsys: Captured) -> str:
    """The one line that a job ended with."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("tlrunner: ")
    return lines[0]


# -- Train -----------------------------------------------------------------------------------------


def test_one_command_gives_a_model_a_report_and_a_success(
    train_job: Job, out: Path, capsys: Captured
) -> None:
    assert train_job() == 0
    run = out / "mine"
    assert {path.name for path in run.iterdir()} == FINISHED
    for name, facts in json.loads((run / "_SUCCESS").read_text()).items():
        assert facts["sha256"] == sha256_file(run / name)
    verify_commit(run / "best")
    assert tlrunner.load(run / "best").labels == ("blue", "green", "red")

    summary = summary_of(run)
    assert summary["status"] == "ok"
    assert summary["trials"]["total"] == summary["trials"]["completed"] == 1
    with (run / "leaderboard.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["val_acc"]) == summary["best"]["val_acc"]
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "27 images train, 9 validate, 0 test; 3 classes" in printed.out
    assert "epoch 1/2" in printed.out
    assert str(run / "best") in printed.out


def test_a_finished_run_is_told_again_not_computed_again(
    train_job: Job, out: Path, capsys: Captured
) -> None:
    train_job()
    before = content_of(out)
    capsys.readouterr()
    assert train_job() == 0
    assert "is finished already" in capsys.readouterr().out
    assert content_of(out) == before


@pytest.mark.parametrize("name", ["best/model.safetensors", "summary.json", "run.json"])
def test_a_finished_run_that_rotted_is_refused_by_name(
    train_job: Job, out: Path, capsys: Captured, name: str
) -> None:
    train_job()
    file = out / "mine" / name
    content = file.read_bytes()
    file.write_bytes(content[:-9] + b" " + content[-8:])
    capsys.readouterr()
    assert train_job() == 73
    assert f"{file} does not read back as it was written" in error_of(capsys)
    file.write_bytes(content)
    assert train_job() == 0


def test_another_config_under_the_name_of_a_run_is_refused(
    train_job: Job, out: Path, capsys: Captured
) -> None:
    train_job()
    before = content_of(out)
    capsys.readouterr()
    assert train_job("--set", "train.seed=1") == 64
    assert "begun with another config" in error_of(capsys)
    assert content_of(out) == before


def test_the_winner_repeats_itself_from_its_own_config(train_job: Job, out: Path) -> None:
    train_job()
    config = out / "mine" / "best" / "trial.json"
    flags = ["--config", str(config), "--out", str(out), "--name", "again"]
    assert run_job("train", TrainJob, train, argv=flags) == 0
    first, again = (summary_of(out / name)["best"] for name in ("mine", "again"))
    for key in ("val_acc", "val_loss", "epoch", "config", "trial_id"):
        assert again[key] == first[key]


def test_only_the_end_is_missing_only_the_end_is_done(
    train_job: Job, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_job()
    (out / "mine" / "_SUCCESS").unlink()
    trials = content_of(out / "mine" / "trials")

    def again(*_: object, **__: object) -> None:
        raise AssertionError("the trial ran again")

    monkeypatch.setattr("tlrunner.run.run_trial", again)
    assert train_job() == 0
    assert content_of(out / "mine" / "trials") == trials
    assert (out / "mine" / "_SUCCESS").exists()


def test_an_interrupted_run_ends_with_75_and_the_same_command_finishes_it(
    train_job: Job, out: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlrunner.run import run_trial

    def cut_short(config: Any, report: Any, **places: Any) -> None:
        def interrupt(finished: EpochReport) -> None:
            report(finished)
            raise KeyboardInterrupt

        run_trial(config, interrupt, **places)

    with monkeypatch.context() as patched:
        patched.setattr("tlrunner.run.run_trial", cut_short)
        assert train_job() == 75
    assert "the same command with --name mine continues it" in error_of(capsys)
    assert summary_of(out / "mine")["status"] == "interrupted"
    assert not (out / "mine" / "_SUCCESS").exists()
    assert not (out / "mine" / "best").exists()

    assert train_job() == 0
    assert summary_of(out / "mine")["status"] == "ok"
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["mine"]


def test_a_run_that_diverged_at_once_has_no_usable_trial(
    train_job: Job, out: Path, capsys: Captured
) -> None:
    flags = ["optim.optimizer=sgd", "optim.lr=100", "optim.schedule=constant"]
    assert train_job(*(word for flag in flags for word in ("--set", flag))) == 3
    assert "no trial is usable" in capsys.readouterr().out
    summary = summary_of(out / "mine")
    assert (summary["status"], summary["best"]) == ("failed", None)
    assert summary["trials"]["diverged"] == 1
    assert not (out / "mine" / "best").exists()


def test_a_dry_run_writes_nothing(
    train_job: Job, out: Path, tmp_path: Path, capsys: Captured
) -> None:
    cache = tmp_path / "cache"
    assert train_job("--dry-run", "--set", f"data.cache_dir={cache}") == 0
    assert "estimate, measured on this machine" in capsys.readouterr().out
    assert not out.exists()
    assert not cache.exists()


def test_relative_paths_are_those_of_the_caller(
    train_job: Job, colour_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(colour_folder.parent)
    assert train_job("--data", colour_folder.name, "--out", "../elsewhere") == 0
    run = (colour_folder.parent / ".." / "elsewhere" / "mine").resolve()
    assert summary_of(run)["best"]["config"]["data"]["uri"] == str(colour_folder)
    shutil.rmtree(run.parent)


def test_weights_in_the_callers_directory_are_found_by_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for weights, settled in [
        ("w.pth", str(tmp_path / "w.pth")),
        ("here/w", str(tmp_path / "here" / "w")),
        ("s3://bucket/w.pth", "s3://bucket/w.pth"),
        ("IMAGENET1K_V1", "IMAGENET1K_V1"),
    ]:
        job = TrainJob(backbone=BackboneConfig(weights=weights))
        assert with_absolute_paths(job).backbone.weights == settled


# -- Mistakes --------------------------------------------------------------------------------------


def folder(root: Path, colours: Path, classes: dict[str, int]) -> str:
    """A copy of the colour images: class -> number of them."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for path in sorted((colours / name).iterdir())[:count]:
            shutil.copy(path, root / name)
    root.mkdir(exist_ok=True)
    return str(root)


@pytest.mark.parametrize(
    ("classes", "fragments"),
    [
        ({}, ["holds no images"]),
        ({"red": 3}, ["one class: red", "at least two"]),
        ({"red": 3, "blue": 1}, ["class 'blue' has 1 usable image;", "data.val_fraction=0.25"]),
        ({"red": 3, "blue": 0}, ["class folders without images: blue"]),
    ],
    ids=["empty", "one_class", "too_few", "an_empty_class"],
)
def test_images_that_cannot_train_are_a_data_error(
    train_job: Job,
    colour_folder: Path,
    tmp_path: Path,
    out: Path,
    capsys: Captured,
    classes: dict[str, int],
    fragments: list[str],
) -> None:
    images = folder(tmp_path / "images", colour_folder, classes)
    assert train_job("--data", images, "--set", f"data.cache_dir={tmp_path / 'cache'}") == 65
    line = error_of(capsys)
    assert all(fragment in line for fragment in fragments), line
    assert not (out / "mine").exists()


def test_a_missing_directory_names_the_nearest(
    train_job: Job, colour_folder: Path, out: Path, capsys: Captured
) -> None:
    assert train_job("--data", str(colour_folder.with_name("image"))) == 65
    line = error_of(capsys)
    assert "does not exist" in line
    assert f"did you mean {colour_folder}?" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("assignment", "fragments"),
    [
        ("backbone.name=resnet5O", ["'resnet5O'", "did you mean resnet50"]),
        ("backbone.name=vit_tiny_patch16_224", ["timm/vit_tiny_patch16_224 exists"]),
        ("backbone.weights=IMAGENET1K_V9", ["IMAGENET1K_V9", "IMAGENET1K_V1"]),
        ("backbone.nme=resnet50", ["unknown key 'backbone.nme'", "did you mean name?"]),
        ("optim.momentum=0.9", ["'momentum' is not used with optimizer 'adamw'", "sgd"]),
        ("train.epochs=0", ["train.epochs is 0", "greater than or equal to 1"]),
        (
            "freeze={strategy: last_stages, num_stages: 10}",
            ["freeze.num_stages is 10, squeezenet1_1 has 9 stages", "1..9"],
        ),
        ("data.limit=5", ["data.limit is 5", "at least 6"]),
        ("data.image_size=16", ["data.image_size is 16, which squeezenet1_1 cannot take"]),
        ("train.mixed_precision=fp16", ["fp16, which needs a GPU", "bf16"]),
        ("output.name=../mine", ["output.name is '../mine'"]),
    ],
)
def test_a_config_that_cannot_be_leaves_no_run(
    train_job: Job, out: Path, capsys: Captured, assignment: str, fragments: list[str]
) -> None:
    assert train_job("--set", assignment) == 64
    line = error_of(capsys)
    assert all(fragment in line for fragment in fragments), line
    assert not (out / "mine").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be had")
def test_a_gpu_that_is_not_there_leaves_no_run(train_job: Job, out: Path, capsys: Captured) -> None:
    assert train_job("--set", "resources.gpus_per_worker=1") == 69
    assert "resources.gpus_per_worker is 1" in error_of(capsys)
    assert not (out / "mine").exists()


def test_after_an_error_in_its_trial_a_run_can_be_done_again(
    train_job: Job, out: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlrunner.errors import StorageError

    def full(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("tlrunner.train.keeper.write_checkpoint", full)
        assert train_job() == 73
    assert "the disk is full" in error_of(capsys)
    assert "Traceback" in (out / "mine" / "log.txt").read_text()
    assert not (out / "mine" / "_SUCCESS").exists()
    assert train_job() == 0


def test_an_output_that_cannot_be_written_is_a_storage_error(
    train_job: Job, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert train_job("--out", str(tmp_path / "file" / "runs")) == 73
    line = error_of(capsys)
    assert "file/runs cannot be written" in line
    assert "--out" in line


def test_an_image_cache_that_cannot_be_written_is_a_storage_error(
    train_job: Job, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert train_job("--set", f"data.cache_dir={tmp_path / 'file' / 'cache'}") == 73
    assert "data.cache_dir" in error_of(capsys)


# -- Bad images ------------------------------------------------------------------------------------


@pytest.fixture
def with_a_truncated_image(colour_folder: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(colour_folder, tmp_path / "images"))
    image = copy / "red" / "05.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    return copy


def test_a_truncated_image_is_left_out_and_listed(
    train_job: Job, out: Path, with_a_truncated_image: Path, tmp_path: Path
) -> None:
    allowed = ["--set", "data.max_bad_fraction=0.1", "--set", f"data.cache_dir={tmp_path / 'c'}"]
    assert train_job("--data", str(with_a_truncated_image), *allowed) == 0
    rows = pq.read_table(out / "mine" / "bad_images.parquet").to_pylist()
    assert [row["key"] for row in rows] == ["red/05.jpg"]
    assert rows[0]["reason"].startswith("truncated")


def test_too_many_bad_images_stop_a_run_and_are_listed_all_the_same(
    train_job: Job, out: Path, with_a_truncated_image: Path, tmp_path: Path, capsys: Captured
) -> None:
    cache = tmp_path / "c"
    flags = ["--data", str(with_a_truncated_image), "--set", f"data.cache_dir={cache}"]
    assert train_job(*flags) == 65
    line = error_of(capsys)
    assert "1 of 36 images" in line
    assert "data.max_bad_fraction=0.01" in line
    assert not (out / "mine").exists()
    assert not list(cache.rglob("manifest.json"))
    listing = next(cache.rglob("*bad_images.parquet"))
    assert str(listing) in line
    assert [row["key"] for row in pq.read_table(listing).to_pylist()] == ["red/05.jpg"]


# -- Prepare ---------------------------------------------------------------------------------------


def test_prepared_images_train_as_the_folder_does(
    train_job: Job, out: Path, colour_folder: Path, tmp_path: Path
) -> None:
    shards = ["--data", str(colour_folder), "--out", str(tmp_path), "--name", "shards"]
    assert prepare_job(*shards) == 0
    manifest = verify_shards(tmp_path / "shards")
    assert manifest.class_names == ("blue", "green", "red")
    assert manifest.num_images == len(open_dataset(tmp_path / "shards").keys) == 36
    train_job()
    train_job("--data", str(tmp_path / "shards"), "--name", "from_shards")
    folder, prepared = (summary_of(out / name)["best"] for name in ("mine", "from_shards"))
    assert (prepared["val_acc"], prepared["val_loss"]) == (folder["val_acc"], folder["val_loss"])


def test_shards_are_not_written_over(colour_folder: Path, tmp_path: Path, capsys: Captured) -> None:
    flags = ["--data", str(colour_folder), "--out", str(tmp_path), "--name", "shards"]
    prepare_job(*flags)
    before = content_of(tmp_path)
    capsys.readouterr()
    assert prepare_job(*flags, "--set", "shards.seed=1") == 73
    assert "was begun from other images or with other settings" in error_of(capsys)
    assert prepare_job(*flags) == 0  # the very same: it is done
    assert content_of(tmp_path) == before


def test_a_dry_run_of_preparing_counts_and_writes_nothing(
    colour_folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert prepare_job("--data", str(colour_folder), "--out", str(tmp_path), "--dry-run") == 0
    assert "36 images of 3 classes" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# -- Predict ---------------------------------------------------------------------------------------


@pytest.fixture
def model(train_job: Job, out: Path, capsys: Captured) -> Path:
    train_job()
    capsys.readouterr()
    return out / "mine" / "best"


@pytest.fixture
def predict(model: Path, colour_folder: Path, tmp_path: Path, tiny_tree: dict[str, Any]) -> Job:
    """`predict(*flags)`: jobs/predict.py on the images that the model was made from."""
    cache = tiny_tree["data"]["cache_dir"]

    def job(*flags: str) -> int:
        given = ["--model", str(model), "--data", str(colour_folder), "--out", str(tmp_path)]
        cached = ["--set", f"data.cache_dir={cache}"]
        return predict_job(*given, "--name", "predictions", *cached, *flags)

    return job


def test_predictions_reach_the_accuracy_that_was_reported(
    predict: Job, model: Path, tmp_path: Path
) -> None:
    assert predict() == 0
    metrics = json.loads((tmp_path / "predictions" / "metrics.json").read_text())
    reported = json.loads((model / "metrics.json").read_text())
    assert metrics["num_images"] == metrics["num_labelled"] == 36
    assert metrics["by_split"]["val"] == {"num_labelled": 9, "accuracy": reported["val_acc"]}
    assert metrics["by_split"]["train"]["num_labelled"] == 27

    rows = pq.read_table(tmp_path / "predictions" / "predictions.parquet").to_pylist()
    assert len({row["key"] for row in rows}) == 36
    assert all(row["label"] == row["key"].split("/")[0] for row in rows)
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in rows)
    labels = ("blue", "green", "red")
    for row in rows:
        best = max(range(3), key=lambda label: row["probabilities"][label])
        assert row["prediction"] == labels[best]
    right = [row["prediction"] == row["label"] for row in rows]
    assert metrics["accuracy"] == sum(right) / 36


def test_foreign_and_unlabelled_images_are_predicted_without_a_split(
    predict: Job, colour_folder: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    folder(foreign, colour_folder, {"red": 3, "blue": 2})
    (foreign / "blue").rename(foreign / "sky")
    flat = Path(shutil.copytree(colour_folder / "red", tmp_path / "flat"))
    for images, name, labelled in ((foreign, "one", 3), (flat, "other", 0)):
        assert predict("--data", str(images), "--name", name) == 0
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["num_labelled"] == labelled
        assert metrics["by_split"] == {}
        rows = pq.read_table(tmp_path / name / "predictions.parquet").to_pylist()
        assert {row["split"] for row in rows} == {None}
        assert sum(row["label"] is not None for row in rows) == labelled


def test_a_class_without_any_image_is_predicted_all_the_same(
    predict: Job, colour_folder: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    folder(few, colour_folder, {"blue": 3, "green": 1, "red": 3})
    (few / "green" / "00.jpg").write_bytes(b"no image")
    flags = ["--set", "data.max_bad_fraction=0.5", "--set", "data.limit=4"]
    assert predict("--data", str(few), *flags) == 0
    rows = pq.read_table(tmp_path / "predictions" / "predictions.parquet").to_pylist()
    assert sorted(row["label"] for row in rows) == ["blue", "blue", "red", "red"]


def test_predictions_are_not_written_over(predict: Job, tmp_path: Path, capsys: Captured) -> None:
    predict()
    before = content_of(tmp_path / "predictions")
    capsys.readouterr()
    assert predict() == 73
    assert "holds something already" in error_of(capsys)
    assert content_of(tmp_path / "predictions") == before


def test_a_model_that_is_none_is_a_storage_error(
    predict: Job, model: Path, tmp_path: Path, capsys: Captured
) -> None:
    (model / "labels.json").write_text('["a", "b", "c"]\n')
    assert predict() == 73
    assert "labels.json differs from what was committed" in error_of(capsys)
    assert predict("--model", str(tmp_path)) == 73
    assert "holds no COMMIT.json" in error_of(capsys)
    assert not (tmp_path / "predictions").exists()


def test_predictions_that_cannot_be_written_are_not_computed(
    predict: Job, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(*_: object, **__: object) -> None:
        raise AssertionError("it went on all the same")

    monkeypatch.setattr("tlrunner.predict.prepare", compute)
    (tmp_path / "file").write_text("in the way")
    assert predict("--out", str(tmp_path / "file")) == 73
    assert "file cannot be written" in error_of(capsys)
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "notes.txt").write_text("not to be lost")
    assert predict() == 73
    assert "holds something already" in error_of(capsys)


def test_without_a_name_a_job_that_makes_data_can_be_done_again(
    model: Path, colour_folder: Path, tmp_path: Path, tiny_tree: dict[str, Any]
) -> None:
    made = tmp_path / "made"
    flags = ["--data", str(colour_folder), "--out", str(made)]
    cached = ["--set", f"data.cache_dir={tiny_tree['data']['cache_dir']}"]
    for _ in range(2):
        assert prepare_job(*flags) == 0
        assert predict_job("--model", str(model), *flags, *cached) == 0
    jobs = [path.name.split("-") for path in made.iterdir()]
    assert sorted((job, number) for job, *_, number in jobs) == [
        ("predict", "1"),
        ("predict", "2"),
        ("prepare_images", "1"),
        ("prepare_images", "2"),
    ]


def test_a_dry_run_of_predicting_counts_and_writes_nothing(
    predict: Job, tmp_path: Path, capsys: Captured
) -> None:
    assert predict("--dry-run") == 0
    assert "36 images" in capsys.readouterr().out
    assert not (tmp_path / "predictions").exists()


# -- Tune, as far as it goes without Ray -----------------------------------------------------------


def test_a_dry_run_of_a_search_starts_nothing(
    tiny_tree: dict[str, Any],
    out: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", start)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = tmp_path / "config.json"
    space = {"optim.lr": {"choice": [0.1, 0.01]}}
    config.write_text(
        json.dumps({**tiny_tree, "search": {"space": space, "budget": {"num_trials": 2}}})
    )
    flags = ["--config", str(config), "--out", str(out), "--dry-run"]
    assert run_job("tune", JobConfig, "tlrunner.run:tune", argv=flags) == 0
    assert "for 2 trials" in capsys.readouterr().out
    assert not out.exists()


def test_the_log_is_put_as_it_was_whatever_is_added_meanwhile(
    moto_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, log = Place(tmp_path / "run", f"{moto_bucket.uri}/run"), tmp_path / "run" / "log.txt"
    log.parent.mkdir()
    log.write_text("one\n")
    put = S3Store._put

    def failing_once(*_: object, **__: object) -> str:
        monkeypatch.setattr(S3Store, "_put", put)
        log.write_text("one\nasking again\n")
        raise ConnectionError

    monkeypatch.setattr(S3Store, "_put", failing_once)
    module._save_log(SimpleNamespace(uri=place.uri, path=place.path, place=place))  # type: ignore[arg-type]
    assert place.store.read("log.txt") == b"one\n"


def test_a_log_that_cannot_be_written_is_no_error(tmp_path: Path, capsys: Captured) -> None:
    for path in (tmp_path / "gone" / "log.txt", Path("/dev/full")):
        handler = module._LogFile(path, delay=True)
        handler.handle(logging.makeLogRecord({"msg": "a line"}))
        with suppress(OSError):  # of the full disk, once more
            handler.close()
    assert capsys.readouterr().err == ""


def test_one_configuration_in_several_workers_is_a_search_of_one_trial(
    tiny_tree: dict[str, Any], out: Path, tmp_path: Path, capsys: Captured
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**tiny_tree, "resources": {"workers_per_trial": 2}}))
    flags = ["--config", str(config), "--out", str(out), "--dry-run"]
    assert run_job("train", TrainJob, "tlrunner.run:train", argv=flags) == 0
    assert "for 1 trials" in capsys.readouterr().out
