"""A search on Ray Tune: from checked trials to directories that hold their results.

Ray decides which trial runs when and where, and which is stopped. What a trial did is read from
its own directory afterwards, never from Ray's records: those can be empty after a full disk.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from tlrunner.config import ResourceConfig
from tlrunner.errors import ResourceError, StorageError
from tlrunner.jobconfig import JobConfig, SearchConfig
from tlrunner.train.feed import Images
from tlrunner.train.place import CHECKPOINTS, Place
from tlrunner.train.trial_dir import TrialDir
from tlrunner.tune.plan import Machine, grant, most_epochs
from tlrunner.tune.progress import Progress
from tlrunner.tune.space import planned_points, suggest_point
from tlrunner.tune.trainable import build_trainable

# Ray reads these when it starts: the project has its own table, its own records and its own way to
# stop, and with SIGINT left to Ray an interrupted run would end as a success.
RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def connected_to_ray(log_level: str) -> Iterator[None]:
    """The cluster that RAY_ADDRESS or this machine has, or else a local one, inside this block.

    Raises:
        ResourceError: there is one, and it cannot be reached.
    """
    os.environ.update(RAY_SETTINGS)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            include_dashboard=False,
            log_to_driver=log_level == "debug",
            logging_level="DEBUG" if log_level == "debug" else "ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as err:
        raise ResourceError(
            f"no connection to the Ray cluster at {os.environ.get('RAY_ADDRESS', 'this machine')}: "
            f"{str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__}",
            "",
            "check RAY_ADDRESS, the token (RAY_AUTH_MODE, ~/.ray/auth_token) and the versions",
        ) from err
    # Ray's own SIGTERM handlers exit or abort at once; the one before ends the run in order.
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def granted_resources(resources: ResourceConfig) -> ResourceConfig:
    """What a trial gets on the connected cluster.

    Raises:
        ResourceError: no node can ever hold one trial.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return grant(
        resources,
        [Machine(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes],
    )


def check_shared(directory: Path, holds: str, remedy: str) -> None:
    """Check that every node sees a directory that its trials use.

    Args:
        holds: a file in it.

    Raises:
        StorageError: a node does not.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return
    sees = ray.remote(num_cpus=0)(lambda path: Path(path).is_file())
    seen = [
        sees.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(str(directory / holds))
        for node in nodes
    ]
    blind = [
        node["NodeName"] for node, is_seen in zip(nodes, ray.get(seen), strict=True) if not is_seen
    ]
    if blind:
        raise StorageError(
            f"{directory} is not seen from {len(blind)} of {len(nodes)} nodes, e.g. {blind[0]}",
            "a directory that all nodes share, or s3://",
            remedy,
        )


def run_search(
    job: JobConfig, num_trials: int, num_settled: int, run: Place, images: Images, console: Console
) -> None:
    """Run every trial of a search to its end; results are in `run`, in trials/.

    The trials were checked, the images prepared and Ray connected by the caller.

    Args:
        num_settled: trials that ended before this run was continued. TPE asks for the others only,
            and starts its model anew.
    """
    trials = run.below("trials")
    resources = {"cpu": job.resources.cpus_per_worker, "gpu": job.resources.gpus_per_worker}
    ray_dir = run.path / ".ray"
    num_asked = num_trials - num_settled if job.search.algorithm == "tpe" else 1
    if num_asked <= 0:
        return
    with Progress(job, trials, num_trials, console) as progress:
        tuner = tune.Tuner(
            tune.with_resources(build_trainable(job, trials, images), resources),
            param_space=_param_space(job),
            tune_config=tune.TuneConfig(
                metric="val_acc",
                mode="max",
                search_alg=_searcher(job, num_settled),
                scheduler=_scheduler(job.search, most_epochs(job)),
                num_samples=num_asked,
                max_concurrent_trials=job.search.max_concurrent_trials,
                time_budget_s=job.search.time_budget_seconds,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(ray_dir),
                stop={"epoch": job.search.max_epochs} if job.search.max_epochs else None,
                callbacks=[progress],
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except Exception as err:
            if progress.error:
                raise progress.error from err
            raise
        finally:
            shutil.rmtree(ray_dir, ignore_errors=True)  # Ray's pickles, which nothing reads again
    _end_stopped(trials)


def _end_stopped(trials: Place) -> None:
    """Trials that a time budget ended: Ray tells its callbacks nothing of these."""
    trials.fetch(without=CHECKPOINTS)
    for begun in trials.path.glob("*/config.json"):
        directory = TrialDir(trials.below(begun.parent.name))
        if directory.read().state == "interrupted":
            directory.end("stopped")


def _param_space(job: JobConfig) -> dict[str, Any]:
    if job.search.algorithm == "tpe":
        return {}
    points = planned_points(job)
    trials = [{"index": index, "point": point} for index, point in enumerate(points)]
    return {"trial": tune.grid_search(trials)}


def _searcher(job: JobConfig, first_index: int) -> OptunaSearch | None:
    if job.search.algorithm != "tpe":
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(
        # Ray saves its searchers, and a lambda cannot be saved.
        space=partial(_suggested, job, first_index),
        metric="val_acc",
        mode="max",
        sampler=optuna.samplers.TPESampler(seed=(job.search.seed or 0) + first_index),
    )


def _suggested(job: JobConfig, first_index: int, trial: optuna.Trial) -> dict[str, Any]:
    index = first_index + trial.number
    return {"trial": {"index": index, "point": suggest_point(job, trial)}}


def _scheduler(search: SearchConfig, most_epochs: int) -> TrialScheduler | None:
    if search.scheduler == "asha":
        return AsyncHyperBandScheduler(
            time_attr="epoch",
            max_t=most_epochs,
            grace_period=search.grace_epochs,
            reduction_factor=search.reduction_factor,
        )
    if search.scheduler == "median":
        return MedianStoppingRule(time_attr="epoch", grace_period=search.grace_epochs)
    return None
