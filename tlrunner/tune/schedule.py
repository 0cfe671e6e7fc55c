"""Who stops early: Ray's schedulers, shown a trial only once it may be judged.

A trial with a frozen phase or a warm-up learns slowly at first by design. Until both are over, and
one epoch after them, its figures are kept from the scheduler: it is neither stopped by them nor are
others measured against them.
"""

import math
import random
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from tlrunner.config import TrialConfig
from tlrunner.jobconfig import JobConfig
from tlrunner.model.classifier import describe
from tlrunner.model.freeze import phase_starts
from tlrunner.searchconfig import Distribution
from tlrunner.tune.plan import most_epochs
from tlrunner.tune.space import Point, build_point, can_be, random_point

SOME_YEARS = 1e8  # seconds: rungs in seconds have no last one
PERTURBATIONS = (0.8, 1.2)  # factors of Jaderberg et al., 2017
RESAMPLED = 0.25  # share of the copied values that are drawn anew
# What can change in a trial that is under way; anything else comes with the copied weights.
CHANGEABLE = (
    "optim.lr",
    "optim.weight_decay",
    "optim.momentum",
    "optim.layer_decay",
    "optim.max_grad_norm",
    "train.label_smoothing",
    "augment.",
)


def protected_epochs(config: TrialConfig) -> int:
    """Epochs at whose end a trial is not to be judged: of frozen phases, and of warm-up."""
    num_stages = len(describe(config.backbone, config.data.image_size).stage_names)
    thawed = phase_starts(config.freeze, num_stages, config.train.epochs)[-1]
    return max(thawed, math.ceil(config.optim.warmup_epochs))


class _Fair:
    """Before a scheduler: results of protected epochs do not reach it.

    Nor does that of the last epoch, with which a trial ends by itself: the scheduler hears of it
    then. `config_of`, set after construction, gives the config of Ray's trial.
    """

    config_of: Callable[[Trial], TrialConfig]

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        config = self.config_of(trial)
        if not protected_epochs(config) < result["epoch"] < config.train.epochs:
            return str(TrialScheduler.CONTINUE)
        decision: str = super().on_trial_result(controller, trial, result)  # type: ignore[misc]
        return decision


class Asha(_Fair, AsyncHyperBandScheduler):  # type: ignore[misc]  # ray is not typed
    """Asynchronous successive halving."""


class HyperBand(_Fair, HyperBandScheduler):  # type: ignore[misc]
    """HyperBand, whose trials wait for each other at each rung."""

    def _process_bracket(self, controller: Any, bracket: Any) -> str:
        # Ray does it once, and from the first rung on no longer for a trial that leaves: where it
        # was the last that others waited for, or where all are past the next rung as well, as
        # behind an interruption, the others would wait for ever.
        while True:
            action: str = super()._process_bracket(controller, bracket)
            bracket.is_being_processed = False
            is_over = action != TrialScheduler.PAUSE or not bracket.current_trials()
            if is_over or not bracket.cur_iter_done():
                return action


class Median(_Fair, MedianStoppingRule):  # type: ignore[misc]
    """Stops what is worse than the median of the others so far."""

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result["epoch"] <= (trial.last_result or {}).get("epoch", 0):
            return str(TrialScheduler.CONTINUE)  # told again, by a trial that started again
        return super().on_trial_result(controller, trial, result)

    def _on_insufficient_samples(self, controller: Any, trial: Trial, time: float) -> str:
        return str(TrialScheduler.CONTINUE)  # instead of a pause, behind which nothing would go on


class Population(_Fair, PopulationBasedTraining):  # type: ignore[misc]
    """Population based training on the project's own checkpoints.

    Trials meet after each interval; then the worst quarter goes on from the weights of one of the
    best, with its values perturbed. Ray would copy a Tune checkpoint, of which these trials have
    none: where the checkpoint of theirs is, the copying trial is told among its values.

    `met_at`: the epoch at which those of a run that is continued met last.
    """

    def __init__(self, job: JobConfig, met_at: int) -> None:
        super().__init__(
            time_attr="epoch",
            perturbation_interval=job.search.perturbation_epochs,
            custom_explore_fn=_unused,
            log_config=False,
            synch=True,
        )
        self.job, self.met_at = job, met_at
        self._next_perturbation_sync += met_at
        self.random = random.Random(job.search.seed or 0)
        self.trial_id_of: Callable[[Trial], str]

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        super().on_trial_add(controller, trial)
        self._trial_state[trial].last_perturbation_time = self.met_at

    def _checkpoint_or_exploit(
        self, trial: Trial, controller: Any, upper: list[Trial], lower: list[Trial]
    ) -> None:
        if trial not in lower:
            return
        donor = self.random.choice(upper)
        told = self._trial_state[donor].last_result
        if trial.status != Trial.PAUSED:
            controller.pause_trial(trial, should_checkpoint=False)
        values = {
            "index": trial.config["trial"]["index"],
            "point": explored(self.job, donor.config["trial"]["point"], self.random),
            "copied": [self.trial_id_of(donor), told["epoch"], told["checkpoint"]],
        }
        trial.set_config({"trial": values})
        self._trial_state[trial].last_train_time = self._trial_state[donor].last_train_time

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        super().on_trial_complete(controller, trial, result)
        self._wait_no_more(controller, trial)

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        super().on_trial_error(controller, trial)
        # Ray keeps what failed among the live, for whom the others would wait at each meeting to
        # come; one that is to start again it puts back.
        controller.get_live_trials().discard(trial)
        self._wait_no_more(controller, trial)

    def _wait_no_more(self, controller: Any, ended: Trial) -> None:
        """Let the others go on, if it was this trial alone that they waited for."""
        met = [
            self._trial_state[trial].last_train_time
            for trial in controller.get_live_trials()
            if trial is not ended
        ]
        while met and min(met) >= self._next_perturbation_sync:
            self._next_perturbation_sync += self._perturbation_interval


def _unused(config: dict[str, Any]) -> dict[str, Any]:
    raise AssertionError("Population explores by itself")


def explored(job: JobConfig, point: Point, rng: random.Random) -> Point:
    """A point near another: each changeable value perturbed within its bounds, or drawn anew."""
    drawn = random_point(job, rng.randrange(2**31))

    def ask(name: str, entry: Distribution) -> Any:
        key = name.partition("#")[0]
        anew = drawn.get(key, entry.values[0])
        if not can_be(entry, anew):
            anew = entry.values[0]
        if key not in point or not key.startswith(CHANGEABLE):
            return point.get(key, anew)
        # Where a condition holds no longer, it is of another distribution now.
        if rng.random() < RESAMPLED or not can_be(entry, point[key]):
            return anew
        return _perturbed(entry, point[key], rng)

    return build_point(job, ask)


def _perturbed(entry: Distribution, value: Any, rng: random.Random) -> Any:
    if entry.kind in ("choice", "grid"):
        place = entry.values.index(value) + rng.choice((-1, 1))
        return entry.values[min(max(place, 0), len(entry.values) - 1)]
    low, high = entry.values
    moved = min(max(value * rng.choice(PERTURBATIONS), low), high)
    return round(moved) if entry.kind == "randint" else moved


def build_scheduler(
    job: JobConfig,
    config_of: Callable[[Trial], TrialConfig],
    trial_id_of: Callable[[Trial], str],
    met_at: int = 0,
) -> TrialScheduler | None:
    """The scheduler of a search.

    Args:
        config_of, trial_id_of: of Ray's trial, as they are now.
        met_at: see `Population`.
    """
    search = job.search
    scheduler: Any
    if search.scheduler == "none":
        return None
    if search.scheduler == "asha":
        in_seconds = search.grace_seconds is not None
        scheduler = Asha(
            time_attr="seconds" if in_seconds else "epoch",
            max_t=SOME_YEARS if in_seconds else most_epochs(job),
            grace_period=search.grace_seconds if in_seconds else search.grace_epochs,
            reduction_factor=search.reduction_factor,
        )
    elif search.scheduler == "hyperband":
        scheduler = HyperBand(
            time_attr="epoch", max_t=most_epochs(job), reduction_factor=search.reduction_factor
        )
    elif search.scheduler == "median":
        scheduler = Median(time_attr="epoch", grace_period=search.grace_epochs)
    else:
        scheduler = Population(job, met_at)
        scheduler.trial_id_of = trial_id_of
    scheduler.config_of = config_of
    return scheduler


def num_last(job: JobConfig) -> int:
    """Latest epochs whose checkpoints a trial keeps, for itself after a pause and for its copiers.

    A trial can be at most one interval ahead of one that is about to copy it.
    """
    if job.search.scheduler == "pbt":
        assert job.search.perturbation_epochs is not None, "the config fills it in"
        return job.search.perturbation_epochs + 1
    return int(job.search.scheduler == "hyperband")
