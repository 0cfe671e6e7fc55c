"""One trial, from config to result: read it top to bottom.

`run_trial(config)` needs neither Ray nor a cluster; the search calls the same function in each of
its workers.
"""

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tlrunner.config import Preprocess, TrialConfig
from tlrunner.data.fetch import fetch
from tlrunner.data.world import World
from tlrunner.errors import ConfigError, ResourceError
from tlrunner.model.classifier import Classifier, build_classifier
from tlrunner.model.freeze import check, levels, phase_starts
from tlrunner.train.checkpoint import write_checkpoint
from tlrunner.train.feed import Feed, Images, open_data, use_decoded_cache
from tlrunner.train.loop import DivergedError, Loop
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import EpochReport, State, TrialDir
from tlrunner.uris import is_weights_file


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended, and its best epoch by val_acc (None if it diverged in its first)."""

    state: State
    best: EpochReport | None
    detail: str = ""


def run_trial(
    config: TrialConfig,
    report: Callable[[EpochReport], object] = print,
    *,
    trial_dir: Place | Path | None = None,
    images: Images | None = None,
) -> TrialResult:
    """Fine-tune one configuration.

    Args:
        report: called after each epoch, once what it says is on the disk.
        trial_dir: where metrics and checkpoints go. None: nothing is kept.
        images: those of `config.data`, if the caller prepared them already.

    Raises:
        ConfigError, DataError, ResourceError, StorageError: see each layer.
    """
    started = time.monotonic()
    record = TrialDir(trial_dir) if trial_dir else None
    if record:
        record.begin(config)

    # -- Data and model --------------------------------------------------------------------------
    accelerator = build_accelerator(config)
    dataset, splits = open_data(config.data, images)
    classifier, preprocess = load_classifier(config, len(dataset.class_names))
    world = World(accelerator.process_index, accelerator.num_processes)
    on_gpu = accelerator.device.type == "cuda"
    use_decoded_cache(config.data, dataset, splits, preprocess)
    feed = Feed(config, dataset, splits, preprocess, world, pin_memory=on_gpu)

    # -- Freezing --------------------------------------------------------------------------------
    num_stages = len(classifier.stages.names)
    check(config.freeze, num_stages, config.backbone.name)
    phases = phase_starts(config.freeze, num_stages, config.train.epochs)
    loop = Loop(accelerator, classifier, preprocess, config.optim, config.train)

    # -- Epochs ----------------------------------------------------------------------------------
    best: EpochReport | None = None
    for epoch in range(config.train.epochs):
        if epoch in phases:
            loop.enter_phase(levels(config.freeze, num_stages, epoch))
        try:
            finished = _run_epoch(loop, feed, epoch, started)
        except DivergedError as err:
            if record:
                record.end("diverged", str(err))
            return TrialResult("diverged", best, str(err))
        if best is None or finished.val_acc > best.val_acc:
            best = finished = _keep(record, loop, feed, finished)
        if record:
            record.append(finished)
            if finished is best:  # recorded as such, so the one it replaces can go
                record.keep_only(record.best_checkpoint(best))
        report(finished)
    return TrialResult("completed", best)


def build_accelerator(config: TrialConfig) -> Accelerator:
    """Accelerate for this process, on the device and threads that the config grants.

    Raises:
        ResourceError: a GPU is asked for and there is none.
        ConfigError: a precision that the device cannot compute in.
    """
    gpus = config.resources.gpus_per_worker
    if gpus and not torch.cuda.is_available():
        raise ResourceError(
            f"resources.gpus_per_worker is {gpus}, this machine has no usable GPU",
            "0, or leave it out",
        )
    on_cpu = gpus == 0 or not torch.cuda.is_available()
    if on_cpu and config.train.mixed_precision == "fp16":
        raise ConfigError("train.mixed_precision is fp16, which needs a GPU", "no, bf16 (on CPUs)")
    torch.set_num_threads(config.resources.cpus_per_worker)
    if on_cpu:
        keep_freed_memory()
    # A reused worker may have run a trial in another precision; Accelerate remembers the first.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision, cpu=on_cpu)
    if accelerator.num_processes > 1:
        raise ResourceError(
            f"a trial was started in {accelerator.num_processes} processes",
            "one process a trial",
            "start it with python, not with a launcher",
        )
    return accelerator


def keep_freed_memory() -> None:
    """Have glibc, where that is the C library, keep large freed blocks for the next step.

    By default it returns activations to the system after every step and gets them again as pages
    to be zeroed one by one: a fourth of the CPU time of an EfficientNet at 160 px. Kept, a step is
    1.35 to 1.5 times faster, and peak memory is the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mmap_threshold, trim_threshold = -3, -1  # their numbers in malloc.h
        for parameter in (mmap_threshold, trim_threshold):
            mallopt(parameter, 1 << 30)


def load_classifier(config: TrialConfig, num_classes: int) -> tuple[Classifier, Preprocess]:
    """The backbone with its weights and a fresh head, in the memory layout of the config.

    Seeds torch's generator: whatever is not pretrained is the same whenever a config is loaded, for
    its training and for its export. Dropout goes on from there.
    """
    torch.manual_seed(config.train.seed)
    weights = config.backbone.weights
    file = (
        fetch(weights, config.data.cache_dir, config.backbone.weights_sha256)
        if is_weights_file(weights)
        else None
    )
    classifier, preprocess = build_classifier(
        config.backbone, config.head, num_classes, config.data.image_size, file
    )
    if config.train.channels_last:
        classifier.to(memory_format=torch.channels_last)
    if config.train.compile:
        classifier.compile()
    return classifier, preprocess


def _run_epoch(loop: Loop, feed: Feed, epoch: int, started: float) -> EpochReport:
    epoch_started = time.monotonic()
    trained = loop.train_epoch(feed.train(epoch), epoch, feed.num_steps)
    train_seconds = time.monotonic() - epoch_started
    validated = loop.evaluate(feed.val())
    if not math.isfinite(validated.loss):
        raise DivergedError(feed.num_steps * (epoch + 1))
    parameters = list(loop.classifier.parameters())
    return EpochReport(
        epoch=epoch + 1,
        val_acc=validated.acc,
        val_loss=validated.loss,
        train_loss=trained.loss,
        images_per_second=trained.seen / train_seconds,
        trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        total_params=sum(p.numel() for p in parameters),
        seconds=time.monotonic() - started,
        checkpoint=None,
    )


def _keep(record: TrialDir | None, loop: Loop, feed: Feed, report: EpochReport) -> EpochReport:
    """Commit the checkpoint of a new best epoch."""
    if record is None:
        return report
    state = {
        "epoch": report.epoch,
        "val_acc": report.val_acc,
        "val_loss": report.val_loss,
        "data_sha256": feed.dataset.manifest.sha256,
    }
    step = feed.num_steps * report.epoch
    directory = write_checkpoint(record.checkpoints, step, loop.trained_state(), state)
    record.keep(directory)
    return replace(report, checkpoint=directory.name)
