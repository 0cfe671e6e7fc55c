"""What Ray Tune runs: one trial after another, each from its point to its end.

A trial with one worker runs in Tune's own process, one with several as a Ray Train run that this
process drives.

Nothing large is imported here before a trial runs. Ray calls an actor ready once it has unpickled
what the actor is to run, and gives trials to those that are ready: while the others were still
importing torch, one actor did all the short trials.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.exceptions import RayError

from tlrunner.errors import InterruptedRun, TlrunnerError, UnavailableError
from tlrunner.jobconfig import JobConfig
from tlrunner.machine import importing
from tlrunner.secrets import redacted, without_secrets
from tlrunner.train.beside import Beside
from tlrunner.train.images import Images
from tlrunner.train.place import CHECKPOINTS, Place
from tlrunner.tune.bell import Hearing
from tlrunner.tune.space import PlannedTrial, trial_at

PLACE_SECONDS = 200.0  # that a full disk or a store out of reach has until a trial starts again
END_SECONDS = 60  # a stopped trial may take to end its workers, before the next one fails for it

if TYPE_CHECKING:
    from tlrunner.train.trial_dir import EpochReport, TrialDir, TrialRecord


def planned_trial(job: JobConfig, values: dict[str, Any]) -> PlannedTrial:
    """The trial that Ray's values for it stand for."""
    trial = values["trial"]
    copied = trial.get("copied")
    return trial_at(job, trial["index"], trial["point"], tuple(copied[:2]) if copied else None)


def build_trainable(
    job: JobConfig, trials: Place, images: Images, num_last: int, beside: Beside, bell: Any
) -> Callable[[dict[str, Any]], None]:
    """The function Ray Tune calls with the values of one trial, and again after each pause.

    It is called again, too, where it ended with an error or its process died. A process keeps it
    from one trial to the next, and so what `beside` keeps warm.

    Args:
        num_last: newest checkpoints to keep, from which trials go on after a pause.
        beside: the trials of the search.
        bell: rings when trials are to halt.
    """

    def trainable(values: dict[str, Any]) -> None:
        run_planned(job, trials, images, num_last, beside, bell, values)

    return trainable


def run_planned(
    job: JobConfig,
    trials: Place,
    images: Images,
    num_last: int,
    beside: Beside,
    bell: Any,
    values: dict[str, Any],
) -> None:
    """Run a trial, or tell again what it did, or go on behind its pause."""
    is_halted = Hearing(bell)
    if is_halted():
        return  # one of those that had no room before
    with importing():
        from tlrunner.train.resume import epoch_of
        from tlrunner.train.trial import run_trial
        from tlrunner.train.trial_dir import TrialDir
        from tlrunner.tune.workers import run_in_workers

    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(END_SECONDS)
    planned = planned_trial(job, values)
    directory = TrialDir(trials.below(planned.trial_id))

    def go_on() -> None:
        directory.place.fetch()
        record = directory.read() if directory.has_begun else None
        if _has_stalled_again(directory, job.search.max_failures):
            return
        resume_from, notes = _beginning(trials, directory, record, values)
        if record and (record.is_settled or not num_last):
            # A continued run: what was done is told again, not computed again.
            num_done = len(record.epochs) if record.is_settled else epoch_of(resume_from)
            for finished in record.epochs[:num_done]:
                report(finished)
            if record.is_settled:
                return
        run = run_in_workers if planned.config.resources.workers_per_trial > 1 else run_trial
        run(
            planned.config,
            report,
            trial_dir=directory.place,
            images=images,
            resume_from=resume_from,
            num_last=num_last,
            notes=notes,
            beside=beside,
            is_halted=is_halted,
        )

    try:
        go_on()
    except Exception as err:  # the border: whatever it is, the trial's directory says so
        if _is_final(directory, err, job.search.max_failures):
            directory.fail(err)
            return
        _leave_traceback(directory, err, is_halted)
        told = without_secrets(err)  # Ray writes what it is told to files of its own
        if told is not err:
            raise told from None
        raise  # for Ray to start the trial again


def _has_stalled_again(directory: "TrialDir", max_failures: int) -> bool:
    """End a trial whose process was ended for want of a step as often as it may be."""
    from tlrunner.train.attempts import is_hopeless, read_attempts

    attempts = read_attempts(directory.place)
    is_over = attempts[-1:] and attempts[-1].event == "stalled"
    if is_over and is_hopeless(attempts, max_failures):
        directory.end("failed", attempts[-1].error)
        return True
    return False


def _leave_traceback(
    directory: "TrialDir", error: Exception, is_halted: Callable[[], bool]
) -> None:
    """As soon as the trial's place can be written again, where that is what failed the trial."""
    deadline = time.monotonic() + PLACE_SECONDS
    while True:
        try:
            directory.leave_traceback(error)
            return
        except UnavailableError:
            if time.monotonic() > deadline or is_halted():
                return
            time.sleep(PLACE_SECONDS / 100)


def _is_final(directory: "TrialDir", error: Exception, max_failures: int) -> bool:
    """Whether a trial ends with an error, which is noted; otherwise it goes on from a checkpoint.

    What happens to nodes and places passes, however often; who gives up on that is the search.
    """
    from tlrunner.train.attempts import Attempt, is_hopeless, note_attempt, read_attempts

    if isinstance(error, UnavailableError | InterruptedRun | RayError):
        return False
    if isinstance(error, TlrunnerError):
        return True
    attempts = read_attempts(directory.place)
    step = next((a.step for a in reversed(attempts) if a.event == "started"), 0)
    told = redacted(f"{type(error).__name__}: {error}")[:500]
    note_attempt(directory.place, "failed", step, told)
    return is_hopeless([*attempts, Attempt("failed", step, told)], max_failures)


def report(finished: "EpochReport") -> None:
    """Tell the search of an epoch, which may end the trial by an exception here."""
    tune.report(asdict(finished))


def _beginning(
    trials: Place,
    directory: "TrialDir",
    record: "TrialRecord | None",
    values: dict[str, Any],
) -> tuple[Place | None, tuple[str, ...]]:
    """The checkpoint that a trial goes on from, if any, and what is to be noted of it."""
    if checkpoint := directory.to_go_on_from():
        return checkpoint, record.notes if record else ()
    if copied := values["trial"].get("copied"):
        donor, epoch, checkpoint_name = copied
        note = f"goes on from the weights of {donor} at the end of epoch {epoch}"
        return trials.below(donor).below(CHECKPOINTS).below(checkpoint_name), (note,)
    return None, record.notes if record else ()
