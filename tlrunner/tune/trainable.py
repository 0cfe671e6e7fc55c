"""What Ray runs in a worker: one trial after another, each from its point to its end."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ray import tune

from tlrunner.jobconfig import JobConfig
from tlrunner.train.feed import Images
from tlrunner.train.place import Place
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import EpochReport, TrialDir
from tlrunner.tune.space import PlannedTrial, trial_at


def planned_trial(job: JobConfig, values: dict[str, Any]) -> PlannedTrial:
    """The trial that Ray's values for it stand for."""
    return trial_at(job, values["trial"]["index"], values["trial"]["point"])


def build_trainable(
    job: JobConfig, trials: Place, images: Images
) -> Callable[[dict[str, Any]], None]:
    """The function Ray Tune calls with the values of one trial."""

    def trainable(values: dict[str, Any]) -> None:
        planned = planned_trial(job, values)
        directory = TrialDir(trials.below(planned.trial_id))

        def report(finished: EpochReport) -> None:
            tune.report(asdict(finished))

        directory.place.fetch()
        if directory.has_begun:  # a continued run: what ended is told again, not computed again
            for finished in directory.read().epochs:
                report(finished)
            return
        try:
            run_trial(planned.config, report, trial_dir=directory.place, images=images)
        except Exception as err:  # the border: whatever it is, the trial's directory says so
            directory.fail(err)
            raise

    return trainable
