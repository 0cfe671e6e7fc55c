"""Backbones ranked before training: those of a search are scored, and the best of them tried.

What was found is kept in the run's `rank.json`, so that a continued run has the same backbones.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.errors import ConfigError
from tlrunner.files import write_json
from tlrunner.jobconfig import JobConfig
from tlrunner.machine import importing
from tlrunner.searchconfig import Distribution, RankConfig
from tlrunner.train.beside import Beside
from tlrunner.train.images import Images
from tlrunner.train.place import Place
from tlrunner.tune.space import planned_trials

if TYPE_CHECKING:
    from tlrunner.train.scores import Scores

RANK = "rank.json"
NAME = "backbone.name"


def check_rank(job: JobConfig) -> None:
    """Check that a ranking leaves some backbones out.

    Raises:
        ConfigError: there are too few of them, or which there are depends on other keys.
    """
    if job.search.rank is None:
        return
    if any(entry.when for entry in job.search.space.get(NAME, ())):
        raise ConfigError(
            "search.rank is set, and search.space has backbone.name with `when`",
            "backbone.name with no condition, others with `when: {backbone.name: ...}`",
        )
    names, keep = searched_backbones(job), job.search.rank.keep
    if keep >= len(names):
        valid = f"1..{len(names) - 1}" if len(names) > 1 else "several values of backbone.name"
        raise ConfigError(
            f"search.rank.keep is {keep}, and {len(names)} backbones are searched",
            valid,
            "or leave search.rank out",
        )


def searched_backbones(job: JobConfig) -> list[str]:
    """Names of the backbones that trials can have, each once."""
    values = [value for entry in job.search.space.get(NAME, ()) for value in entry.values]
    values += [point.get(NAME, job.backbone.name) for point in job.search.points]
    return list(dict.fromkeys(map(str, values or [job.backbone.name])))


def with_best_backbones(
    job: JobConfig, images: Images, run: Place, beside: Beside, console: Console
) -> JobConfig:
    """The job with the backbones alone that `search.rank` keeps, after a table of all.

    Raises:
        Those of `score_backbone`.
    """
    rank = job.search.rank
    assert rank is not None, "the caller asks for a ranking"
    try:
        rows = json.loads(run.store.read(RANK))["backbones"]
    except FileNotFoundError:
        names = ", ".join(searched_backbones(job))
        console.print(f"scoring {names}", soft_wrap=True)
        rows = _ranked(rank, _scores(job, images, beside, rank.num_images))
        write_json(run.path / RANK, {**rank.model_dump(), "backbones": rows})
        run.save(run.path / RANK)
    console.print(_table(rank, rows))
    return restricted(job, [row["name"] for row in rows if row["is_kept"]])


def restricted(job: JobConfig, names: Sequence[str]) -> JobConfig:
    """The job with no other backbones in its space or points, nor what is searched for others."""
    search, space = job.search, {}
    for key, entries in job.search.space.items():
        fitting = [entry for entry in (_fitting(key, e, names) for e in entries) if entry]
        if fitting:
            space[key] = tuple(fitting)
    points = [p for p in search.points if p.get(NAME, job.backbone.name) in names]
    search = search.model_copy(update={"space": space, "points": tuple(points), "rank": None})
    return job.model_copy(update={"search": search})


def _fitting(key: str, entry: Distribution, names: Sequence[str]) -> Distribution | None:
    """A distribution as it is for these backbones; None if it is for others."""
    if key == NAME:
        values = tuple(value for value in entry.values if value in names)
        return entry.model_copy(update={entry.kind: values})
    if NAME not in entry.when:
        return entry
    wanted = entry.when[NAME]
    kept = [n for n in (wanted if isinstance(wanted, list | tuple) else [wanted]) if n in names]
    return entry.model_copy(update={"when": {**entry.when, NAME: kept}}) if kept else None


def _scores(job: JobConfig, images: Images, beside: Beside, num_images: int) -> dict[str, "Scores"]:
    """The scores of each backbone, as the first trial has it that is known to."""
    import ray  # which a dry run does without
    from ray.exceptions import RayTaskError

    known = {trial.config.backbone.name: trial.config for trial in reversed(planned_trials(job))}
    resources = job.resources
    task = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker or 0)(
        _score
    )
    tasks = {
        name: task.remote(
            known.get(name) or with_values(job.trial(), {NAME: name}), images, beside, num_images
        )
        for name in searched_backbones(job)
    }
    try:
        return dict(zip(tasks, ray.get(list(tasks.values())), strict=True))
    except RayTaskError as err:
        raise err.cause from err


def _score(config: TrialConfig, images: Images, beside: Beside, num_images: int) -> "Scores":
    """Runs on a node, which imports all that it takes."""
    with importing():
        from tlrunner.train.scores import score_backbone

    return score_backbone(config, images, beside, num_images)


def _ranked(rank: RankConfig, scores: Mapping[str, "Scores"]) -> list[dict[str, Any]]:
    """Best first; of equals the one that was named first."""
    names = sorted(scores, key=lambda name: -getattr(scores[name], rank.by))
    return [
        {"name": name, **asdict(scores[name]), "is_kept": place < rank.keep}
        for place, name in enumerate(names)
    ]


def _table(rank: RankConfig, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("backbone", "log_me", "h_score", "ridge_accuracy", "seconds", f"by {rank.by}")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['log_me']:.4f}",
            f"{row['h_score']:.3f}",
            f"{row['ridge_accuracy']:.4f}",
            f"{row['seconds']:.1f}",
            "kept" if row["is_kept"] else "",
        )
    return table
