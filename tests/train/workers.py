"""Several workers of a trial without a cluster: processes that find each other by a file."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.data.world import World
from tlrunner.files import write_json
from tlrunner.train import loop as loop_module
from tlrunner.train.between import Due
from tlrunner.train.images import Images
from tlrunner.train.keeper import Keeper
from tlrunner.train.loop import Loop
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import TrialDir


def run_in_workers(
    size: int, configs: Sequence[TrialConfig], images: Images, root: Path
) -> list[list[dict[str, Any]]]:
    """The epoch reports of each config, trained one after another by `size` workers.

    Directories of the trials are `root/SIZE/NUMBER`.
    """
    configs = [with_values(c, {"resources.workers_per_trial": size}) for c in configs]
    directory = root / str(size)
    directory.mkdir()
    multiprocessing.spawn(_worker, (size, configs, images, directory), nprocs=size)
    told = [json.loads((directory / f"reports-{rank}.json").read_text()) for rank in range(size)]
    for others in told[1:]:
        assert [figures(t) for t in others] == [figures(t) for t in told[0]], "ranks disagree"
    return told[0]


def run_in_parts(
    parts: Sequence[tuple[int, int | None]], config: TrialConfig, images: Images, directory: Path
) -> None:
    """Train with so many workers until so many steps are done, and go on with the next number.

    There is a checkpoint behind each step. `None`: until the end.
    """
    for number, (size, num_steps) in enumerate(parts):
        part = with_values(config, {"resources.workers_per_trial": size})
        rendezvous = directory.with_name(f"rendezvous-{number}")
        multiprocessing.spawn(
            _part, (size, num_steps, part, images, directory, rendezvous), nprocs=size
        )


def figures(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not depend on who measured it."""
    times = ("seconds", "images_per_second", "latency_seconds", "fill_seconds", "saved_seconds")
    own = (*times, "checkpoint", "reused_bytes")
    return [{key: r[key] for key in r if key not in own} for r in reports]


def _worker(
    rank: int, size: int, configs: list[TrialConfig], images: Images, directory: Path
) -> None:
    _join(rank, size, directory / "rendezvous")
    told = []
    for number, config in enumerate(configs):
        reports: list[dict[str, Any]] = []
        run_trial(
            config,
            lambda report, reports=reports: reports.append(asdict(report)),
            trial_dir=directory / str(number),
            images=images,
            world=World(rank, size),
        )
        told.append(reports)
    write_json(directory / f"reports-{rank}.json", told)
    if size > 1:
        torch.distributed.destroy_process_group()


def _join(rank: int, size: int, rendezvous: Path) -> None:
    if size > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        torch.distributed.init_process_group(
            "gloo", f"file://{rendezvous}", rank=rank, world_size=size
        )


class _DeadError(Exception):
    """What ends a part."""


def _part(
    rank: int,
    size: int,
    num_steps: int | None,
    config: TrialConfig,
    images: Images,
    directory: Path,
    rendezvous: Path,
) -> None:
    resume_from = TrialDir(directory).to_go_on_from()  # before the first worker writes
    _join(rank, size, rendezvous)
    loop_module.LOOK_STEPS = 1
    Keeper.due = lambda keeper: Due.CHECKPOINT  # type: ignore[method-assign]
    step, count = Loop._step, 0

    def stepping(*arguments: Any) -> torch.Tensor:
        nonlocal count
        if count == num_steps:
            raise _DeadError
        count += 1
        return step(*arguments)

    Loop._step = stepping  # type: ignore[method-assign]
    with suppress(_DeadError):
        run_trial(
            config,
            lambda report: None,
            trial_dir=directory,
            images=images,
            world=World(rank, size),
            resume_from=resume_from,
        )
    if size > 1:
        torch.distributed.destroy_process_group()
