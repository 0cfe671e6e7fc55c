"""How much slower than a bare PyTorch loop does a trial train, and how much memory does it take?

    python jobs/bench_train.py --data DIR --set data.limit=400 --set data.image_size=160

Both train the same architecture from the same weights on the same batches, in turns, epoch by
epoch. The bare loop is what is left without tlrunner: forward, loss, backward, step. It is measured
twice: reading its batches from the same loader, and having them all in memory, decoded.
Prints medians of images/s as ratios to the bare loops, and the peak memory of a process of each.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from tlrunner.cli import run_job
from tlrunner.data.loader import Batch
from tlrunner.data.world import World
from tlrunner.jobconfig import TrainJob
from tlrunner.model.freeze import levels
from tlrunner.run import with_absolute_paths
from tlrunner.train.feed import Feed, open_data
from tlrunner.train.loop import Loop
from tlrunner.train.trial import build_accelerator, load_classifier

ROUNDS = 5


class Peers:
    """The same model twice: in a tlrunner loop, and in a bare one."""

    def __init__(self, job: TrainJob) -> None:
        config = job.trial()
        self.accelerator = build_accelerator(config)
        self.device = self.accelerator.device
        dataset, splits = open_data(config.data)
        classifier, preprocess = load_classifier(config, len(dataset.class_names))
        self.feed = Feed(
            config, dataset, splits, preprocess, World(), pin_memory=self.device.type == "cuda"
        )
        self.loop = Loop(self.accelerator, classifier, preprocess, config.optim, config.train)
        self.loop.enter_phase(levels(config.freeze, len(classifier.stages.names), 0))
        self.bare, _ = load_classifier(config, len(dataset.class_names))
        self.bare.to(self.device)
        trained = set(classifier.trainable_parameters())
        for name, parameter in self.bare.named_parameters():
            parameter.requires_grad_(name in trained)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.bare.parameters() if p.requires_grad], lr=config.optim.lr
        )
        self.dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[
            config.train.mixed_precision
        ]

    def ours(self) -> None:
        self.loop.train_epoch(self.feed.train(0), 0, self.feed.num_steps)

    def bare_from_loader(self) -> None:
        self._bare_epoch(self.feed.train(0))

    def bare_from_memory(self, batches: Iterable[Batch]) -> None:
        self._bare_epoch(batches)

    def _bare_epoch(self, batches: Iterable[Batch]) -> None:
        mean = torch.tensor(self.feed.preprocess.mean, device=self.device).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.feed.preprocess.std, device=self.device).view(1, 3, 1, 1) * 255
        nn.Module.train(self.bare)
        for batch in batches:
            images = batch.images_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            labels = batch.labels_B.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                logits = self.bare((images - mean) / std)
            F.cross_entropy(logits.float(), labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def bench(job: TrainJob, job_name: str, out: Console, dry_run: bool) -> int:
    job = with_absolute_paths(job)
    if dry_run:
        out.print(f"{ROUNDS} rounds of one epoch of each peer")
        return 0
    peers = Peers(job)
    in_memory = list(peers.feed.train(0))
    rivals: dict[str, Callable[[], None]] = {
        "tlrunner": peers.ours,
        "bare loop, same loader": peers.bare_from_loader,
        "bare loop, batches in memory": lambda: peers.bare_from_memory(in_memory),
    }
    speeds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(ROUNDS + 1):
        for name, epoch in rivals.items():
            speeds[name].append(len(peers.feed.splits.train) / _seconds(epoch))
    for name, measured in speeds.items():
        warm = measured[1:]
        ratios = [a / b for a, b in zip(speeds["tlrunner"][1:], warm, strict=True)]
        out.print(
            f"{name:30} {statistics.median(warm):8.1f} images/s, tlrunner's speed is "
            f"{statistics.median(ratios):.3f} of it ({min(ratios):.3f} to {max(ratios):.3f})",
            highlight=False,
        )
    for name in ("ours", "bare_from_loader"):
        out.print(f"peak memory, {name}: {_peak_memory(job, name) / 2**20:.0f} MiB")
    return 0


def _seconds(epoch: Callable[[], None]) -> float:
    started = time.perf_counter()
    epoch()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _peak_memory(job: TrainJob, name: str) -> int:
    """Peak resident bytes of a fresh process that trains one epoch (and on a GPU, there)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_train_alone, (job.model_dump(), name))


def _train_alone(tree: dict[str, object], name: str) -> int:
    peers = Peers(TrainJob.model_validate(tree))
    getattr(peers, name)()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(run_job(Path(__file__).stem, TrainJob, bench))
