"""Which point is next, and what a search learns from trials that ended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher
from rich.console import Console

from tlrunner.config import TrialConfig
from tlrunner.configfile import validate
from tlrunner.jobconfig import JobConfig
from tlrunner.searchconfig import Distribution
from tlrunner.signals import Halt
from tlrunner.train.images import Images
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import EpochReport, TrialRecord
from tlrunner.tune import search
from tlrunner.tune.propose import ListedPoints, OptunaPoints, Proposer, objectives
from tlrunner.tune.repeats import candidates, repeats_of
from tlrunner.tune.space import Point, iter_points, located, point_at, random_point, trial_at

SPACE = {
    "freeze.strategy": {"choice": ["head", "last_stages"]},
    "freeze.num_stages": {"randint": [1, 3], "when": {"freeze.strategy": "last_stages"}},
    "optim.lr": [
        {"loguniform": [1e-3, 1e-1], "when": {"freeze.strategy": "head"}},
        {"loguniform": [1e-5, 1e-4]},
    ],
    "head.kind": {"choice": ["mlp"]},
    "head.hidden_sizes": {"choice": [[8], [8, 4]]},
}


def job_of(**search: Any) -> JobConfig:
    return validate(JobConfig, {"search": {"space": SPACE, **search}})


def record_of(
    index: int, config: TrialConfig, val_acc: float | None, params: int = 9
) -> TrialRecord:
    """A trial that ended with an accuracy, or with none."""
    epochs = ()
    if val_acc is not None:
        epochs = (EpochReport(1, val_acc, 1.0, 1.0, 9.0, 1, params, 0.01, 2.0, None),)
    return TrialRecord(f"{index:04d}-abcdef", config, epochs, "completed", "")


def test_a_config_tells_the_point_that_leads_to_it() -> None:
    job = job_of()
    for attempt in range(50):
        point = random_point(job, attempt)
        trial = trial_at(job, 0, point)
        assert located(job, trial.config) is not None
        assert trial_at(job, 0, point_at(job, trial)) == trial


def test_a_config_outside_the_space_leads_from_no_point() -> None:
    job = job_of()
    config = trial_at(job, 0, random_point(job, 0)).config
    far = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 50.0})})
    assert located(job, far) is None


def test_tpe_goes_on_behind_the_trials_that_ended_and_remembers_them() -> None:
    job = job_of(algorithm="tpe", budget={"num_trials": 6})
    ended = [
        record_of(index, trial_at(job, index, random_point(job, index)).config, 0.1 * index)
        for index in range(4)
    ]
    points = OptunaPoints(job, ended, [])
    assert points.num_learnt == 4
    asked = [points.ask() for _ in range(3)]
    assert [pair and pair[0] for pair in asked] == [4, 5, None], "two of six are left"


def test_a_continued_search_over_seeds_remembers_trials_of_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(algorithm="tpe", budget={"num_trials": 6})
    seeds = {**job.search.space, "train.seed": (Distribution(randint=(1, 9)),)}
    job = job.model_copy(update={"search": job.search.model_copy(update={"space": seeds})})
    config = trial_at(job, 0, random_point(job, 0)).config
    given: list[OptunaPoints] = []
    monkeypatch.setattr(search, "_run", lambda search, points, *others: given.append(points))
    ended = [record_of(0, config, 0.5)]
    begun = search.Search(job, 6, 0.0, Place(tmp_path), Images("", ""), Halt(), ended)
    search.run_search(begun, Console())
    assert config.train.seed != job.train.seed
    assert [points.num_learnt for points in given] == [1]


def test_tpe_prefers_what_did_well_in_an_earlier_run() -> None:
    job = job_of(algorithm="tpe", budget={"num_trials": 30})
    records = []
    for attempt in range(60):
        config = trial_at(job, attempt, random_point(job, attempt)).config
        records.append(record_of(attempt, config, 0.9 if config.freeze.strategy == "head" else 0.1))
    taught, untaught = OptunaPoints(job, [], records), OptunaPoints(job, [], [])

    def num_heads(points: OptunaPoints) -> int:
        asked = [points.ask() for _ in range(30)]
        return sum(pair is not None and pair[1]["freeze.strategy"] == "head" for pair in asked)

    assert taught.num_learnt == 60
    assert num_heads(taught) > 20 > num_heads(untaught)


def test_trials_that_came_to_nothing_or_lie_elsewhere_teach_nothing() -> None:
    job = job_of(algorithm="tpe")
    config = trial_at(job, 0, random_point(job, 0)).config
    far = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 50.0})})
    records = [record_of(0, config, None), record_of(1, far, 0.5)]
    assert OptunaPoints(job, [], records).num_learnt == 0


def test_two_objectives_are_both_told() -> None:
    job = job_of(algorithm="tpe", trade_off="total_params", budget={"num_trials": 9})
    config = trial_at(job, 0, random_point(job, 0)).config
    assert objectives(job, record_of(0, config, 0.5, params=7)) == [0.5, 7.0]
    points = OptunaPoints(job, [], [record_of(0, config, 0.5)])
    for _ in range(3):
        asked = points.ask()
        assert asked is not None
        points.tell(asked[0], lambda: record_of(0, config, 0.6, params=10))
    points.tell(points.ask()[0], lambda: None)  # type: ignore[index]
    assert len(points.study.best_trials) == 4


# -- The proposer ----------------------------------------------------------------------------------


def test_a_proposer_waits_for_room_and_ends_with_its_points() -> None:
    told: list[tuple[int, TrialRecord | None]] = []
    record = record_of(3, TrialConfig(), 0.5)

    class Told(ListedPoints):
        def tell(self, index: int, read: Callable[[], TrialRecord | None]) -> None:
            told.append((index, read()))

    points: list[tuple[int, Point]] = [(3, {"optim.lr": 0.1})]
    room = [False, True, True]
    proposer = Proposer(Told(points), lambda: False, lambda: room.pop(0), {"ray-0": record}.get)
    assert proposer.suggest("ray-0") is None
    assert proposer.suggest("ray-0") == {"trial": {"index": 3, "point": {"optim.lr": 0.1}}}
    assert proposer.suggest("ray-1") == Searcher.FINISHED
    proposer.on_trial_complete("ray-0", {})
    proposer.on_trial_complete("unknown", {})
    assert told == [(3, record)]


@pytest.mark.parametrize("has_room", [True, False])
def test_a_proposer_ends_with_its_search_whatever_is_left(has_room: bool) -> None:
    points = ListedPoints([(0, {}), (1, {})])
    over = [False, True]
    proposer = Proposer(points, lambda: over.pop(0), lambda: has_room, lambda trial_id: None)
    assert (proposer.suggest("ray-0") is not None) == has_room
    assert proposer.suggest("ray-1") == Searcher.FINISHED
    assert points.ask() == ((1, {}) if has_room else (0, {}))


def test_nothing_of_a_proposer_is_saved(tmp_path: Path) -> None:
    proposer = Proposer(ListedPoints([]), bool, bool, lambda trial_id: None)
    assert proposer.__getstate__() == {}
    proposer.save(str(tmp_path / "file"))
    assert not list(tmp_path.iterdir())


def test_a_search_without_a_number_of_trials_goes_on_until_the_space_ends() -> None:
    space = {"train.batch_size": {"choice": [4, 8, 16]}, "train.seed": {"randint": [1, 3]}}
    job = validate(JobConfig, {"search": {"space": space, "budget": {"wall_seconds": 9}}})
    assert len(list(iter_points(job))) == 9


# -- Repeats ---------------------------------------------------------------------------------------


def test_the_best_are_repeated_with_seeds_of_their_own() -> None:
    job = job_of(final_repeats=2, final_candidates=2)
    configs = [trial_at(job, index, random_point(job, index)).config for index in range(4)]
    records = [
        record_of(index, config, val_acc)
        for index, (config, val_acc) in enumerate(zip(configs, (0.2, 0.9, None, 0.8), strict=True))
    ]
    best = candidates(job, records)
    assert [record.index for record in best] == [1, 3]
    points = repeats_of(job, best)
    assert [(index, point["train.seed"]) for index, point in points] == [
        (1, 1),
        (3, 1),
        (1, 2),
        (3, 2),
    ]
    for index, point in points:
        repeat = trial_at(job, index, point).config
        seed = repeat.train.model_copy(update={"seed": job.train.seed})
        assert repeat.model_copy(update={"train": seed}) == configs[index]


@pytest.mark.parametrize("val_acc", [0.1, 0.99])
def test_a_repeat_is_no_candidate(val_acc: float) -> None:
    job = job_of(final_repeats=2)
    config = trial_at(job, 0, {**random_point(job, 0), "train.seed": 5}).config
    assert candidates(job, [record_of(0, config, val_acc)]) == []


def test_tpe_asks_again_for_the_trials_that_were_broken_off() -> None:
    job = job_of(algorithm="tpe", budget={"num_trials": 6})
    configs = [trial_at(job, index, random_point(job, index)).config for index in range(4)]
    ended = [record_of(index, config, 0.5) for index, config in enumerate(configs[:2])]
    broken_off = [record_of(index, configs[index], 0.1) for index in (3, 2)]
    points = OptunaPoints(job, ended, [], broken_off)
    asked = [points.ask() for _ in range(5)]
    assert [pair and pair[0] for pair in asked] == [3, 2, 4, 5, None]
    for index, point in asked[:2]:
        assert trial_at(job, index, point).config == configs[index]
    points.tell(3, lambda: record_of(3, configs[3], 0.9))
