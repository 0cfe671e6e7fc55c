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
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from tlrunner.config import ResourceConfig
from tlrunner.jobconfig import JobConfig, SearchConfig
from tlrunner.tune.plan import grant
from tlrunner.tune.progress import Progress
from tlrunner.tune.space import PlannedTrial, planned_points, suggest_point
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
    """The cluster that RAY_ADDRESS or this machine has, or else a local one, inside this block."""
    os.environ.update(RAY_SETTINGS)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(
        include_dashboard=False,
        log_to_driver=log_level == "debug",
        logging_level=log_level.upper() if log_level == "debug" else "ERROR",
    )
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
    most_cpus = int(max(node.get("CPU", 0) for node in nodes))
    most_gpus = int(max(node.get("GPU", 0) for node in nodes))
    return grant(resources, most_cpus, most_gpus, f"the largest of {len(nodes)} nodes")


def run_search(
    job: JobConfig, trials: list[PlannedTrial], run_dir: Path, shards: Path, console: Console
) -> None:
    """Run every trial of a search to its end; results are in `run_dir`/trials/.

    The trials were checked, the images prepared and Ray connected by the caller.
    """
    trials_dir = run_dir / "trials"
    num_trials = job.search.num_trials or len(trials)
    most_epochs = max(trial.config.train.epochs for trial in trials)
    resources = {"cpu": job.resources.cpus_per_worker, "gpu": job.resources.gpus_per_worker}
    ray_dir = run_dir / ".ray"
    with Progress(job, trials_dir, num_trials, console) as progress:
        tuner = tune.Tuner(
            tune.with_resources(build_trainable(job, trials_dir, shards), resources),
            param_space=_param_space(job),
            tune_config=tune.TuneConfig(
                metric="val_acc",
                mode="max",
                search_alg=_searcher(job),
                scheduler=_scheduler(job.search, job.search.max_epochs or most_epochs),
                num_samples=num_trials if job.search.algorithm == "tpe" else 1,
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
        finally:
            shutil.rmtree(ray_dir, ignore_errors=True)  # Ray's pickles, which nothing reads again


def _param_space(job: JobConfig) -> dict[str, Any]:
    if job.search.algorithm == "tpe":
        return {}
    points = planned_points(job)
    trials = [{"index": index, "point": point} for index, point in enumerate(points)]
    return {"trial": tune.grid_search(trials)}


def _searcher(job: JobConfig) -> OptunaSearch | None:
    if job.search.algorithm != "tpe":
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(
        space=partial(_suggested, job),  # Ray saves its searchers, and a lambda cannot be saved
        metric="val_acc",
        mode="max",
        sampler=optuna.samplers.TPESampler(seed=job.search.seed),
    )


def _suggested(job: JobConfig, trial: optuna.Trial) -> dict[str, Any]:
    return {"trial": {"index": trial.number, "point": suggest_point(job, trial)}}


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
