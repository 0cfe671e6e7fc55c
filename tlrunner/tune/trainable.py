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
from dataclasses import asdict, dataclass
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
from tlrunner.tune.members import as_member
from tlrunner.tune.space import PlannedTrial

PLACE_SECONDS = 200.0  # that a full disk or a store out of reach has until a trial starts again
END_SECONDS = 60  # a stopped trial may take to end its workers, before the next one fails for it

if TYPE_CHECKING:
    from tlrunner.train.trial_dir import EpochReport, TrialDir, TrialRecord


def planned_trial(job: JobConfig, values: dict[str, Any]) -> PlannedTrial:
    """The trial that Ray's values for it stand for."""
    return as_member(values).planned(job)


@dataclass(frozen=True)
class Trials:
    """What the trials of a search have in common.

    Args:
        place: the directory that has theirs.
        num_last: latest epochs whose checkpoints are kept, for trials to go on from.
        beside: all of them, and what a process keeps from one to the next.
    """

    job: JobConfig
    place: Place
    images: Images
    num_last: int
    beside: Beside


def build_trainable(trials: Trials, bell: Any) -> Callable[[dict[str, Any]], None]:
    """The function Ray Tune calls with the values of one trial, and again after each pause.

    It is called again, too, where it ended with an error or its process died. A process keeps it
    from one trial to the next, and so what is kept warm.

    `bell`: rings when trials are to halt.
    """

    def trainable(values: dict[str, Any]) -> None:
        run_planned(trials, values, Hearing(bell))

    return trainable


def run_planned(trials: Trials, values: dict[str, Any], is_halted: Callable[[], bool]) -> None:
    """Run a trial, or tell again what it did, or go on behind its pause."""
    if is_halted():
        return  # one of those that had no room before
    with importing():
        from tlrunner.train.attempts import take
        from tlrunner.train.trial_dir import TrialDir

    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(END_SECONDS)
    planned, max_failures = planned_trial(trials.job, values), trials.job.search.max_failures
    directory = TrialDir(trials.place.below(planned.trial_id))
    try:
        if not _is_over(directory, max_failures):
            directory = TrialDir(take(directory.place))
            _go_on(trials, planned, values, directory, is_halted)
    except Exception as err:  # the border: whatever it is, the trial's directory says so
        if _is_final(directory, err, max_failures):
            directory.fail(err, planned.config)
            return
        _leave_traceback(directory, err, is_halted)
        told = without_secrets(err)  # Ray writes what it is told to files of its own
        if told is not err:
            raise told from None
        raise  # for Ray to start the trial again


def _is_over(directory: "TrialDir", max_failures: int) -> bool:
    """Whether nothing is to be computed any more: what was done is told again."""
    directory.place.fetch()
    if _has_stalled_again(directory, max_failures):
        return True
    record = directory.read() if directory.has_begun else None
    if record is None or not record.is_settled:
        return False
    for finished in record.epochs:
        report(finished)
    return True


def _go_on(
    trials: Trials,
    planned: PlannedTrial,
    values: dict[str, Any],
    directory: "TrialDir",
    is_halted: Callable[[], bool],
) -> None:
    """Run a trial that is this process's to write, from where it stands."""
    with importing():
        from tlrunner.train.resume import epoch_of
        from tlrunner.train.trial import run_trial
        from tlrunner.tune.workers import run_in_workers

    directory.place.fetch()  # once more: the one before may have written until it was taken
    if directory.has_begun:
        directory.tell_kept()
    record = directory.read() if directory.has_begun else None
    resume_from, notes = _beginning(trials.place, directory, record, values)
    if record and not trials.num_last:
        for finished in record.epochs[: epoch_of(resume_from)]:
            report(finished)
    run = run_in_workers if planned.config.resources.workers_per_trial > 1 else run_trial
    run(
        planned.config,
        report,
        trial_dir=directory.place,
        images=trials.images,
        resume_from=resume_from,
        num_last=trials.num_last,
        notes=notes,
        beside=trials.beside,
        is_halted=is_halted,
    )


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
