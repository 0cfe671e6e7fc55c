"""When a search is over, by a clock that the test turns."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial

from tlrunner.configfile import validate
from tlrunner.jobconfig import JobConfig
from tlrunner.signals import Halt
from tlrunner.tune import spend
from tlrunner.tune.plan import Machine
from tlrunner.tune.spend import Over, Spending

RUNNING, PENDING, ENDED = Trial.RUNNING, Trial.PENDING, Trial.TERMINATED


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(spend.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(spend, "machines", lambda: [Machine(4, 2)])
    return clock


def spending_of(search: dict[str, Any], resources: dict[str, Any], **more: Any) -> Spending:
    job = validate(JobConfig, {"search": search, "resources": resources})
    return Spending(job, 1000.0, more.pop("compute_seconds", 0.0), **{"has_repeats": False, **more})


def step(spending: Spending, clock: Clock, seconds: float, *states: str) -> None:
    clock.now += seconds
    trials = [SimpleNamespace(status=state, trial_id=str(n)) for n, state in enumerate(states)]
    spending.on_step_begin(0, trials)


@pytest.mark.parametrize(
    ("budget", "resources", "seconds"),
    [
        ({"wall_seconds": 60}, {}, 60),
        # two trials at a time, of two CPUs each
        ({"cpu_hours": 0.1}, {"cpus_per_worker": 2, "gpus_per_worker": 0}, 90),
        ({"gpu_hours": 0.1}, {"gpus_per_worker": 1}, 180),
        ({"gpu_hours": 0.1}, {"gpus_per_worker": 0.25}, 720),
        # of several budgets the first that is spent
        ({"cpu_hours": 0.1, "wall_seconds": 60}, {"gpus_per_worker": 0}, 60),
    ],
)
def test_a_search_is_over_when_its_budget_is_spent_and_not_before(
    clock: Clock, budget: dict[str, Any], resources: dict[str, Any], seconds: float
) -> None:
    spending = spending_of({"budget": budget}, resources)
    over = Over(spending, None, Halt(), bool, None)
    step(spending, clock, 0, RUNNING, RUNNING)
    step(spending, clock, seconds - 0.5, RUNNING, RUNNING, PENDING, ENDED)
    assert not over.stop_all()
    step(spending, clock, 1.0, RUNNING, RUNNING)
    assert over.stop_all()


def test_the_driver_that_waits_for_room_costs_nothing(clock: Clock) -> None:
    resources = {"workers_per_trial": 2, "cpus_per_worker": 1, "gpus_per_worker": 0}
    spending = spending_of({"budget": {"cpu_hours": 0.1}}, resources)
    step(spending, clock, 0, RUNNING, RUNNING, RUNNING)
    step(spending, clock, 10, RUNNING, RUNNING, RUNNING)  # on 4 CPUs
    assert spending.compute_seconds == 20


def test_trials_that_ended_before_the_run_was_continued_are_paid(clock: Clock) -> None:
    spending = spending_of({"budget": {"cpu_hours": 0.1}}, {}, compute_seconds=360.0)
    assert spending.is_over


def test_what_the_repeats_of_the_best_will_take_is_kept_for_them(clock: Clock) -> None:
    search = {"budget": {"cpu_hours": 1.0}, "final_repeats": 3, "final_candidates": 2}
    spending, repeating = (
        spending_of(search, {"gpus_per_worker": 0}, has_repeats=has) for has in (True, False)
    )
    for number, (val_acc, seconds) in enumerate([(0.9, 300.0), (0.8, 200.0), (0.1, 900.0)]):
        trial = SimpleNamespace(trial_id=str(number))
        spending.on_trial_result(0, [], trial, {"val_acc": val_acc, "seconds": seconds})
    spending.compute_seconds = 3600 - 3 * 500 - 1
    assert not spending.is_over
    repeating.compute_seconds = spending.compute_seconds = spending.compute_seconds + 2
    assert spending.is_over
    assert not repeating.is_over

    spending.on_trial_result(0, [], trial, {"val_acc": 1.0, "seconds": 1.0})
    assert spending.is_over, "whatever the repeats of a new best trial will take"


def test_a_place_is_taken_once(clock: Clock) -> None:
    spending = spending_of({}, {})
    step(spending, clock, 0, RUNNING, PENDING, ENDED)
    assert [spending.take_place(4) for _ in range(3)] == [True, True, False]
    step(spending, clock, 0, RUNNING)
    assert spending.take_place(2)


def test_a_trial_ends_at_the_most_epochs_it_may_have(clock: Clock) -> None:
    over = Over(spending_of({}, {}), 3, Halt(), bool, None)
    assert [over("id", {"epoch": epoch}) for epoch in (1, 2, 3)] == [False, False, True]
    assert not Over(spending_of({}, {}), None, Halt(), bool, None)("id", {"epoch": 99})
