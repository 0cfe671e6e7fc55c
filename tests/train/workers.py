"""Several workers of a trial without a cluster: processes that find each other by a file."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.data.world import World
from tlrunner.files import read_json, write_json
from tlrunner.train.images import Images
from tlrunner.train.trial import run_trial


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
    told = [read_json(directory / f"reports-{rank}.json") for rank in range(size)]
    for others in told[1:]:
        assert [figures(t) for t in others] == [figures(t) for t in told[0]], "ranks disagree"
    return told[0]


def figures(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not depend on who measured it."""
    times = ("seconds", "images_per_second", "latency_seconds", "fill_seconds", "saved_seconds")
    own = (*times, "checkpoint", "reused_bytes")
    return [{key: r[key] for key in r if key not in own} for r in reports]


def _worker(
    rank: int, size: int, configs: list[TrialConfig], images: Images, directory: Path
) -> None:
    if size > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        where = f"file://{directory / 'rendezvous'}"
        torch.distributed.init_process_group("gloo", where, rank=rank, world_size=size)
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
