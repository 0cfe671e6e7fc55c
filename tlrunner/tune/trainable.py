"""What Ray Tune runs: one trial after another, each from its point to its end.

A trial with one worker runs in Tune's own process, one with several as a Ray Train run that this
process drives.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ray import tune

from tlrunner.jobconfig import JobConfig
from tlrunner.train.feed import Images
from tlrunner.train.place import CHECKPOINTS, Place
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import EpochReport, TrialDir
from tlrunner.tune.space import PlannedTrial, trial_at
from tlrunner.tune.workers import run_in_workers


def planned_trial(job: JobConfig, values: dict[str, Any]) -> PlannedTrial:
    """The trial that Ray's values for it stand for."""
    trial = values["trial"]
    copied = trial.get("copied")
    return trial_at(job, trial["index"], trial["point"], tuple(copied[:2]) if copied else None)


def build_trainable(
    job: JobConfig, trials: Place, images: Images, num_last: int = 0
) -> Callable[[dict[str, Any]], None]:
    """The function Ray Tune calls with the values of one trial, and again after each pause.

    Args:
        num_last: newest checkpoints to keep, from which trials go on after a pause.
    """

    def trainable(values: dict[str, Any]) -> None:
        planned = planned_trial(job, values)
        directory = TrialDir(trials.below(planned.trial_id))
        directory.place.fetch()
        record = directory.read() if directory.has_begun else None
        if record and (record.is_settled or not num_last):
            # A continued run: what ended is told again, not computed again.
            for finished in record.epochs:
                report(finished)
            return
        notes: tuple[str, ...] = ()
        resume_from = None
        if record and record.epochs:
            resume_from = directory.place.below(CHECKPOINTS).below(
                str(record.epochs[-1].checkpoint)
            )
        elif copied := values["trial"].get("copied"):
            donor, epoch, checkpoint = copied
            resume_from = trials.below(donor).below(CHECKPOINTS).below(checkpoint)
            notes = (f"goes on from the weights of {donor} at the end of epoch {epoch}",)
        run = run_in_workers if planned.config.resources.workers_per_trial > 1 else run_trial
        try:
            run(
                planned.config,
                report,
                trial_dir=directory.place,
                images=images,
                resume_from=resume_from,
                num_last=num_last,
                notes=notes,
            )
        except Exception as err:  # the border: whatever it is, the trial's directory says so
            directory.fail(err)
            raise

    def report(finished: EpochReport) -> None:
        tune.report(asdict(finished))

    return trainable
