"""How fast does a trial train against a bare PyTorch loop, and how much memory does it take?

    python jobs/bench_train.py --data DIR --set data.limit=150 --set data.image_size=160

Both train the same architecture from the same weights on the same batches, each in a process of its
own, in turns, epoch by epoch. The bare loop is what is left without tlrunner: forward, loss,
backward, step. It is measured twice: reading its batches from the same loader, and having them all
in memory, decoded. Prints medians of images/s, ratios to the bare loops, and peak memory.

Measured on 2 CPU cores, EfficientNet-Lite0, 160 px, `freeze.strategy=full`, one thread, 9 rounds:
1.38 times the speed of the bare loop with the same loader (1.18 to 1.77), 1.23 times that of the
one in memory (1.07 to 1.34), at 1.03 times its peak memory. The gain is `keep_freed_memory`.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from tlrunner.cli import run_job
from tlrunner.data.world import World
from tlrunner.jobconfig import TrainJob
from tlrunner.model.freeze import levels
from tlrunner.run import with_absolute_paths
from tlrunner.train.device import build_accelerator
from tlrunner.train.feed import Feed, open_data
from tlrunner.train.loaded import load_classifier
from tlrunner.train.loop import Loop

ROUNDS = 9


class Trial:
    """The model in a tlrunner loop."""

    def __init__(self, job: TrainJob) -> None:
        config = job.trial()
        accelerator = build_accelerator(config)
        dataset, splits = open_data(config.data)
        classifier, preprocess = load_classifier(config, len(dataset.class_names))
        on_gpu = accelerator.device.type == "cuda"
        self.feed = Feed(config, dataset, splits, preprocess, World(), pin_memory=on_gpu)
        self.loop = Loop(accelerator, classifier, preprocess, config.optim, config.train)
        self.loop.enter_phase(levels(config.freeze, len(classifier.stages.names), 0))

    def epoch(self) -> None:
        self.loop.train_epoch(self.feed.train(0), 0, self.feed.num_steps)


class Bare:
    """The same model in the shortest loop there is."""

    def __init__(self, job: TrainJob, in_memory: bool) -> None:
        config = job.trial()
        torch.set_num_threads(config.resources.cpus_per_worker)
        on_gpu = torch.cuda.is_available() and config.resources.gpus_per_worker != 0
        self.device = torch.device("cuda" if on_gpu else "cpu")
        dataset, splits = open_data(config.data)
        self.model, self.preprocess = load_classifier(config, len(dataset.class_names))
        self.model.set_levels(levels(config.freeze, len(self.model.stages.names), 0))
        self.model.to(self.device)
        self.feed = Feed(config, dataset, splits, self.preprocess, World(), pin_memory=on_gpu)
        self.batches = list(self.feed.train(0)) if in_memory else None
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.optim.lr)
        precisions = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
        self.dtype = precisions[config.train.mixed_precision]

    def epoch(self) -> None:
        mean = torch.tensor(self.preprocess.mean, device=self.device).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.preprocess.std, device=self.device).view(1, 3, 1, 1) * 255
        nn.Module.train(self.model)
        for batch in self.batches or self.feed.train(0):
            images = batch.images_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            labels = batch.labels_B.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                logits = self.model((images - mean) / std)
            F.cross_entropy(logits.float(), labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


PEERS = {
    "tlrunner": Trial,
    "bare loop, same loader": lambda job: Bare(job, in_memory=False),
    "bare loop, batches in memory": lambda job: Bare(job, in_memory=True),
}
_peer: Any = None  # of a peer's process


def bench(job: TrainJob, job_name: str, out: Console, dry_run: bool) -> int:
    if dry_run:
        out.print(f"{ROUNDS} rounds of one epoch of each of: {', '.join(PEERS)}")
        return 0
    tree = with_absolute_paths(job).model_dump()
    spawn = multiprocessing.get_context("spawn")
    pools = {name: spawn.Pool(1, _start, (name, tree)) for name in PEERS}
    speeds: dict[str, list[float]] = {name: [] for name in PEERS}
    for _ in range(ROUNDS + 1):
        for name, pool in pools.items():
            speeds[name].append(pool.apply(_images_per_second))
    for name, pool in pools.items():
        warm = speeds[name][1:]
        ratios = [a / b for a, b in zip(speeds["tlrunner"][1:], warm, strict=True)]
        out.print(
            f"{name:30} {statistics.median(warm):8.1f} images/s; tlrunner has "
            f"{statistics.median(ratios):.3f} of its speed ({min(ratios):.3f} to "
            f"{max(ratios):.3f}); peak memory {pool.apply(_peak_bytes) / 2**20:.0f} MiB",
            highlight=False,
        )
        pool.terminate()
    return 0


def _start(name: str, tree: dict[str, Any]) -> None:
    global _peer
    _peer = PEERS[name](TrainJob.model_validate(tree))


def _images_per_second() -> float:
    started = time.perf_counter()
    _peer.epoch()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return len(_peer.feed.splits.train) / (time.perf_counter() - started)


def _peak_bytes() -> int:
    """Of the GPU where there is one, else of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(run_job(Path(__file__).stem, TrainJob, bench))
