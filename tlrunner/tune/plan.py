"""Everything about a search that can be known, checked or estimated before a trial starts."""

import os
from collections.abc import Sequence

import numpy as np
import torch
import yaml
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from tlrunner.config import ResourceConfig, TrialConfig
from tlrunner.data.order import sample_ids, split_rows
from tlrunner.data.sources import Source
from tlrunner.errors import ConfigError, ResourceError
from tlrunner.jobconfig import JobConfig
from tlrunner.model.classifier import describe
from tlrunner.model.freeze import check
from tlrunner.tune.estimate import Cost, estimate_costs
from tlrunner.tune.space import PlannedTrial, planned_trials

MAX_LISTED_TRIALS = 100


def check_search(job: JobConfig) -> list[PlannedTrial]:
    """The trials of a search (of TPE: a sample of them), each checked against its backbone.

    Raises:
        ConfigError: some point of the space cannot be trained.
    """
    trials = planned_trials(job)
    for trial in trials:
        check_trial(trial.config)
    return trials


def check_trial(config: TrialConfig) -> None:
    """Check what no single section can: the backbone's stages, the precision of the device."""
    num_stages = len(describe(config.backbone, config.data.image_size).stage_names)
    check(config.freeze, num_stages, config.backbone.name)
    if config.train.mixed_precision == "fp16" and config.resources.gpus_per_worker == 0:
        raise ConfigError("train.mixed_precision is fp16, which needs a GPU", "no, bf16 (on CPUs)")


def grant(resources: ResourceConfig, num_cpus: int, num_gpus: int, where: str) -> ResourceConfig:
    """The resources of a trial, with everything left open decided by what there is.

    Raises:
        ResourceError: more is asked for than `where` has.
    """
    gpus = resources.gpus_per_worker
    if gpus is None:
        gpus = min(1, num_gpus)
    for key, asked, most in (
        ("cpus_per_worker", resources.cpus_per_worker, num_cpus),
        ("gpus_per_worker", gpus, num_gpus),
    ):
        if asked > most:
            raise ResourceError(
                f"resources.{key} is {asked}, {where} has {num_cpus} CPUs and {num_gpus} GPUs",
                f"at most {most}",
                "ask for less, or use a larger machine",
            )
    return resources.model_copy(update={"gpus_per_worker": gpus})


def grant_here(resources: ResourceConfig) -> ResourceConfig:
    """What a trial gets in this process."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return grant(resources, os.cpu_count() or 1, num_gpus, "this machine")


def show_plan(job: BaseModel, trials: Sequence[PlannedTrial], source: Source, out: Console) -> None:
    """Print the resolved config, the resources, the trials and their cost (`--dry-run`).

    Raises:
        ResourceError: this machine, where it is the one to run on, cannot hold a trial.
    """
    concurrent = _concurrent_trials(trials[0].config, job)
    out.print(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False), highlight=False)
    config = trials[0].config
    splits = split_rows(
        sample_ids(source.keys),
        np.asarray(source.labels),
        val_fraction=config.data.val_fraction,
        test_fraction=config.data.test_fraction,
        limit=config.data.limit,
        class_names=source.class_names,
    )
    num_train, num_val = len(splits.train), len(splits.val)
    out.print(f"images: {num_train} train, {num_val} val, {len(splits.test)} test")
    costs = estimate_costs(
        [trial.config for trial in trials], len(source.class_names), num_train, num_val
    )
    _show_trials(trials, costs, out)
    num_trials = (job.search.num_trials if isinstance(job, JobConfig) else None) or len(trials)
    seconds = sum(cost.seconds for cost in costs) * num_trials / len(trials) / concurrent
    longest = max(cost.seconds for cost in costs)
    out.print(
        f"estimate, measured on this machine: {max(seconds, longest):.0f} s for {num_trials} "
        f"trials, {concurrent} at a time; memory of a trial up to "
        f"{max(cost.memory_bytes for cost in costs) / 2**20:.0f} MiB; image cache "
        f"{source.num_bytes / 2**20:.0f} MiB in {config.data.cache_dir}",
        highlight=False,
    )


def _show_trials(trials: Sequence[PlannedTrial], costs: list[Cost], out: Console) -> None:
    table = Table("trial", "backbone", "strategy", "lr", "epochs", "seconds", "MiB")
    for trial, cost in list(zip(trials, costs, strict=True))[:MAX_LISTED_TRIALS]:
        config = trial.config
        table.add_row(
            trial.trial_id,
            config.backbone.name,
            str(config.freeze),
            f"{config.optim.lr:.2e}",
            str(config.train.epochs),
            f"{cost.seconds:.0f}",
            f"{cost.memory_bytes / 2**20:.0f}",
        )
    out.print(table)
    if len(trials) > MAX_LISTED_TRIALS:
        out.print(f"and {len(trials) - MAX_LISTED_TRIALS} more")


def _concurrent_trials(config: TrialConfig, job: BaseModel) -> int:
    """Trials this machine can run at once; a cluster's size is only known once connected."""
    wanted = job.search.max_concurrent_trials if isinstance(job, JobConfig) else 1
    if "RAY_ADDRESS" in os.environ:
        return wanted or 1
    granted = grant_here(config.resources)
    places = (os.cpu_count() or 1) // granted.cpus_per_worker
    if granted.gpus_per_worker:
        places = min(places, torch.cuda.device_count() // granted.gpus_per_worker)
    return min(wanted or places, places)
