"""Backbones ranked before training: those of a search are scored, and the best of them tried.

What was found is kept in the run's `rank.json`, so that a continued run has the same backbones.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from tlrunner.config import TrialConfig
from tlrunner.errors import ConfigError, ResourceError, TlrunnerError
from tlrunner.files import write_json
from tlrunner.jobconfig import JobConfig
from tlrunner.machine import importing
from tlrunner.searchconfig import Distribution, RankConfig
from tlrunner.secrets import redacted
from tlrunner.stored import not_as_written
from tlrunner.train.beside import Beside
from tlrunner.train.images import Images
from tlrunner.train.place import Place
from tlrunner.tune.space import planned_trials

if TYPE_CHECKING:
    from tlrunner.train.scores import Scores

log = logging.getLogger("tlrunner")
Space = dict[str, tuple[Distribution, ...]]
RANK = "rank.json"
NAME = "backbone.name"


def check_rank(job: JobConfig) -> None:
    """Check that a ranking leaves some backbones out.

    Raises:
        ConfigError: there are too few of them, or which there are depends on other keys, or a part
            of the space cannot be searched without the others.
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
            f"search.rank.keep is {keep}, and backbones searched are {', '.join(names)}",
            valid,
            "or leave search.rank out",
        )
    for name in names:
        planned_trials(restricted(job, [name]))


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
    rows = _ranked_before(job, run)
    if rows is None:
        names = ", ".join(searched_backbones(job))
        console.print(f"scoring {names}", soft_wrap=True)
        rows = _ranked(rank, *_scores(job, images, beside, rank.num_images))
        run.checked_fence()
        write_json(run.path / RANK, {**rank.model_dump(), "backbones": rows})
        run.save(run.path / RANK)
    console.print(_table(rank, rows))
    return restricted(job, [row["name"] for row in rows if row["is_kept"]])


class _Scored(BaseModel):
    name: str
    log_me: float
    h_score: float
    ridge_accuracy: float
    seconds: float
    is_kept: bool


class _Unscored(BaseModel):
    name: str
    error: str
    is_kept: Literal[False]


class _Ranking(BaseModel):
    """`rank.json`, as far as it is read back."""

    backbones: tuple[_Scored | _Unscored, ...]


def _ranked_before(job: JobConfig, run: Place) -> list[dict[str, Any]] | None:
    """The rows that a continued run has already.

    Raises:
        StorageError: they are not of this search.
    """
    found = run.read(_Ranking, RANK)
    if found is None:
        return None
    kept = {row.name for row in found.backbones if row.is_kept}
    if not kept or not kept <= set(searched_backbones(job)):
        raise not_as_written(f"{run}/{RANK}", f"kept are {sorted(kept)}", "backbones searched")
    return [row.model_dump() for row in found.backbones]


def restricted(job: JobConfig, names: Sequence[str]) -> JobConfig:
    """The job with no other backbones in its space or points, nor what is searched for others."""
    search = job.search
    space = {
        key: tuple(_named(key, entry, names) for entry in entries)
        for key, entries in search.space.items()
    }
    while (fewer := _reachable(space)) != space:
        space = fewer
    points = [p for p in search.points if p.get(NAME, job.backbone.name) in names]
    search = search.model_copy(update={"space": space, "points": tuple(points), "rank": None})
    return job.model_copy(update={"search": search})


def _named(key: str, entry: Distribution, names: Sequence[str]) -> Distribution:
    if key != NAME:
        return entry
    values = tuple(value for value in entry.values if value in names)
    return entry.model_copy(update={entry.kind: values})


def _reachable(space: Space) -> Space:
    """The distributions whose conditions can hold, with the values alone that make them hold."""
    listed = {
        key: [value for entry in entries for value in entry.values]
        for key, entries in space.items()
        if all(entry.kind in ("choice", "grid") for entry in entries)
    }

    def fitting(entry: Distribution) -> Distribution | None:
        when = {}
        for key, wanted in entry.when.items():
            several = wanted if isinstance(wanted, list | tuple) else [wanted]
            when[key] = [value for value in several if value in listed.get(key, several)]
            if not when[key]:
                return None
        return entry.model_copy(update={"when": when})

    found = {key: tuple(filter(None, map(fitting, entries))) for key, entries in space.items()}
    return {key: entries for key, entries in found.items() if entries}


def _scores(
    job: JobConfig, images: Images, beside: Beside, num_images: int
) -> tuple[dict[str, "Scores"], dict[str, TlrunnerError]]:
    """The scores of each backbone, and why others have none: those fail as their trials would.

    Raises:
        TlrunnerError: none has any.
    """
    import ray  # which a dry run does without
    from ray.exceptions import RayError

    resources = job.resources
    task = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker or 0)(
        _score
    )
    most = job.search.max_concurrent_trials or math.inf
    waiting, running = searched_backbones(job), dict[Any, str]()
    scores: dict[str, Scores] = {}
    errors: dict[str, TlrunnerError] = {}
    while waiting or running:
        while waiting and len(running) < most:
            name = waiting.pop(0)
            first = planned_trials(restricted(job, [name]))[0].config
            running[task.remote(first, images, beside, num_images)] = name
        (done, *_), _ = ray.wait(list(running))
        name = running.pop(done)
        try:
            scores[name] = ray.get(done)
        except RayError as err:
            errors[name] = _in_a_line(getattr(err, "cause", None) or err)
            log.warning("%s has no scores: %s", name, errors[name], exc_info=err)
    if not scores:
        raise next(iter(errors.values()))
    return scores, errors


def _in_a_line(err: BaseException) -> TlrunnerError:
    if isinstance(err, TlrunnerError):
        return err
    last = (str(err).strip().splitlines() or [""])[-1]
    return ResourceError(f"{type(err).__name__}: {last}")


def _score(config: TrialConfig, images: Images, beside: Beside, num_images: int) -> "Scores":
    """Runs on a node, which imports all that it takes."""
    with importing():
        from tlrunner.train.scores import score_backbone

    return score_backbone(config, images, beside, num_images)


def _ranked(
    rank: RankConfig, scores: Mapping[str, "Scores"], errors: Mapping[str, TlrunnerError]
) -> list[dict[str, Any]]:
    """Best first; of equals the one that was named first."""
    names = sorted(scores, key=lambda name: -getattr(scores[name], rank.by))
    rows = [
        {"name": name, **asdict(scores[name]), "is_kept": place < rank.keep}
        for place, name in enumerate(names)
    ]
    return [
        *rows,
        *({"name": n, "error": redacted(str(e)), "is_kept": False} for n, e in errors.items()),
    ]


def _table(rank: RankConfig, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("backbone", "log_me", "h_score", "ridge_accuracy", "seconds", f"by {rank.by}")
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], "", "", "", "", "failed")
            continue
        table.add_row(
            row["name"],
            f"{row['log_me']:.4f}",
            f"{row['h_score']:.3f}",
            f"{row['ridge_accuracy']:.4f}",
            f"{row['seconds']:.1f}",
            "kept" if row["is_kept"] else "",
        )
    return table
