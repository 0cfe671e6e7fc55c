"""Each epoch of each trial is told once: to TensorBoard, to MLflow, to W&B."""

import copy
import importlib.util
import json
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record

from tlrunner.cli import run_job
from tlrunner.configfile import validate
from tlrunner.errors import ConfigError
from tlrunner.jobconfig import JobConfig, TrackConfig
from tlrunner.train.place import Place
from tlrunner.tune.tracking import RUN_TAG, Tracker, check_trackers, trackers

FIGURES = {
    "epoch",
    "val_acc",
    "val_loss",
    "train_loss",
    "images_per_second",
    "trainable_params",
    "total_params",
    "latency_seconds",
    "seconds",
    "fill_seconds",
    "saved_seconds",
    "reused_bytes",
}
Events = Counter[tuple[str, str, int]]  # trial, figure, epoch

# MLflow's own, of the SQLAlchemy that it runs on.
sqlalchemy_complains = pytest.mark.filterwarnings("ignore:.*noload:DeprecationWarning")


# -- What the three of them hold -------------------------------------------------------------------


def tensorboard_messages(file: Path) -> Iterator[Event]:
    """Of a TFRecord file: a length, its checksum, the message, its checksum."""
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def in_tensorboard(run: Path) -> Events:
    return Counter(
        (file.parent.name, value.tag, event.step)
        for file in run.glob("tensorboard/*/*")
        for event in tensorboard_messages(file)
        for value in event.summary.value
        if value.HasField("simple_value")
    )


def runs_in_mlflow(uri: str, experiment: str) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def in_mlflow(uri: str, experiment: str) -> Events:
    client = mlflow.MlflowClient(uri)
    return Counter(
        (run.info.run_name, name, metric.step)
        for run in runs_in_mlflow(uri, experiment)
        for name in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, name)
    )


def wandb_messages(file: Path) -> Iterator[Record]:
    """Of a LevelDB log: after 7 bytes, blocks of 32 KiB with parts of messages in them."""
    content, at, message = file.read_bytes(), 7, b""
    while at + 7 < len(content):
        left = 32768 - at % 32768
        if left < 7:  # too short for a part, so filled up
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole message, or the last part of one
            yield Record.FromString(message)
            message = b""


def in_wandb(run: Path) -> Events:
    events: Events = Counter()
    for file in run.glob("wandb/*run-*/*.wandb"):
        messages = list(wandb_messages(file))
        (name,) = {m.run.display_name for m in messages if m.HasField("run")}
        for message in messages:
            for item in message.history.item:
                figure = item.key or item.nested_key[0]
                if figure in FIGURES:
                    events[name, figure, message.history.step.num] += 1
    return events


def once(*epochs: tuple[str, int], first: int = 1) -> Events:
    """Each figure of each epoch, up to the last one of each trial, once."""
    return Counter(
        (trial_id, figure, epoch)
        for trial_id, last in epochs
        for figure in FIGURES
        for epoch in range(first, last + 1)
    )


# -- A search that a test plays --------------------------------------------------------------------


@dataclass
class RayTrial:
    """As much of Ray's trial as is looked at, and our name of it."""

    name: str = "0000-abcdef"
    trial_id: str = "ray_00001"
    config: dict[str, Any] = field(
        default_factory=lambda: {
            "trial": {"index": 0, "point": {"optim.lr": 0.125, "freeze.num_stages": None}}
        }
    )


class Search:
    """What Ray tells its callbacks."""

    def __init__(self, run: Path, tree: dict[str, Any], told_before: set[str], **track: Any):
        job = validate(JobConfig, {**tree, "track": track})
        self.trackers = trackers(
            job, Place(run), lambda trial: trial.name, lambda trial: False, told_before
        )

    def start(self, trial: RayTrial) -> None:
        for tracker in self.trackers:
            tracker.on_trial_start(0, [], trial)

    def report(self, trial: RayTrial, epoch: int) -> None:
        figures = dict.fromkeys(FIGURES - {"epoch"}, 0.5)
        more = {"checkpoint": "00000004-0", "time_this_iter_s": 1.0, "pid": 7}
        for tracker in self.trackers:
            tracker.on_trial_result(0, [], trial, {**figures, **more, "epoch": epoch})

    def complete(self, trial: RayTrial) -> None:
        for tracker in self.trackers:
            tracker.on_trial_complete(0, [], trial)

    def error(self, trial: RayTrial) -> None:
        for tracker in self.trackers:
            tracker.on_trial_error(0, [], trial)

    def play(self, trial: RayTrial, num_epochs: int = 2) -> None:
        self.start(trial)
        for epoch in range(1, num_epochs + 1):
            self.report(trial, epoch)
        self.complete(trial)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


@pytest.fixture
def search(run: Path, tiny_tree: dict[str, Any]) -> Any:
    """`search(told_before, ...)`: one more start of the run."""

    def begin(told_before: set[str] = frozenset(), **track: Any) -> Search:
        return Search(run, tiny_tree, told_before, **track)

    return begin


def test_an_epoch_has_one_event_with_its_figures_by_their_own_names(run: Path, search: Any) -> None:
    one, trial = search(), RayTrial()
    one.play(trial)
    assert in_tensorboard(run) == once((trial.name, 2))


def test_a_last_result_that_is_told_twice_is_one_event(run: Path, search: Any) -> None:
    one, trial = search(), RayTrial()
    one.start(trial)
    one.report(trial, 1)
    one.report(trial, 1)
    one.complete(trial)
    assert in_tensorboard(run) == once((trial.name, 1))


def test_a_trial_that_was_paused_goes_on_in_the_same_events(run: Path, search: Any) -> None:
    one, trial = search(), RayTrial()
    one.start(trial)
    one.report(trial, 1)
    one.start(trial)
    one.report(trial, 2)
    one.complete(trial)
    assert in_tensorboard(run) == once((trial.name, 2))


def test_a_trial_that_goes_on_as_a_copy_is_another_trial(run: Path, search: Any) -> None:
    one, trial = search(), RayTrial()
    one.start(trial)
    one.report(trial, 1)
    trial.name = "0000-fedcba-e1"
    one.start(trial)
    one.report(trial, 2)
    one.complete(trial)
    copied = once((trial.name, 2), first=2)
    assert in_tensorboard(run) == once(("0000-abcdef", 1)) + copied


def test_an_earlier_start_of_a_trial_is_forgotten(run: Path, search: Any) -> None:
    one, trial = search(), RayTrial()
    one.start(trial)
    one.report(trial, 1)
    (run / "trials" / trial.name).mkdir(parents=True)
    search().play(trial)
    assert in_tensorboard(run) == once((trial.name, 2))


def test_a_trial_that_was_cleared_leaves_no_events(run: Path, search: Any) -> None:
    one, trial = search(), RayTrial()
    one.play(trial)
    one.play(RayTrial("0001-abcdef", "ray_00002"))
    offline = run / "wandb" / f"offline-run-20200102_030405-one-{trial.name}"
    cleared = run / "wandb" / "offline-run-20200102_030405-one-0001-abcdef"
    for directory in (run / "trials" / trial.name, offline, cleared):
        directory.mkdir(parents=True)
    search()
    assert in_tensorboard(run) == once((trial.name, 2))
    assert offline.exists()
    assert not cleared.exists()


def test_a_trial_that_had_ended_is_not_told_again(run: Path, search: Any) -> None:
    trial = RayTrial()
    search().play(trial)
    (run / "trials" / trial.name).mkdir(parents=True)
    files = {file: file.read_bytes() for file in run.glob("tensorboard/*/*")}
    search({trial.name}).play(trial)
    assert {file: file.read_bytes() for file in run.glob("tensorboard/*/*")} == files


def test_a_trial_that_had_ended_is_told_again_where_its_events_are_lost(
    run: Path, search: Any
) -> None:
    trial = RayTrial()
    search({trial.name}).play(trial)
    assert in_tensorboard(run) == once((trial.name, 2))


def test_a_trial_that_never_started_ends_without_an_event(run: Path, search: Any) -> None:
    one = search()
    one.complete(RayTrial())
    one.error(RayTrial("0001-abcdef", "ray_00002"))
    assert not (run / "tensorboard").exists()


def test_a_tracker_that_fails_loses_that_trial_alone(
    run: Path, search: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, lost, kept = search(), RayTrial(), RayTrial("0001-abcdef", "ray_00002")
    logger = one.trackers[0].told.logger
    told = logger.log_trial_result

    def log_trial_result(epoch: int, trial: Any, figures: dict[str, float]) -> None:
        if str(trial) == lost.name:
            raise ConnectionError("the server\nis down")
        told(epoch, trial, figures)

    monkeypatch.setattr(logger, "log_trial_result", log_trial_result)
    one.play(lost)
    one.play(kept)
    assert in_tensorboard(run) == once((kept.name, 2))
    (line,) = caplog.messages
    assert line == (
        f"TensorBoard is told no more of trial {lost.name}: ConnectionError: the server is down"
    )


def test_a_saved_copy_of_a_tracker_holds_nothing(search: Any) -> None:
    (tracker,) = search().trackers
    assert isinstance(tracker, Tracker)
    assert vars(copy.copy(tracker)) == {}


# -- MLflow and W&B --------------------------------------------------------------------------------


@sqlalchemy_complains
def test_mlflow_has_a_run_for_each_trial_and_no_other_of_this_run(
    run: Path, search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri, trial = f"sqlite:///{tmp_path}/mlflow.db", RayTrial()
    broken_off = search(mlflow_uri=uri)
    client = mlflow.MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "one"]
    of_another_run = client.create_run(
        experiment.experiment_id, run_name=trial.name, tags={RUN_TAG: "elsewhere/one"}
    )
    broken_off.start(trial)
    broken_off.report(trial, 1)

    search(mlflow_uri=uri).play(trial)
    assert in_mlflow(uri, "one") == once((trial.name, 2))
    search({trial.name}, mlflow_uri=uri).play(trial)
    runs = {run.info.run_id: run for run in runs_in_mlflow(uri, "one")}
    assert in_mlflow(uri, "one") == once((trial.name, 2))
    assert len(runs) == 2
    del runs[of_another_run.info.run_id]
    (of_this_run,) = runs.values()
    assert of_this_run.info.status == "FINISHED"
    assert of_this_run.data.params == {
        "index": "0",
        "optim.lr": "0.125",
        "freeze.num_stages": "None",
    }


def test_a_server_that_cannot_be_reached_is_found_before_a_trial_starts(
    search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"mlflow_uri is http://127\.0\.0\.1:9, and MLflow cann"):
        search(mlflow_uri="http://127.0.0.1:9")


def test_wandb_has_a_run_for_each_trial_in_a_group_for_the_search(
    run: Path, search: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, trial = search(wandb_project="flowers"), RayTrial()
    started = []
    logger = one.trackers[1].told.logger
    monkeypatch.setattr(logger, "_start_logging_actor", lambda *_, **init: started.append(init))
    one.start(trial)
    (init,) = started
    assert (
        init.items()
        >= {
            "project": "flowers",
            "group": "one",
            "name": trial.name,
            "id": f"one-{trial.name}",
            "config": {"index": 0, "optim.lr": 0.125, "freeze.num_stages": "None"},
            "mode": "offline",
            "dir": str(run),
        }.items()
    )

    # The process that writes it has failed.
    one.report(trial, 1)
    one.complete(trial)
    assert len(started) == 1
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("track", "package"),
    [
        (TrackConfig(mlflow_uri="sqlite:///m.db"), "mlflow"),
        (TrackConfig(wandb_project="flowers"), "wandb"),
    ],
)
@pytest.mark.parametrize("spec", [None, ModuleSpec("a directory of that name", None)])
def test_a_package_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, track: TrackConfig, package: str, spec: ModuleSpec | None
) -> None:
    check_trackers(track)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match=f"package {package} is not installed") as caught:
        check_trackers(track)
    assert caught.value.remedy == f"pip install tlrunner[{package}]"
    check_trackers(TrackConfig())


def test_online_needs_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    track = TrackConfig(wandb_project="flowers", wandb_mode="online")
    monkeypatch.setattr("wandb.login", lambda prompt: True)
    check_trackers(track)
    monkeypatch.setattr("wandb.login", lambda prompt: False)
    with pytest.raises(ConfigError, match="wandb_mode is online, and nobody is logged in"):
        check_trackers(track)


def test_the_two_are_not_imported_until_they_are_wanted() -> None:
    script = """
import sys
import tlrunner.tune.tracking
assert not {"mlflow", "wandb"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@sqlalchemy_complains
def test_a_search_and_its_continuation_tell_all_three_of_each_epoch_once(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    uri, run = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "runs" / "all"
    tree = {
        **tiny_tree,
        "search": {"space": {"train.seed": {"grid": [0, 1, 2]}}, "algorithm": "grid"},
        "track": {"mlflow_uri": uri, "wandb_project": "flowers"},
    }
    file = tmp_path / "all.json"
    file.write_text(json.dumps(tree))
    flags = ["--config", str(file), "--out", str(run.parent), "--name", "all"]

    def search_tells_each_epoch_once() -> None:
        assert run_job("tune", JobConfig, "tlrunner.run:tune", argv=flags) == 0
        trial_ids = sorted(directory.name for directory in run.glob("trials/*"))
        expected = once(*((trial_id, 2) for trial_id in trial_ids))
        assert len(trial_ids) == 3
        assert in_tensorboard(run) == expected
        assert in_mlflow(uri, "all") == expected
        assert in_wandb(run) == expected
        assert {r.info.status for r in runs_in_mlflow(uri, "all")} == {"FINISHED"}

    search_tells_each_epoch_once()
    shutil.rmtree(next(run.glob("trials/0001-*")))
    (run / "_SUCCESS").unlink()
    search_tells_each_epoch_once()
