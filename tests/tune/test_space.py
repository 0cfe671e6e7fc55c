import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.configfile import config_hash, load, validate, with_values
from tlrunner.errors import ConfigError
from tlrunner.files import canonical_json
from tlrunner.jobconfig import JobConfig
from tlrunner.tune.space import (
    PlannedTrial,
    Point,
    iter_points,
    planned_trials,
    point_at,
    random_point,
    suggest_point,
    trial_at,
)

Space = dict[str, Any]

CONDITIONAL: Space = {
    # given before what it depends on, on purpose
    "freeze.num_stages": {"randint": [1, 3], "when": {"freeze.strategy": "last_stages"}},
    "freeze.strategy": {"choice": ["head", "last_stages", "full"]},
    "optim.lr": [
        {"loguniform": [1e-3, 1e-1], "when": {"freeze.strategy": "head"}},
        {"loguniform": [1e-5, 1e-4]},
    ],
    "optim.layer_decay": {
        "uniform": [0.5, 0.9],
        "when": {"freeze.strategy": ["last_stages", "full"]},
    },
}


def job_of(space: Space, base: dict[str, Any] | None = None, **search: Any) -> JobConfig:
    return validate(JobConfig, {**(base or {}), "search": {"space": space, **search}})


def listed(*points: Point, **search: Any) -> JobConfig:
    return validate(JobConfig, {"search": {"points": points, "algorithm": "grid", **search}})


def points_of(job: JobConfig) -> list[Point]:
    return list(iter_points(job))


def fits_its_conditions(point: Point) -> bool:
    strategy = point["freeze.strategy"]
    low, high = (1e-3, 1e-1) if strategy == "head" else (1e-5, 1e-4)
    return (
        ("freeze.num_stages" in point) == (strategy == "last_stages")
        and ("optim.layer_decay" in point) == (strategy != "head")
        and low <= point["optim.lr"] <= high
    )


# -- Random points ---------------------------------------------------------------------------------


@given(st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_every_random_point_fits_its_conditions_and_bounds(seed: int, attempt: int) -> None:
    job = job_of(CONDITIONAL, seed=seed)
    point = random_point(job, attempt)
    assert fits_its_conditions(point)
    assert 1 <= point.get("freeze.num_stages", 1) <= 3
    assert 0.5 <= point.get("optim.layer_decay", 0.5) <= 0.9
    assert trial_at(job, 0, point).config.optim.lr == point["optim.lr"]


small = {"train.batch_size": {"choice": [4, 8]}, "freeze.strategy": {"choice": ["head", "full"]}}


@given(st.integers(0, 99), st.integers(1, 12), st.integers(0, 12), st.sampled_from([0, 1]))
def test_more_trials_extend_a_random_search(
    seed: int, num_trials: int, num_more: int, which: int
) -> None:
    space = (CONDITIONAL, small)[which]
    few = points_of(job_of(space, seed=seed, budget={"num_trials": num_trials}))
    many = points_of(job_of(space, seed=seed, budget={"num_trials": num_trials + num_more}))
    assert many[: len(few)] == few
    spellings = [canonical_json(point) for point in many]
    assert len(spellings) == len(set(spellings)), "none of them twice"


@given(st.integers(0, 99))
def test_a_key_that_joins_the_space_leaves_the_others_as_they_were(seed: int) -> None:
    wider = {"augment.hue": {"uniform": [0, 0.5]}, **CONDITIONAL}
    for attempt in range(5):
        point = random_point(job_of(wider, seed=seed), attempt)
        del point["augment.hue"]
        assert point == random_point(job_of(CONDITIONAL, seed=seed), attempt)


def test_another_seed_gives_other_points() -> None:
    one, other = (points_of(job_of(CONDITIONAL, seed=seed)) for seed in (0, 1))
    assert one != other


def test_a_small_space_is_exhausted_not_repeated() -> None:
    points = points_of(job_of(small, budget={"num_trials": 50}))
    assert len(points) == 4


def test_randint_includes_both_bounds() -> None:
    job = job_of({"train.seed": {"randint": [3, 5]}})
    assert {random_point(job, attempt)["train.seed"] for attempt in range(100)} == {3, 4, 5}


def test_without_a_space_there_is_one_trial_the_job_itself() -> None:
    job = job_of({}, budget={"num_trials": 8})
    assert [trial.config for trial in planned_trials(job)] == [job.trial()]


# -- Conditions ------------------------------------------------------------------------------------


def test_a_key_that_no_condition_admits_stays_at_the_jobs_own_value() -> None:
    space = {"freeze.num_stages": {"choice": [3], "when": {"backbone.name": "resnet50"}}}
    base = {"freeze": {"strategy": "last_stages", "num_stages": 2}}
    job = job_of(space, base)
    assert random_point(job, 0) == {}
    assert planned_trials(job)[0].config.freeze.num_stages == 2
    fitting = job_of(space, {**base, "backbone": {"name": "resnet50"}})
    assert random_point(fitting, 0) == {"freeze.num_stages": 3}


def test_the_first_distribution_that_fits_is_used() -> None:
    space = {
        "train.seed": [
            {"choice": [1], "when": {"train.epochs": 5}},
            {"choice": [2], "when": {"train.epochs": [5, 6]}},
            {"choice": [3]},
        ]
    }
    for epochs, seed in ((5, 1), (6, 2), (7, 3)):
        job = job_of(space, {"train": {"epochs": epochs}})
        assert random_point(job, 0) == {"train.seed": seed}


def test_conditions_can_be_chained_in_any_order() -> None:
    space = {
        "train.seed": {"choice": [1], "when": {"train.batch_size": 4}},
        "train.batch_size": {"choice": [4], "when": {"train.epochs": 9}},
        "train.epochs": {"choice": [9]},
    }
    expected = {"train.seed": 1, "train.batch_size": 4, "train.epochs": 9}
    for keys in itertools.permutations(space):
        assert random_point(job_of({key: space[key] for key in keys}), 0) == expected


@pytest.mark.parametrize("length", [1, 2, 3])
def test_conditions_in_a_circle_are_refused(length: int) -> None:
    keys = ["train.seed", "train.epochs", "train.batch_size"][:length]
    after = [*keys[1:], keys[0]]
    space = {
        key: {"choice": [5], "when": {other: 5}} for key, other in zip(keys, after, strict=True)
    }
    with pytest.raises(ConfigError, match=r"circle: train\.seed -> .*train\.seed$"):
        planned_trials(job_of(space))


# -- Grid ------------------------------------------------------------------------------------------

grids = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=0, max_size=4)
KEYS = ("train.seed", "train.epochs", "train.batch_size", "freeze.num_stages")


@given(grids)
def test_a_grid_is_every_combination_each_once(grids: list[list[int]]) -> None:
    space = {key: {"grid": values} for key, values in zip(KEYS, grids, strict=False)}
    points = points_of(job_of(space, algorithm="grid"))
    combinations = {tuple(point.values()) for point in points}
    assert combinations == set(itertools.product(*grids))
    assert len(points) == len(combinations)


def test_a_grid_turns_its_last_key_first() -> None:
    space = {"train.seed": {"grid": [1, 2]}, "train.epochs": {"grid": [3, 4]}}
    points = [tuple(point.values()) for point in points_of(job_of(space, algorithm="grid"))]
    assert points == [(1, 3), (1, 4), (2, 3), (2, 4)]


def test_a_grid_with_conditions_has_each_key_where_it_is_used() -> None:
    space = {
        "freeze.strategy": {"grid": ["head", "last_stages", "full"]},
        "freeze.num_stages": {"grid": [1, 2], "when": {"freeze.strategy": "last_stages"}},
        "optim.lr": [
            {"grid": [0.1], "when": {"freeze.strategy": "head"}},
            {"grid": [0.01, 0.001]},
        ],
    }
    points = [tuple(point.values()) for point in points_of(job_of(space, algorithm="grid"))]
    assert points == [
        ("head", 0.1),
        ("last_stages", 1, 0.01),
        ("last_stages", 1, 0.001),
        ("last_stages", 2, 0.01),
        ("last_stages", 2, 0.001),
        ("full", 0.01),
        ("full", 0.001),
    ]


# -- TPE -------------------------------------------------------------------------------------------


def test_what_optuna_suggests_fits_the_same_conditions() -> None:
    job = job_of(CONDITIONAL, algorithm="tpe")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [suggest_point(job, study.ask()) for _ in range(30)]
    assert all(fits_its_conditions(point) for point in points)
    assert {point["freeze.strategy"] for point in points} == {"head", "last_stages", "full"}


def test_optuna_can_choose_among_lists() -> None:
    job = job_of({"head.hidden_sizes": {"choice": [[8], [8, 4]]}}, algorithm="tpe")
    trial = optuna.trial.FixedTrial({"head.hidden_sizes": 1})
    assert list(suggest_point(job, trial)["head.hidden_sizes"]) == [8, 4]


def test_a_sample_of_a_tpe_space_is_known_beforehand() -> None:
    trials = planned_trials(job_of(CONDITIONAL, algorithm="tpe", budget={"num_trials": 2}))
    assert {trial.config.freeze.strategy for trial in trials} == {"head", "last_stages", "full"}


# -- Trials ----------------------------------------------------------------------------------------


def test_a_trial_is_named_by_its_place_and_the_hash_of_its_config() -> None:
    trials = planned_trials(job_of(CONDITIONAL, budget={"num_trials": 12}))
    ids = [trial.trial_id for trial in trials]
    assert len(set(ids)) == 12
    for index, trial in enumerate(trials):
        assert trial == PlannedTrial(index, trial.config)
        assert ids[index] == f"{index:04d}-{config_hash(trial.config)[:6]}"


@pytest.mark.parametrize(
    ("space", "fragments"),
    [
        ({"optim.lrr": {"choice": [1]}}, ["search.space: unknown key 'optim.lrr'", "lr"]),
        ({"optm.lr": {"choice": [1]}}, ["unknown key 'optm.lr'", "optim"]),
        (
            {"optim.lr": {"choice": [1], "when": {"freeze.stratgy": "head"}}},
            ["unknown key 'freeze.stratgy'", "did you mean strategy?"],
        ),
        ({"freeze": {"choice": [{}]}}, ["'freeze' is a section", "freeze.KEY"]),
        ({"data.uri": {"choice": ["/a", "/b"]}}, ["'data.uri' is the same for all trials"]),
        ({"resources.cpus_per_worker": {"choice": [1]}}, ["the same for all trials"]),
        ({"output.name": {"choice": ["a"]}}, ["unknown key 'output.name'"]),
        ({"search.seed": {"choice": [1]}}, ["unknown key 'search.seed'"]),
        ({"train.epochs": {"uniform": [1, 3]}}, ["search.space can give", "train.epochs is"]),
        (
            {"freeze.num_stages": {"choice": [2]}},
            ["search.space can give {'freeze.num_stages': 2}", "'num_stages' is not used with"],
        ),
    ],
)
@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_a_space_that_cannot_be_searched_is_refused_before_anything_starts(
    space: Space, fragments: list[str], algorithm: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        planned_trials(job_of(space, algorithm=algorithm))
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_the_image_size_can_be_searched() -> None:
    job = job_of({"data.image_size": {"choice": [32, 64]}}, budget={"num_trials": 2})
    assert {trial.config.data.image_size for trial in planned_trials(job)} == {32, 64}


# -- Points one by one -----------------------------------------------------------------------------

HEAD, LAST = {"optim.lr": 0.01}, {"freeze.strategy": "last_stages", "freeze.num_stages": 2}


def test_points_are_tried_in_their_order_and_each_once() -> None:
    job = listed(LAST, HEAD, LAST)
    assert points_of(job) == [LAST, HEAD]
    trials = planned_trials(job)
    assert [trial.config.freeze.num_stages for trial in trials] == [2, None]
    other = {"resources.cpus_per_worker": 7}
    granted = [replace(trial, config=with_values(trial.config, other)) for trial in trials]
    assert [point_at(job, trial) for trial in granted] == [LAST, HEAD]


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"optim.learning_rate": 0.1}, "unknown key"),
        ({"optim": {"lr": 0.1}}, "is a section"),
        ({"data.limit": 10}, "is the same for all trials"),
        ({"freeze.num_stages": 2}, "num_stages"),
    ],
)
def test_a_point_that_is_no_trial_is_refused(point: Point, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        planned_trials(listed(HEAD, point))


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"space": {"optim.lr": {"grid": [0.1]}}}, "space and points are both set"),
        ({"algorithm": "random"}, "points do not go with algorithm 'random'"),
        ({"scheduler": "pbt"}, "points do not go with scheduler 'pbt'"),
        ({"budget": {"num_trials": 3}}, "num_trials"),
        ({"points": [{}]}, "points"),
    ],
)
def test_points_go_with_nothing_that_draws_others(search: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        listed(HEAD, **search)


def test_a_key_that_is_set_leaves_the_points(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(canonical_json({"search": {"algorithm": "grid", "points": [{**LAST, **HEAD}]}}))
    job = load(JobConfig, str(file), ["optim.lr=0.5"])
    (trial,) = planned_trials(job)
    assert trial.config.optim.lr == 0.5
