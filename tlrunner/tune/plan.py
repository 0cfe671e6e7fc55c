"""Everything about a search that can be known, checked or estimated before a trial starts."""

import itertools
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from tlrunner.config import BackboneConfig, DataConfig, ResourceConfig, TrialConfig
from tlrunner.configfile import as_yaml
from tlrunner.data.fetch import open_store
from tlrunner.data.manifest import SPLITS, UNSPLIT
from tlrunner.data.order import sample_ids, split_rows
from tlrunner.data.source import Source
from tlrunner.errors import ConfigError, ResourceError
from tlrunner.jobconfig import JobConfig
from tlrunner.machine import num_cpus
from tlrunner.model.classifier import describe
from tlrunner.model.freeze import check
from tlrunner.searchconfig import MOST_TRIALS
from tlrunner.train.staged import check_staged
from tlrunner.tune.estimate import Cost, estimate_costs
from tlrunner.tune.rank import check_rank, searched_backbones
from tlrunner.tune.reuse_plan import ReusePlan, plan_reuse
from tlrunner.tune.space import (
    MAX_PLANNED,
    PlannedTrial,
    iter_points,
    num_trials_of,
    planned_trials,
)

MAX_LISTED_TRIALS = 100  # which are measured, too
MAX_SIZES = 16  # image sizes that each backbone is checked with


def check_search(job: JobConfig) -> list[PlannedTrial]:
    """The trials of a search (of TPE: a sample of them), each checked against its backbone.

    Raises:
        ConfigError: some point of the space cannot be trained.
    """
    trials = planned_trials(job)
    if job.search.algorithm == "grid":
        count_trials(job, trials)  # there may be too many
    _check_trials([trial.config for trial in trials])
    check_rank(job)
    grace_epochs, longest = job.search.grace_epochs, most_epochs(job)
    if grace_epochs is not None and grace_epochs > longest:
        raise ConfigError(
            f"search.grace_epochs is {grace_epochs}", f"1..{longest}, a trial's epochs"
        )
    return trials


def _check_trials(configs: Sequence[TrialConfig]) -> None:
    """Check each of many trials, but a backbone with some image sizes alone: that takes a while."""
    known: dict[BackboneConfig, dict[int, DataConfig]] = {}
    # Sorted, so that each backbone with a size is looked at once.
    for config in sorted(configs, key=lambda c: (c.backbone.name, c.data.image_size or 0)):
        size, sizes = config.data.image_size or 0, known.setdefault(config.backbone, {})
        if len(sizes) < MAX_SIZES:
            sizes.setdefault(size, config.data)
        data = sizes.get(size, next(iter(sizes.values())))
        check_trial(config.model_copy(update={"data": data}))


def count_trials(job: JobConfig, trials: Sequence[PlannedTrial]) -> int | None:
    """How many trials will run, repeats aside; None where another budget decides.

    TPE plans none beforehand, and a small space has few points.

    Raises:
        ConfigError: a grid has more than any search can try.
    """
    if job.search.algorithm == "tpe" or (
        job.search.algorithm == "random" and num_trials_of(job) is None
    ):
        return num_trials_of(job)
    if len(trials) < MAX_PLANNED:
        return len(trials)
    if job.search.algorithm == "random" and _never_repeats(job):
        return num_trials_of(job)
    count = sum(1 for _ in itertools.islice(iter_points(job), MOST_TRIALS + 1))
    if count > MOST_TRIALS:
        raise ConfigError(
            f"search.space has more than {MOST_TRIALS} combinations",
            f"at most {MOST_TRIALS} with search.algorithm grid",
            "leave values out, or draw some of them: search.algorithm random with choice",
        )
    return count


def _never_repeats(job: JobConfig) -> bool:
    """Whether every point has some number of its own, so that counting them is not needed."""
    return any(
        all(entry.kind in ("uniform", "loguniform") for entry in entries) and not entries[-1].when
        for entries in job.search.space.values()
    )


def most_epochs(job: JobConfig) -> int:
    """The most epochs that a trial of the search can have."""
    values = [value for entry in job.search.space.get("train.epochs", ()) for value in entry.values]
    longest = int(max(values)) if values else job.train.epochs
    return min(longest, job.search.max_epochs or longest)


def check_trial(config: TrialConfig) -> None:
    """Check what no single section can: the backbone's stages, the precision of the device.

    And that `reuse.uri` is a place, if no more than that, and that staged weights are there.
    """
    if config.reuse.uri:
        open_store(config.reuse.uri)
    check_staged(config.backbone)
    num_stages = len(describe(config.backbone, config.data.image_size).stage_names)
    check(config.freeze, num_stages, config.backbone.name)
    if config.train.mixed_precision == "fp16" and config.resources.gpus_per_worker == 0:
        raise ConfigError("train.mixed_precision is fp16, which needs a GPU", "no, bf16 (on CPUs)")


@dataclass(frozen=True)
class Machine:
    """What a trial could get of one machine or node."""

    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.cpus} CPUs and {self.gpus} GPUs"

    def num_workers(self, resources: ResourceConfig) -> int:
        """How many workers fit here at once."""
        gpus = resources.gpus_per_worker or 0
        by_cpus = self.cpus // resources.cpus_per_worker
        if gpus == 0:
            return by_cpus
        return min(by_cpus, self.gpus * int(1 / gpus + 1e-9))


def num_places(resources: ResourceConfig, machines: Sequence[Machine]) -> int:
    """How many trials fit on machines at once; the workers of a trial may be on several."""
    num_workers = sum(machine.num_workers(resources) for machine in machines)
    return num_workers // resources.workers_per_trial


def grant(resources: ResourceConfig, machines: Sequence[Machine]) -> ResourceConfig:
    """The resources of a trial, with everything left open decided by what there is.

    Raises:
        ResourceError: the machines have not what is asked for.
    """
    if resources.gpus_per_worker is None:
        with_gpus = resources.model_copy(update={"gpus_per_worker": 1})
        fits = num_places(with_gpus, machines) > 0
        resources = with_gpus if fits else resources.model_copy(update={"gpus_per_worker": 0})
    if num_places(resources, machines) == 0:
        kinds = Counter(str(machine) for machine in machines)
        kinds_text = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(5))
        raise ResourceError(
            f"resources.cpus_per_worker is {resources.cpus_per_worker}, resources.gpus_per_worker "
            f"is {resources.gpus_per_worker} and resources.workers_per_trial is "
            f"{resources.workers_per_trial}, and no such trial fits",
            "what there is, " + (kinds_text or "no machine"),
            "ask for less, or add machines",
        )
    return resources


def this_machine() -> Machine:
    return Machine(num_cpus(), torch.cuda.device_count() if torch.cuda.is_available() else 0)


def show_plan(job: BaseModel, trials: Sequence[PlannedTrial], source: Source, out: Console) -> None:
    """Print the resolved config, the resources, the trials and their cost (`--dry-run`).

    Raises:
        ResourceError: this machine, where it is the one to run on, cannot hold a trial.
    """
    concurrent = _concurrent_trials(trials[0].config, job)
    out.out(as_yaml(job), highlight=False)  # not wrapped: it is to be read again
    config = trials[0].config
    given = [SPLITS.index(split or UNSPLIT) for split in source.splits]
    splits = split_rows(
        sample_ids(source.keys),
        np.asarray(source.labels),
        val_fraction=config.data.val_fraction,
        test_fraction=config.data.test_fraction,
        limit=config.data.limit,
        class_names=source.class_names,
        given_N=np.array(given) if given else None,
    )
    num_train, num_val = len(splits.train), len(splits.val)
    out.print(f"images: {num_train} train, {num_val} val, {len(splits.test)} test")
    listed = [trial.config for trial in trials[:MAX_LISTED_TRIALS]]
    costs = estimate_costs(listed, len(source.class_names), num_train, num_val)
    known = count_trials(job, trials) if isinstance(job, JobConfig) else 1
    _show_trials(trials, costs, known, out)
    if isinstance(job, JobConfig) and (rank := job.search.rank):
        out.print(
            f"rank: {len(searched_backbones(job))} backbones are scored by {rank.by} on up to "
            f"{rank.num_images} images first, and trials with the best {rank.keep} run",
            highlight=False,
        )
    reuse = plan_reuse([trial.config for trial in trials[:known]], num_train, num_val)
    _show_reuse(reuse, out)
    costs = [
        replace(cost, seconds=max(0.0, cost.seconds - reuse.gain(config)))
        for cost, config in zip(costs, listed, strict=True)
    ]
    num_trials, seconds = _extent(job, known, costs, concurrent)
    out.print(
        f"estimate, measured on this machine: {seconds:.0f} s for {num_trials} "
        f"trials, {concurrent} at a time; memory of a trial up to "
        f"{max(cost.memory_bytes for cost in costs) / 2**20:.0f} MiB; image cache "
        f"{source.num_bytes / 2**20:.0f} MiB in {config.data.cache_dir}",
        highlight=False,
    )


def _extent(
    job: BaseModel, known: int | None, costs: Sequence[Cost], concurrent: int
) -> tuple[int, float]:
    """How many trials a job will have, with its repeats, and its seconds by the clock.

    `known`: how many there are without repeats, if that is known.
    """
    mean = sum(cost.seconds for cost in costs) / len(costs)
    longest = max(cost.seconds for cost in costs)
    if not isinstance(job, JobConfig):
        return 1, longest
    search, budget = job.search, job.search.budget
    assert budget is not None, "the config fills it in"
    num_repeats = (search.final_repeats or 0) * (search.final_candidates or 0)
    wall = budget.wall_seconds or math.inf
    for hours, per_trial in (
        (budget.cpu_hours, job.resources.cpus_per_worker),
        (budget.gpu_hours, job.resources.gpus_per_worker or 1),
    ):
        if hours is not None:
            width = per_trial * job.resources.workers_per_trial * concurrent
            wall = min(wall, hours * 3600 / width)
    affordable = math.inf if wall == math.inf else max(1, int(wall * concurrent / mean))
    num_trials = int(min(affordable, math.inf if known is None else known + num_repeats))
    return num_trials, min(wall, max(mean * num_trials / concurrent, longest))


def _show_trials(
    trials: Sequence[PlannedTrial], costs: list[Cost], known: int | None, out: Console
) -> None:
    table = Table("trial", "backbone", "strategy", "lr", "epochs", "seconds", "MiB")
    for trial, cost in zip(trials, costs, strict=False):
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
    if known is not None and known > len(costs):
        out.print(f"and {known - len(costs)} more")


def _show_reuse(reuse: ReusePlan, out: Console) -> None:
    """Print what is kept of frozen stages, over all trials."""
    for kept in (kept for cuts in reuse.cuts.values() for kept in cuts.values()):
        plan, uses = kept.plan, kept.uses
        of = [f"{len(uses.train)} views of training images"] * plan.train
        of += ["validation images"] * plan.val
        out.print(
            f"reuse: {kept.depth} frozen stages of {kept.backbone}, {' and '.join(of)}: "
            f"{plan.num_bytes / 2**20:.0f} MiB, {plan.spent_seconds:.0f} s spent, "
            f"{plan.saved_seconds:.0f} s saved",
            highlight=False,
        )
    for note in reuse.notes:
        out.print(note, highlight=False)


def _concurrent_trials(config: TrialConfig, job: BaseModel) -> int:
    """Trials this machine can run at once; a cluster's size is only known once connected."""
    wanted = job.search.max_concurrent_trials if isinstance(job, JobConfig) else 1
    if "RAY_ADDRESS" in os.environ:
        return wanted or 1
    here = this_machine()
    places = num_places(grant(config.resources, [here]), [here])
    return min(wanted or places, places)
