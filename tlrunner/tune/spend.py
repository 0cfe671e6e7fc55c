"""What a search has spent, and when it is over."""

import time
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from tlrunner.jobconfig import JobConfig
from tlrunner.tune.cluster import machines
from tlrunner.tune.plan import num_places

START_SECONDS = 15.0  # of one more search on the same cluster, until its trials compute


class Spending(tune.Callback):  # type: ignore[misc]  # ray is not typed
    """Follows the trials of a search by the clock, from one step of Ray's to the next.

    Args:
        started: when the job began, on the monotonic clock.
        compute_seconds: of trials that ended before this run was continued.
        has_repeats: whether the final repeats are still to come, and to be paid.
    """

    def __init__(
        self, job: JobConfig, started: float, compute_seconds: float, *, has_repeats: bool
    ) -> None:
        self.job = job
        self.started = started
        self.compute_seconds = compute_seconds
        self.has_repeats = has_repeats
        self.num_running = 0  # trials
        self.num_active = 0  # and those that are to run
        self.told: dict[str, tuple[float, float]] = {}  # Ray's id -> best val_acc, seconds
        self.last_step = time.monotonic()
        self.was_over = False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray saves a copy of callbacks

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        now = time.monotonic()
        running = self.num_running = sum(trial.status == Trial.RUNNING for trial in trials)
        self.num_active = running + sum(trial.status == Trial.PENDING for trial in trials)
        if self.job.resources.workers_per_trial > 1:  # the driver of one more may wait for room
            running = min(running, num_places(self.job.resources, machines()))
        self.compute_seconds += running * (now - self.last_step)
        self.last_step = now

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        best = max(self.told.get(trial.trial_id, (0.0, 0.0))[0], result["val_acc"])
        self.told[trial.trial_id] = best, result["seconds"]

    def take_place(self, places: float) -> bool:
        """Whether one more trial is to be under way, which then counts as one."""
        has_room = self.num_active < places
        self.num_active += has_room
        return has_room

    @property
    def is_over(self) -> bool:
        """Whether a bound was reached, less what the final repeats will take."""
        budget, resources = self.job.search.budget, self.job.resources
        assert budget is not None, "the config fills it in"
        compute, wall = self._kept_for_repeats()
        hours = (self.compute_seconds + compute) / 3600 * resources.workers_per_trial
        limits = (
            (budget.wall_seconds, time.monotonic() - self.started + wall),
            (budget.cpu_hours, hours * resources.cpus_per_worker),
            (budget.gpu_hours, hours * (resources.gpus_per_worker or 0)),
        )
        # For good: the repeats of another best trial may take less.
        self.was_over |= any(limit is not None and spent >= limit for limit, spent in limits)
        return self.was_over

    def _kept_for_repeats(self) -> tuple[float, float]:
        """Seconds of trials, and seconds by the clock, that the best so far would take again."""
        search, resources = self.job.search, self.job.resources
        if not (self.has_repeats and search.final_repeats and search.final_candidates):
            return 0.0, 0.0
        best = sorted(self.told.values(), reverse=True)[: search.final_candidates]
        compute = sum(seconds for _, seconds in best) * search.final_repeats
        if not best:
            return 0.0, 0.0
        places = max(1, num_places(resources, machines()))
        longest = max(seconds for _, seconds in best)
        return compute, max(compute / places, longest) + START_SECONDS


class Over(tune.Stopper):  # type: ignore[misc]  # ray is not typed
    """Ends a trial after its last epoch, and the search when its budget is spent or it has failed.

    A search that is halted rings its trials' bell first, and waits for those that run.
    """

    def __init__(
        self,
        spending: Spending,
        max_epochs: int | None,
        is_halted: Callable[[], bool],
        has_failed: Callable[[], bool],
        bell: Any,
    ) -> None:
        self.spending = spending
        self.max_epochs = max_epochs
        self.is_halted = is_halted
        self.has_failed = has_failed
        self.bell = bell
        self.has_rung = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self.max_epochs is not None and result.get("epoch", 0) >= self.max_epochs

    def stop_all(self) -> bool:
        if not self.is_halted():
            return self.spending.is_over or self.has_failed()
        if not self.has_rung:
            self.bell.ring.remote()
            self.has_rung = True
        return self.spending.num_running == 0
