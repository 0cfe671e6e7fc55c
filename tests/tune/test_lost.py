"""Trials that Ray loses: they run again, and in the end they have failed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tlrunner.configfile import validate
from tlrunner.jobconfig import JobConfig
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import EpochReport, TrialDir
from tlrunner.tune import search as module
from tlrunner.tune.members import Member, Members, kept_members
from tlrunner.tune.propose import ListedPoints, Points
from tlrunner.tune.search import MOST_ROUNDS, Search
from tlrunner.tune.space import trial_at

POINTS: list[tuple[int, dict[str, Any]]] = [(0, {"optim.lr": 0.1}), (1, {"optim.lr": 0.2})]


@pytest.fixture
def search(tiny_tree: dict[str, Any], tmp_path: Path) -> Search:
    space = {"optim.lr": {"grid": [0.1, 0.2]}}
    job = validate(JobConfig, {**tiny_tree, "search": {"algorithm": "grid", "space": space}})
    return Search(job, 2, 0.0, Place(tmp_path), images=None, is_halted=lambda: False)  # type: ignore[arg-type]


def rounds(
    search: Search,
    monkeypatch: pytest.MonkeyPatch,
    comes_back: Callable[[int, int], bool],
    *,
    is_over: bool = False,
) -> list[list[int]]:
    """Which trials each round had; of `comes_back(trial, round)` there is an end."""
    seen: list[list[int]] = []

    def tuned(search: Search, points: Points, *_: object) -> None:
        asked = list(iter(points.ask, None))
        for point in asked:
            directory = TrialDir(search.trials.below(trial_at(search.job, *point).trial_id))
            directory.begin(search.job.trial())
            if comes_back(point[0], len(seen)):
                directory.end("completed")
        seen.append([index for index, _ in asked])

    monkeypatch.setattr(module, "_tune", tuned)
    spending: Any = SimpleNamespace(is_over=is_over)
    module._run(search, ListedPoints(POINTS), spending, Console())
    module._end_trials(search, lambda record: True)
    return seen


def test_a_lost_member_of_a_population_goes_on_as_what_it_had_become(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {"scheduler": "pbt", "perturbation_epochs": 1, "budget": {"num_trials": 2}}
    tree["space"] = {"optim.lr": {"loguniform": [1e-5, 1e-2]}}
    job = validate(JobConfig, {**tiny_tree, "search": tree})
    search = Search(job, 2, 0.0, Place(tmp_path), images=None, is_halted=lambda: False)  # type: ignore[arg-type]
    copy = Member(1, {"optim.lr": 0.3}, ("0000-abcdef", 1, "00000004-0"))
    copied = tmp_path / "trials/0000-abcdef/checkpoints/00000004-0"
    copied.mkdir(parents=True)
    (copied / "state.safetensors").touch()
    seen: list[list[Member]] = []

    def tuned(search: Search, points: Points, *_: object) -> None:
        population = module._population(search, points)
        seen.append(population)
        members = Members(search.run, population)
        for member in population:
            directory = TrialDir(search.trials.below(member.planned(job).trial_id))
            directory.begin(member.planned(job).config)
            if member.index == 0 or len(seen) == 3:
                directory.end("completed")
            elif len(seen) == 1:
                directory.end("stopped", "gave way")
                members.become(copy)

    monkeypatch.setattr(module, "_tune", tuned)
    spending: Any = SimpleNamespace(is_over=False)
    module._run(search, ListedPoints(POINTS), spending, Console())
    assert seen == [[Member(*point) for point in POINTS], [copy], [copy]]
    trials = [trial.read() for trial in module._begun(search.trials)]
    assert sorted(trial.state for trial in trials) == ["completed", "completed", "stopped"]
    assert {member.index for member in kept_members(search.run)} == {0, 1}


def test_a_repeat_that_was_broken_off_is_not_ended_with_the_trials_before_it(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"optim.lr": {"grid": [0.1, 0.2]}}
    tree = {"algorithm": "grid", "space": space, "final_repeats": 2, "final_candidates": 1}
    job = validate(JobConfig, {**tiny_tree, "search": tree})
    search = Search(job, 2, 0.0, Place(tmp_path), images=None, is_halted=lambda: False)  # type: ignore[arg-type]
    best = TrialDir(search.trials.below(trial_at(job, 0, {"optim.lr": 0.1}).trial_id))
    best.begin(trial_at(job, 0, {"optim.lr": 0.1}).config)
    best.append(EpochReport(1, 0.5, 1.0, 2.0, 50.0, 10, 20, 0.01, 1.5, None))
    repeat = trial_at(job, 0, {"optim.lr": 0.1, "train.seed": job.train.seed + 1})
    broken_off = TrialDir(search.trials.below(repeat.trial_id))
    broken_off.begin(repeat.config)
    seen: list[str] = []

    def tuned(search: Search, points: Points, *_: object) -> None:
        for point in iter(points.ask, None):
            directory = TrialDir(search.trials.below(trial_at(job, *point).trial_id))
            seen.append(directory.read().state if directory.has_begun else "new")
            if not directory.has_begun:
                directory.begin(trial_at(job, *point).config)
            directory.end("stopped")

    monkeypatch.setattr(module, "_tune", tuned)
    monkeypatch.setattr(TrialDir, "keep_weights", lambda directory: None)
    module.run_search(search, Console())
    assert seen == ["interrupted", "new", "interrupted", "new"], "both trials, then both repeats"


def states(search: Search) -> dict[int, str]:
    records = [TrialDir(path).read() for path in search.trials.path.iterdir()]
    return {record.index: record.state for record in records}


def test_a_lost_trial_runs_again_without_the_others(search: Search, monkeypatch) -> None:
    assert rounds(search, monkeypatch, lambda trial, n: trial == 0 or n == 2) == [[0, 1], [1], [1]]
    assert states(search) == {0: "completed", 1: "completed"}


def test_what_is_lost_again_and_again_has_failed(search: Search, monkeypatch) -> None:
    seen = rounds(search, monkeypatch, lambda trial, n: trial == 0)
    assert seen == [[0, 1], *([[1]] * MOST_ROUNDS)]
    assert states(search) == {0: "completed", 1: "failed"}


def test_what_a_budget_ended_is_not_lost(search: Search, monkeypatch) -> None:
    assert rounds(search, monkeypatch, lambda trial, n: trial == 0, is_over=True) == [[0, 1]]
    assert states(search) == {0: "completed", 1: "stopped"}
