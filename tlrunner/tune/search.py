"""A search on Ray Tune: from checked trials to directories that hold their results.

Ray decides which trial runs when and where, and which is stopped. What a trial did is read from
its own directory afterwards, never from Ray's records: those can be empty after a full disk.
"""

import math
import os
import shutil
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console

from tlrunner.files import cannot_write
from tlrunner.jobconfig import JobConfig
from tlrunner.train.beside import Beside
from tlrunner.train.demand import demands
from tlrunner.train.images import Images
from tlrunner.train.place import CHECKPOINTS, Place
from tlrunner.train.trial_dir import TrialDir, TrialRecord
from tlrunner.tune.bell import hang_bell
from tlrunner.tune.cluster import places_now
from tlrunner.tune.members import Member, Members, able, epochs_behind, kept_members
from tlrunner.tune.plan import count_trials
from tlrunner.tune.progress import NoOtherLines, Progress
from tlrunner.tune.propose import Asked, ListedPoints, OptunaPoints, Points, Proposer
from tlrunner.tune.rank import with_best_backbones
from tlrunner.tune.repeats import candidates, repeats_of
from tlrunner.tune.schedule import build_scheduler, num_last
from tlrunner.tune.space import Point, iter_points, num_trials_of, planned_trials
from tlrunner.tune.spend import Over, Spending
from tlrunner.tune.tracking import trackers
from tlrunner.tune.trainable import Trials, build_trainable

MOST_PENDING = 16  # trials that wait for room, for an autoscaler to see
MOST_ROUNDS = 3  # of what Ray lost: a trial whose actor does not come back is not told of
# Of a trial that drives workers: something that every node has, since Tune must reserve something.
DRIVER_SLOT = {"memory": 1.0}


@dataclass(frozen=True)
class Search:
    """A search as it runs.

    Args:
        num_trials: how many there will be, if that is known.
        started: when the job began, on the monotonic clock.
        run: the run's directory; trials are in its `trials/`.
        is_halted: whether this process was asked to halt.
        ended: records of the trials that ended before this run was continued.
        earlier: those of the run that `search.warm_start` names.
    """

    job: JobConfig
    num_trials: int | None
    started: float
    run: Place
    images: Images
    is_halted: Callable[[], bool]
    ended: Sequence[TrialRecord] = ()
    earlier: Sequence[TrialRecord] = ()

    @property
    def trials(self) -> Place:
        return self.run.below("trials")


def run_search(search: Search, console: Console) -> None:
    """Run every trial of a search to its end, then the repeats of the best, if there are to be any.

    The trials were checked, the images prepared and Ray connected by the caller. Backbones that
    `search.rank` leaves out are tried in none of them.

    Raises:
        KeyboardInterrupt: the process was asked to halt. Trials that were under way have left a
            checkpoint, if they could in time.
    """
    if search.job.search.rank:
        search = _ranked(search, console)
    job = search.job
    has_repeats = bool(job.search.final_repeats)  # whose seeds then tell them from the others

    def is_own(record: TrialRecord) -> bool:
        return not has_repeats or record.config.train.seed == job.train.seed

    ended = [record for record in search.ended if is_own(record)]
    spent = sum(record.epochs[-1].seconds for record in search.ended if record.epochs)
    spending = Spending(job, search.started, spent, has_repeats=has_repeats)
    _run(search, _points(search, ended, is_own), spending, console)
    _end_trials(search, is_own)
    if has_repeats and (best := candidates(job, [d.read() for d in _begun(search.trials)])):
        console.print(f"repeating {', '.join(record.trial_id for record in best)}", highlight=False)
        points = repeats_of(job, best)
        plain = job.search.model_copy(update={"scheduler": "none", "algorithm": "random"})
        search = replace(
            search, job=job.model_copy(update={"search": plain}), num_trials=len(points)
        )
        spending = Spending(job, search.started, spending.compute_seconds, has_repeats=False)
        _run(search, ListedPoints(points), spending, console)
        _end_trials(search, lambda record: not is_own(record))


def _ranked(search: Search, console: Console) -> Search:
    """The search among the best of its backbones."""
    beside = _beside(search.job)
    job = with_best_backbones(search.job, search.images, search.run, beside, console)
    return replace(search, job=job, num_trials=count_trials(job, planned_trials(job)))


def _run(search: Search, points: Points, spending: Spending, console: Console) -> None:
    """Run the trials at some points, and those of them once more that were lost on the way."""
    asked = Asked(points)
    _tune(search, asked, spending, console)
    for _ in range(MOST_ROUNDS):
        lost = [] if spending.is_over else _lost(search, asked.points)
        if not lost:
            break
        asked = Asked(ListedPoints((member.index, member.point) for member in lost))
        _tune(search, asked, spending, console)
    else:
        _fail_lost(search, [] if spending.is_over else _lost(search, asked.points))


def _lost(search: Search, points: Sequence[tuple[int, Point]]) -> list[Member]:
    """Those of a population, or at some points, of which Ray lost the trial: it did not end."""
    search.trials.fetch(without=CHECKPOINTS)
    members = _kept_members(search) or [Member(*point) for point in points]
    ended = {d.path.name for d in _begun(search.trials) if d.read().state != "interrupted"}
    return _without(members, ended, search.job)


def _without(members: Sequence[Member], ended: Set[str], job: JobConfig) -> list[Member]:
    """`ended`: names of trials."""
    return [member for member in members if member.planned(job).trial_id not in ended]


def _fail_lost(search: Search, members: Sequence[Member]) -> None:
    for member in members:
        planned = member.planned(search.job)
        directory = TrialDir(search.trials.below(planned.trial_id))
        directory.give_up(planned.config, f"Ray lost it {MOST_ROUNDS + 1} times")


def _tune(search: Search, points: Points, spending: Spending, console: Console) -> None:
    job, ray_dir = search.job, search.run.path / ".ray"
    kept = num_last(job)
    bell = hang_bell()
    shutil.rmtree(ray_dir, ignore_errors=True)  # of a search that was killed, or put there
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(MOST_PENDING)
    population = _population(search, points) if job.search.scheduler == "pbt" else None
    if population == []:
        return
    members = Members(search.run, population) if population else None
    shown = search.num_trials, console, search.is_halted
    with Progress(job, search.trials, *shown, members) as progress:
        tuner = tune.Tuner(
            tune.with_resources(
                build_trainable(
                    Trials(job, search.trials, search.images, kept, _beside(job)), bell
                ),
                _resources(job),
            ),
            **(
                _of_population(search, population, progress)
                if population
                else _proposed(search, points, spending, progress)
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(ray_dir),
                stop=Over(
                    spending, job.search.max_epochs, search.is_halted, progress.has_error, bell
                ),
                failure_config=tune.FailureConfig(max_failures=-1),  # `Progress` says when it ends
                callbacks=[NoOtherLines(), spending, progress, *_trackers(search, progress)],
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except Exception as err:
            if progress.error:
                raise progress.error from err
            search.run.checked_fence()  # which is then why
            if isinstance(err, OSError):  # of Ray's own files
                raise cannot_write(Path(err.filename or ray_dir), err) from err
            raise
        finally:
            shutil.rmtree(ray_dir, ignore_errors=True)  # Ray's pickles, which nothing reads again
    if progress.error:
        raise progress.error
    if search.is_halted():
        raise KeyboardInterrupt


def _proposed(
    search: Search, points: Points, spending: Spending, progress: Progress
) -> dict[str, Any]:
    """Who says which trial is next, and which of them stops."""
    job = search.job
    # Ray lets trials wait for room itself, but for those better chosen late and those that Ray
    # Train finds room for.
    waits = job.search.algorithm == "tpe" or job.resources.workers_per_trial > 1
    most = job.search.max_concurrent_trials or math.inf

    def is_over() -> bool:
        return search.is_halted() or spending.is_over or progress.has_error()

    def has_room() -> bool:
        return spending.take_place(min(places_now(job.resources), most) if waits else most)

    proposer = Proposer(points, is_over, has_room, progress.record_of)
    config = tune.TuneConfig(search_alg=proposer, num_samples=-1, **_settings(job, progress))
    return {"tune_config": config}


def _population(search: Search, points: Points) -> list[Member]:
    """The members that begin at some points, or go on as what they have become."""
    kept = {member.index: member for member in _kept_members(search)}
    return [kept.get(index) or Member(index, point) for index, point in iter(points.ask, None)]


def _kept_members(search: Search) -> list[Member]:
    if search.job.search.scheduler != "pbt":
        return []
    return able(search.job, search.trials, kept_members(search.run))


def _of_population(search: Search, members: Sequence[Member], progress: Progress) -> dict[str, Any]:
    """A population, which Ray runs on a list of trials alone."""
    job = search.job
    assert job.search.perturbation_epochs is not None, "the config fills it in"
    behind = min(epochs_behind(job, search.trials, member) for member in members)
    met_at = behind - behind % job.search.perturbation_epochs
    param_space = {"trial": tune.grid_search([asdict(member) for member in members])}
    config = tune.TuneConfig(**_settings(job, progress, met_at))
    return {"param_space": param_space, "tune_config": config}


def _settings(job: JobConfig, progress: Progress, met_at: int = 0) -> dict[str, Any]:
    return {
        "metric": "val_acc",
        "mode": "max",
        "scheduler": build_scheduler(job, progress.config_of, progress.trial_id_of, met_at),
        "reuse_actors": True,
    }


def _beside(job: JobConfig) -> Beside:
    """The trials that are known now, or of TPE as many random ones, and what they will read."""
    configs = [trial.config for trial in planned_trials(job)[: num_trials_of(job)]]
    return Beside(configs, demands(configs))


def _trackers(search: Search, progress: Progress) -> list[tune.Callback]:
    told_before = frozenset(record.trial_id for record in search.ended)
    of_progress = progress.trial_id_of, progress.has_failed
    return trackers(search.job, search.run, *of_progress, told_before)


def _resources(job: JobConfig) -> dict[str, float]:
    """What Tune reserves for a trial; Ray Train reserves for the workers that a trial drives."""
    resources = job.resources
    if resources.workers_per_trial > 1:
        return DRIVER_SLOT
    return {"cpu": resources.cpus_per_worker, "gpu": resources.gpus_per_worker or 0}


def _points(
    search: Search, ended: Sequence[TrialRecord], is_own: Callable[[TrialRecord], bool]
) -> Points:
    """`is_own`: whether a trial is one of these points, and not a repeat of the best."""
    if search.job.search.algorithm == "tpe":
        records = [directory.read() for directory in _begun(search.trials)]
        broken_off = [r for r in records if r.state == "interrupted" and is_own(r)]
        return OptunaPoints(search.job, ended, search.earlier, broken_off)
    if members := _kept_members(search):
        left = _without(members, {record.trial_id for record in ended}, search.job)
        return ListedPoints((member.index, member.point) for member in left)
    points = enumerate(iter_points(search.job))
    if not num_last(search.job):
        return ListedPoints(points)
    # What pauses and goes on cannot be told again, so what ended before takes no part.
    known = {record.index for record in ended}
    return ListedPoints((index, point) for index, point in points if index not in known)


def _begun(trials: Place) -> list[TrialDir]:
    begun = sorted(trials.path.glob("*/config.json"))
    return [TrialDir(trials.below(file.parent.name)) for file in begun]


def _end_trials(search: Search, is_of_it: Callable[[TrialRecord], bool]) -> None:
    """End the trials that the search ended, of which Ray tells its callbacks nothing.

    Of each trial the best checkpoint stays. `is_of_it`: whether the search was of this trial.
    """
    search.trials.fetch(without=CHECKPOINTS)
    for directory in _begun(search.trials):
        record = directory.read()
        if not is_of_it(record):
            continue
        if record.state == "interrupted":
            directory.end("stopped")
        if num_last(search.job) or record.state in ("interrupted", "stopped"):
            directory.place.fetch(without_suffix=".safetensors")  # none of which is read
            directory.keep_weights()
