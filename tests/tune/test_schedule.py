"""Who may be stopped when, and what becomes of a value that is copied."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from tlrunner.config import TrialConfig
from tlrunner.configfile import validate, with_values
from tlrunner.jobconfig import JobConfig
from tlrunner.model.classifier import describe
from tlrunner.model.freeze import Level, levels
from tlrunner.tune.schedule import build_scheduler, explored, num_last, protected_epochs
from tlrunner.tune.space import can_be, random_point, trial_at

SEARCHES: dict[str, dict[str, Any]] = {
    "asha": {"scheduler": "asha", "grace_epochs": 1, "reduction_factor": 2},
    "seconds": {"scheduler": "asha", "grace_seconds": 0.5, "reduction_factor": 2},
    "median": {"scheduler": "median", "grace_epochs": 1},
}


class FakeTrial(SimpleNamespace):
    """As much of Ray's trial as schedulers look at."""

    def __hash__(self) -> int:
        return hash(self.trial_id)

    def is_finished(self) -> bool:
        return False


class Field:
    """Trials of a search that report one after the other to its scheduler."""

    def __init__(self, job: JobConfig) -> None:
        self.configs: dict[str, TrialConfig] = {}
        self.scheduler = build_scheduler(
            job, lambda trial: self.configs[trial.trial_id], lambda trial: str(trial.trial_id)
        )
        self.scheduler.set_search_properties("val_acc", "max")
        self.controller = SimpleNamespace(get_trials=list, search_alg=None)

    def add(self, name: str, config: TrialConfig) -> FakeTrial:
        trial = FakeTrial(trial_id=name, status=Trial.RUNNING, config={}, last_result={})
        self.configs[name] = config
        self.scheduler.on_trial_add(self.controller, trial)
        return trial

    def report(self, trial: FakeTrial, epoch: int, val_acc: float) -> str:
        result = {"epoch": epoch, "seconds": float(epoch), "val_acc": val_acc}
        return str(self.scheduler.on_trial_result(self.controller, trial, result))


def job_of(tree: dict[str, Any], search: dict[str, Any], epochs: int) -> JobConfig:
    train = {"epochs": epochs, "batch_size": 8}
    return validate(JobConfig, {**tree, "train": train, "search": search})


@given(
    st.sampled_from(
        [
            {"freeze.strategy": "lp_ft", "freeze.head_epochs": 1},
            {"freeze.strategy": "lp_ft", "freeze.head_epochs": 4},
            {"freeze.strategy": "gradual", "freeze.epochs_per_stage": 1},
            {"freeze.strategy": "gradual", "freeze.epochs_per_stage": 2},
            {"freeze.strategy": "head"},
            {"freeze.strategy": "full"},
        ]
    ),
    st.floats(0, 5),
)
def test_a_protected_epoch_is_one_of_warm_up_or_of_a_backbone_that_is_still_to_thaw(
    tiny_trial: TrialConfig, values: dict[str, Any], warmup_epochs: float
) -> None:
    config = with_values(
        tiny_trial, {**values, "train.epochs": 6, "optim.warmup_epochs": warmup_epochs}
    )
    num_stages = len(describe(config.backbone, config.data.image_size).stage_names)
    by_epoch = [levels(config.freeze, num_stages, epoch) for epoch in range(6)]
    for epoch in range(1, 6):
        is_protected = epoch <= protected_epochs(config)
        # After `epoch` epochs: does the next one train what none before it did, or still warm up?
        later = any(by_epoch[e] != by_epoch[epoch - 1] for e in range(epoch, 6))
        assert is_protected == (later or epoch < warmup_epochs or epoch == protected_epochs(config))
        if later or epoch < warmup_epochs:
            assert is_protected
    assert Level.TRAINED in (*by_epoch[-1], Level.TRAINED)


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize(
    ("values", "first_judged"),
    [
        ({"freeze.strategy": "lp_ft", "freeze.head_epochs": 3}, 4),
        ({"optim.warmup_epochs": 2.5}, 4),
        ({"freeze.strategy": "gradual", "freeze.epochs_per_stage": 1}, 9),
        ({}, 1),
    ],
    ids=["lp_ft", "warm-up", "gradual", "full"],
)
def test_the_worst_trial_is_stopped_no_earlier_than_it_may_be_judged(
    tiny_tree: dict[str, Any],
    tiny_trial: TrialConfig,
    search: dict[str, Any],
    values: dict[str, Any],
    first_judged: int,
) -> None:
    job = job_of(tiny_tree, search, epochs=12)
    field = Field(job)
    full = with_values(tiny_trial, {"train.epochs": 12})
    good = [field.add(f"good-{number}", full) for number in range(4)]
    poor = field.add("poor", with_values(full, values))
    decisions = []
    for epoch in range(1, 12):
        for trial in good:
            field.report(trial, epoch, 0.75)
        decisions.append(field.report(poor, epoch, 0.125))
        if decisions[-1] == TrialScheduler.STOP:
            break
    assert TrialScheduler.STOP in decisions, "the worst trial is stopped in the end"
    assert decisions.index(TrialScheduler.STOP) + 1 >= first_judged
    assert decisions[: first_judged - 1] == [TrialScheduler.CONTINUE] * (first_judged - 1)


def test_the_last_epoch_stops_nothing_that_ends_by_itself(
    tiny_tree: dict[str, Any], tiny_trial: TrialConfig
) -> None:
    field = Field(job_of(tiny_tree, SEARCHES["asha"], epochs=2))
    trials = [field.add(name, tiny_trial) for name in ("one", "other")]
    assert [field.report(t, 2, acc) for t, acc in zip(trials, (0.9, 0.1), strict=True)] == [
        TrialScheduler.CONTINUE
    ] * 2


# -- HyperBand -------------------------------------------------------------------------------------


class Band(Field):
    """The trials of a bracket with rungs at epochs 1, 2 and 4, behind those of two others."""

    def __init__(self, tree: dict[str, Any], config: TrialConfig) -> None:
        search = {"scheduler": "hyperband", "reduction_factor": 2}
        super().__init__(job_of(tree, search, epochs=4))
        self.controller.stop_trial = self.stop
        config = with_values(config, {"train.epochs": 9})
        names = [*"abcdef", *"0123"]  # Ray fills the others first
        self.trials = [self.add(name, config) for name in names][-4:]
        for trial in self.trials:
            trial.is_saving = False

    def stop(self, trial: FakeTrial) -> None:
        trial.status = Trial.TERMINATED
        self.scheduler.on_trial_complete(self.controller, trial, {})

    def report(self, trial: FakeTrial, epoch: int, val_acc: float) -> str:
        decision = super().report(trial, epoch, val_acc)
        if decision == TrialScheduler.STOP:
            self.stop(trial)
        elif decision == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED
        return decision

    def resume(self) -> FakeTrial | None:
        chosen: FakeTrial | None = self.scheduler.choose_trial_to_run(self.controller)
        if chosen:
            chosen.status = Trial.RUNNING
        return chosen


def test_those_that_wait_at_a_later_rung_go_on_when_the_one_they_wait_for_fails(
    tiny_tree: dict[str, Any], tiny_trial: TrialConfig
) -> None:
    band = Band(tiny_tree, tiny_trial)
    first, second, *others = band.trials
    for trial, val_acc in zip((*others, first, second), (0.1, 0.2, 0.3, 0.4), strict=True):
        band.report(trial, 1, val_acc)
    assert [trial.status for trial in others] == [Trial.TERMINATED] * 2
    assert band.resume() is first
    band.report(first, 2, 0.3)
    assert first.status == Trial.PAUSED
    assert band.resume() is None, "the second one has not come"
    second.status = Trial.ERROR
    band.scheduler.on_trial_error(band.controller, second)
    assert band.resume() is first


def test_trials_that_are_all_past_the_next_rung_go_on(
    tiny_tree: dict[str, Any], tiny_trial: TrialConfig
) -> None:
    band = Band(tiny_tree, tiny_trial)
    for trial, val_acc in zip(band.trials, (0.4, 0.3, 0.2, 0.1), strict=True):
        band.report(trial, 3, val_acc)  # their first, as the run was broken off in their epoch 3
    assert band.resume() is band.trials[0]
    assert {trial.status for trial in band.trials[1:]} == {Trial.TERMINATED}


# -- Population ------------------------------------------------------------------------------------

SPACE = {
    "freeze.strategy": {"choice": ["head", "full"]},
    "optim.lr": [
        {"loguniform": [1e-3, 1e-1], "when": {"freeze.strategy": "head"}},
        {"loguniform": [1e-5, 1e-4]},
    ],
    "train.label_smoothing": {"choice": [0.0, 0.1, 0.2]},
    "augment.mixup": {"uniform": [0.0, 1.0]},
    "train.batch_size": {"choice": [4, 8]},
}


@given(st.integers(0, 999), st.integers(0, 999))
def test_a_copied_point_stays_in_the_space_and_keeps_what_cannot_change(
    attempt: int, seed: int
) -> None:
    job = validate(
        JobConfig,
        {"search": {"space": SPACE, "scheduler": "pbt", "budget": {"num_trials": 4}}},
    )
    point = random_point(job, attempt)
    copied = explored(job, point, random.Random(seed))
    assert copied.keys() == point.keys()
    for key in ("freeze.strategy", "train.batch_size"):
        assert copied[key] == point[key]
    for key, entries in job.search.space.items():
        assert any(can_be(entry, copied[key]) for entry in entries)
    is_head = point["freeze.strategy"] == "head"
    assert can_be(job.search.space["optim.lr"][0 if is_head else 1], copied["optim.lr"])
    trial_at(job, 0, copied)


@given(st.integers(0, 99), st.integers(0, 99))
def test_a_copied_value_is_of_the_distribution_whose_condition_holds_now(
    attempt: int, seed: int
) -> None:
    space = {
        "augment.mixup": {"choice": [0.0, 0.2]},
        "train.label_smoothing": [
            {"choice": [0.0], "when": {"augment.mixup": 0.2}},
            {"choice": [0.1, 0.2]},
        ],
    }
    search = {"space": space, "scheduler": "pbt", "budget": {"num_trials": 4}}
    job = validate(JobConfig, {"search": search})
    copied = explored(job, random_point(job, attempt), random.Random(seed))
    smoothings = (0.0,) if copied["augment.mixup"] == 0.2 else (0.1, 0.2)
    assert copied["train.label_smoothing"] in smoothings


def test_copied_values_do_change(tiny_tree: dict[str, Any]) -> None:
    job = validate(
        JobConfig,
        {"search": {"space": SPACE, "scheduler": "pbt", "budget": {"num_trials": 4}}},
    )
    point = random_point(job, 0)
    lrs = {explored(job, point, random.Random(seed))["optim.lr"] for seed in range(20)}
    assert len(lrs) > 2
    assert point["optim.lr"] not in lrs


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"scheduler": "none"}, 0),
        ({"scheduler": "asha"}, 0),
        ({"scheduler": "hyperband"}, 1),
        ({"scheduler": "pbt", "perturbation_epochs": 3}, 4),
    ],
)
def test_checkpoints_are_kept_for_those_that_will_ask_for_them(
    tiny_tree: dict[str, Any], search: dict[str, Any], expected: int
) -> None:
    assert num_last(job_of(tiny_tree, search, epochs=6)) == expected


class Members:
    """A population as Ray holds it, whose trials pause and end as a test says."""

    def __init__(self, job: JobConfig, config: TrialConfig, size: int, met_at: int) -> None:
        self.trials = [
            FakeTrial(
                trial_id=f"{number}",
                status=Trial.RUNNING,
                config={"trial": {"index": number, "point": random_point(job, number)}},
                last_result={},
                experiment_tag="",
                run_metadata=SimpleNamespace(
                    checkpoint_manager=SimpleNamespace(
                        checkpoint_config=SimpleNamespace(num_to_keep=None)
                    )
                ),
                set_config=lambda config: None,
            )
            for number in range(size)
        ]
        self.scheduler = build_scheduler(
            job, lambda t: config, lambda t: f"id-{t.trial_id}", met_at
        )
        self.scheduler.set_search_properties("val_acc", "max")
        self.controller = SimpleNamespace(
            search_alg=None,
            get_trials=lambda: self.trials,
            get_live_trials=lambda: self.live,
            pause_trial=self.pause,
        )
        self.live = set(self.trials)
        for trial in self.trials:
            self.scheduler.on_trial_add(self.controller, trial)

    def pause(self, trial: FakeTrial, should_checkpoint: bool = True) -> None:
        trial.status = Trial.PAUSED

    def report(self, number: int, epoch: int, val_acc: float) -> None:
        trial = self.trials[number]
        result = {"epoch": epoch, "val_acc": val_acc, "checkpoint": f"{epoch}-0"}
        decision = self.scheduler.on_trial_result(self.controller, trial, result)
        if decision == TrialScheduler.PAUSE:
            self.pause(trial)

    def end(self, number: int) -> None:
        trial = self.trials[number]
        trial.status = Trial.TERMINATED
        self.scheduler.on_trial_complete(self.controller, trial, {"epoch": 9, "val_acc": 0.0})
        self.live.discard(trial)

    def fail(self, number: int) -> None:
        """For good: Ray leaves it among the live."""
        self.scheduler.on_trial_error(self.controller, self.trials[number])
        self.trials[number].status = Trial.ERROR

    def next(self) -> FakeTrial | None:
        chosen: FakeTrial | None = self.scheduler.choose_trial_to_run(self.controller)
        return chosen


@pytest.fixture
def population(tiny_trial: TrialConfig) -> Callable[[int], Members]:
    def make(size: int, met_at: int = 0) -> Members:
        search = {"space": SPACE, "scheduler": "pbt", "perturbation_epochs": 2}
        job = validate(JobConfig, {"search": {**search, "budget": {"num_trials": size}}})
        return Members(job, with_values(tiny_trial, {"train.epochs": 9}), size, met_at)

    return make


def test_a_population_that_goes_on_meets_when_it_would_have(
    population: Callable[[int, int], Members],
) -> None:
    members = population(3, 4)  # broken off in epoch 6, one of them behind epoch 5
    became: list[dict[str, Any]] = []
    members.trials[0].set_config = became.append
    members.report(0, 5, 0.5)
    assert members.trials[0].status == Trial.RUNNING
    for number, val_acc in enumerate((0.5, 0.6, 0.7)):
        assert members.next() is None or members.trials[number].status == Trial.RUNNING
        members.report(number, 6, val_acc)
    assert [values["trial"]["copied"] for values in became] == [["id-2", 6, "6-0"]]


def test_those_that_wait_go_on_when_the_one_they_wait_for_ends(
    population: Callable[[int], Members],
) -> None:
    members = population(3)
    members.report(0, 2, 0.5)
    members.report(1, 2, 0.6)
    assert members.next() is None, "the third one has not come"
    members.end(2)
    assert members.next() in members.trials[:2]


def test_nobody_waits_for_one_that_failed(population: Callable[[int], Members]) -> None:
    members = population(3)
    members.fail(2)
    for epoch in (2, 4):
        members.report(0, epoch, 0.5)
        assert members.next() is None, "the second one has not come"
        members.report(1, epoch, 0.6)
        assert members.next() is members.trials[0]
        for trial in members.trials[:2]:
            trial.status = Trial.RUNNING
