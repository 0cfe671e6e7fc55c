import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.utils.callback import _create_default_callbacks
from rich.console import Console

from tlrunner.config import TrialConfig
from tlrunner.configfile import validate
from tlrunner.errors import StorageError
from tlrunner.jobconfig import JobConfig
from tlrunner.signals import Halt
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import TrialDir
from tlrunner.tune.members import Members, as_member
from tlrunner.tune.progress import NoOtherLines, Progress
from tlrunner.tune.space import trial_at

WriteTrial = Callable[..., TrialConfig]


@dataclass
class RayTrial:
    """As much of Ray's trial as is looked at."""

    trial_id: str = "ray_00001"
    config: dict[str, Any] = field(
        default_factory=lambda: {"trial": {"index": 0, "point": {"optim.lr": 0.125}}}
    )
    max_failures: int = 0  # -1: it is to be started again


class Search:
    """A search of one trial, whose events a test plays."""

    def __init__(self, tree: dict[str, Any], path: Path, write_trial: WriteTrial) -> None:
        self.job = validate(JobConfig, tree)
        self.console = Console(file=io.StringIO(), width=200)
        self.progress = Progress(self.job, Place(path), 1, self.console, Halt())
        self.trial = RayTrial()
        self.planned = trial_at(self.job, 0, self.trial.config["trial"]["point"])
        self.directory = TrialDir(path / self.planned.trial_id)
        self.write_trial = write_trial
        self.progress.on_trial_start(0, [], self.trial)

    def report(self, epoch: int, val_acc: float) -> None:
        result = {"epoch": epoch, "val_acc": val_acc, "seconds": 2.0 * epoch}
        self.progress.on_trial_result(0, [], self.trial, result)

    def leave(self, val_accs: list[float], state: str | None = None) -> None:
        """What the trial's process wrote."""
        config = self.planned.config
        self.write_trial(self.directory.path, val_accs, state, config=config, detail="so it says")

    @property
    def lines(self) -> list[str]:
        return self.console.file.getvalue().splitlines()


@pytest.fixture
def search(tiny_tree: dict[str, Any], tmp_path: Path, write_trial: WriteTrial) -> Search:
    return Search(tiny_tree, tmp_path, write_trial)


def test_a_trial_that_could_not_start_is_a_failed_one(search: Search) -> None:
    search.progress.rows.clear()
    search.progress.on_trial_error(0, [], search.trial)
    record = search.directory.read()
    assert (record.state, record.detail) == ("failed", "its process died or could not start")
    assert search.lines[-1].endswith("failed")


def test_a_log_has_one_line_an_epoch_and_the_best_so_far(search: Search) -> None:
    search.report(1, 0.75)
    search.report(2, 0.5)
    search.leave([0.75, 0.5])
    search.progress.on_trial_complete(0, [], search.trial)
    assert len(search.lines) == 2, "the last epoch is said with the end"
    assert "epoch 1/2  best val_acc 0.7500  2 s  running" in search.lines[0]
    assert "epoch 2/2  best val_acc 0.7500  4 s  completed" in search.lines[1]
    assert all(search.planned.trial_id in line for line in search.lines)


def test_a_trial_that_the_scheduler_ended_is_recorded_as_stopped(search: Search) -> None:
    search.report(1, 0.5)
    search.leave([0.5])
    search.progress.on_trial_complete(0, [], search.trial)
    assert search.directory.read().state == "stopped"
    assert search.lines[-1].endswith("stopped")


@pytest.mark.parametrize("val_accs", [[], [0.5]])
def test_a_trial_that_diverged_stays_diverged(search: Search, val_accs: list[float]) -> None:
    search.leave(val_accs, "diverged")
    search.progress.on_trial_complete(0, [], search.trial)
    assert search.directory.read().state == "diverged"
    assert search.directory.read().detail == "so it says"
    assert search.lines[-1].endswith("diverged")


def test_an_error_keeps_the_line_that_the_trial_left(search: Search) -> None:
    search.leave([0.5], "failed")
    search.progress.on_trial_error(0, [], search.trial)
    assert search.directory.read().detail == "so it says"
    assert search.lines[-1].endswith("failed")


@pytest.mark.parametrize("val_accs", [None, [], [0.5]])
def test_a_process_that_died_is_recorded_as_failed(
    search: Search, val_accs: list[float] | None
) -> None:
    if val_accs is not None:
        search.leave(val_accs)
    search.progress.on_trial_error(0, [], search.trial)
    record = search.directory.read()
    assert (record.state, record.config) == ("failed", search.planned.config)
    assert "process died" in record.detail
    assert len(record.epochs) == len(val_accs or [])


@pytest.mark.parametrize("is_population", [False, True])
def test_a_process_that_died_before_it_took_its_trial_costs_no_trial(
    search: Search, tmp_path: Path, is_population: bool
) -> None:
    if is_population:
        search.progress.members = Members(Place(tmp_path), [as_member(search.trial.config)])
    search.trial.max_failures = -1
    search.progress.on_trial_error(0, [], search.trial)
    assert not search.directory.has_begun
    assert search.lines[-1].endswith("interrupted")


def test_a_death_that_cannot_be_recorded_ends_the_search(search: Search) -> None:
    search.directory.path.write_text("a file in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        search.progress.on_trial_error(0, [], search.trial)
    assert search.progress.error is not None
    assert search.progress.error.exit_code == 73


def test_a_terminal_has_a_table_with_the_running_trials_first(
    search: Search, tiny_tree: dict[str, Any]
) -> None:
    search.report(1, 0.5)
    search.leave([0.5, 0.5])
    search.progress.on_trial_complete(0, [], search.trial)
    other = RayTrial("ray_00002", {"trial": {"index": 1, "point": {"optim.lr": 0.5}}})
    search.progress.on_trial_start(0, [], other)
    screen = Console(file=io.StringIO(), width=120)
    screen.print(search.progress.live.get_renderable())
    text = screen.file.getvalue()
    assert text.index("running") < text.index("completed")
    assert "1 of 1 trials ended" in text
    assert f"best 0.5000 ({search.planned.trial_id})" in text


def test_a_saved_copy_of_the_callback_holds_nothing(search: Search) -> None:
    assert vars(copy.copy(search.progress)) == {}


@pytest.mark.parametrize(
    ("event", "does"),
    [("on_trial_complete", "fetch"), ("on_trial_complete", "save"), ("on_trial_error", "fetch")],
)
def test_a_store_that_is_down_is_what_ends_the_search(
    search: Search, monkeypatch: pytest.MonkeyPatch, event: str, does: str
) -> None:
    def down(*_: object, **__: object) -> None:
        raise StorageError("the store is down")

    search.leave([0.5])
    assert not search.progress.has_error()
    monkeypatch.setattr(Place, does, down)
    # Ray would start a trial again whose end it cannot tell.
    raises = event == "on_trial_error"
    with pytest.raises(StorageError, match="is down") if raises else nullcontext():
        getattr(search.progress, event)(0, [], search.trial)
    assert search.progress.has_error()
    assert str(search.progress.error) == "the store is down"


def test_a_trial_that_was_at_its_end_is_not_failed_by_the_death_of_its_process(
    search: Search,
) -> None:
    search.leave([0.5, 0.5])
    search.progress.on_trial_error(0, [], search.trial)
    assert search.directory.read().state == "completed"
    assert search.lines[-1].endswith("completed")


def test_ray_prints_nothing_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", raising=False)
    given = NoOtherLines()
    used = _create_default_callbacks([given], metric="val_acc", mode="max", config={})
    ours = [callback for callback in used if isinstance(callback, TrialProgressCallback)]
    assert ours == [given]
    trial: Any = SimpleNamespace(last_result={})
    given.on_trial_complete(0, [], trial)
    given.on_trial_error(0, [], trial)
    given.on_trial_result(0, [], trial, {"done": True})
    assert capsys.readouterr().out == ""
