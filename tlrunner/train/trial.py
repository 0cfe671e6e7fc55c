"""One trial, from config to result: read it top to bottom.

`run_trial(config)` needs neither Ray nor a cluster; the search calls the same function in each of
its workers.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.data.dataset import Dataset
from tlrunner.data.order import Splits
from tlrunner.data.world import World
from tlrunner.errors import ResourceError
from tlrunner.model.freeze import Level, check, levels, phase_starts
from tlrunner.train.attempts import note_attempt
from tlrunner.train.beside import Beside
from tlrunner.train.between import HaltedError
from tlrunner.train.demand import demand_of
from tlrunner.train.device import build_accelerator
from tlrunner.train.feed import Feed, open_data, use_decoded_cache
from tlrunner.train.images import Images
from tlrunner.train.keeper import Keeper
from tlrunner.train.loaded import load_backbone, new_classifier
from tlrunner.train.loop import DivergedError, Loop
from tlrunner.train.metrics import NOT_BEGUN, Begun
from tlrunner.train.place import Place
from tlrunner.train.probe import check_memory, latency_seconds
from tlrunner.train.resume import NOT_STARTED, Resumed, load_training_state, read_resumable
from tlrunner.train.reuse import Reuse
from tlrunner.train.swept import Member, sweep_of
from tlrunner.train.trial_dir import EpochReport, State, TrialDir

SINGLE = World()


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended, and its best epoch by val_acc (None if it diverged in its first)."""

    state: State
    best: EpochReport | None
    detail: str = ""


class Built(NamedTuple):
    """What trains, what it is fed with, the model's latency in seconds, and where it all is from.

    `origin`: hashes of the images and of the pretrained weights, None where there are none.
    """

    loop: Loop
    reuse: Reuse
    latency: float
    origin: Mapping[str, str | None]


def run_trial(
    config: TrialConfig,
    report: Callable[[EpochReport], object] = print,
    *,
    trial_dir: Place | Path | None = None,
    images: Images | None = None,
    world: World = SINGLE,
    resume_from: Place | None = None,
    num_last: int = 0,
    notes: tuple[str, ...] = (),
    beside: Beside | None = None,
    is_halted: Callable[[], bool] = lambda: False,
) -> TrialResult:
    """Fine-tune one configuration.

    A trial whose GPU is too small is started once more, with micro-batches half the size.

    Args:
        report: called after each epoch, once what it says is on the disk.
        trial_dir: where metrics and checkpoints go. None: nothing is kept.
        images: those of `config.data`, if the caller prepared them already.
        world: this worker among those of the trial. All of them call this, and report the same
            figures; the first one writes.
        resume_from: a checkpoint with a training state, of this trial or of another, to go on from.
        num_last: latest epochs whose checkpoints are kept for that, beside that of the best one.
        notes: what a reader of the trial's figures should know.
        beside: the other trials of its search, and what this process keeps for them.
        is_halted: asked between steps; once true, the trial leaves a checkpoint and ends as
            interrupted.

    Raises:
        ConfigError, DataError, ResourceError, StorageError: see each layer.
        torch.OutOfMemoryError: the trial has several workers, all of which have to start once more.
    """
    beside = beside or Beside([config])
    attempt = partial(
        _run,
        once_each(report),
        trial_dir,
        images,
        world,
        resume_from,
        num_last,
        beside,
        is_halted,
    )
    try:
        return attempt(notes, config)
    except torch.OutOfMemoryError:
        if world.size > 1:
            raise
    # Not before here: the exception held on to everything in the frames that it came through.
    gc.collect()
    torch.cuda.empty_cache()
    smaller, note = with_smaller_micro_batches(config)
    try:
        return attempt((*notes, note), smaller)
    except torch.OutOfMemoryError as err:
        raise out_of_memory(smaller) from err


def once_each(report: Callable[[EpochReport], object]) -> Callable[[EpochReport], None]:
    """Tell each epoch once, however often a trial is started."""
    told = 0

    def report_once(finished: EpochReport) -> None:
        nonlocal told
        if finished.epoch > told:
            told = finished.epoch
            report(finished)

    return report_once


def with_smaller_micro_batches(config: TrialConfig) -> tuple[TrialConfig, str]:
    """The same trial in half the memory, and the note that says so.

    Raises:
        ResourceError: the micro-batches are of one image already.
    """
    num_parts = 2 * config.train.gradient_accumulation_steps
    if num_parts * config.resources.workers_per_trial > config.train.batch_size:
        raise out_of_memory(config)
    note = f"out of GPU memory: each batch is computed in {num_parts} micro-batches"
    return with_values(config, {"train.gradient_accumulation_steps": num_parts}), note


def out_of_memory(config: TrialConfig) -> ResourceError:
    return ResourceError(
        f"out of GPU memory with train.batch_size {config.train.batch_size} in "
        f"{config.train.gradient_accumulation_steps} micro-batches and resources.gpus_per_worker "
        f"{config.resources.gpus_per_worker}",
        "",
        "give it more of a GPU, more workers, more gradient_accumulation_steps, or smaller images",
    )


def _run(
    report: Callable[[EpochReport], object],
    trial_dir: Place | Path | None,
    images: Images | None,
    world: World,
    resume_from: Place | None,
    num_last: int,
    beside: Beside,
    is_halted: Callable[[], bool],
    notes: tuple[str, ...],
    config: TrialConfig,
) -> TrialResult:
    started = time.monotonic()
    resumed = read_resumable(resume_from) if resume_from else None
    stood = resumed.stood if resumed else NOT_STARTED
    record = TrialDir(trial_dir) if trial_dir and world.rank == 0 else None
    if record:
        record.begin(config, notes, after_epoch=stood.epoch, after_step=stood.step)

    # -- Data, model, freezing, reuse --------------------------------------------------------------
    loop, reuse, latency, origin = build(config, images, world, beside)
    num_stages = len(loop.classifier.stages.names)
    if record:
        loop.watchdog.tell = partial(note_attempt, record.place, "stalled", stood.step)
    phases = phase_starts(config.freeze, num_stages, config.train.epochs)
    if loop.accelerator.device.type == "cuda":
        sizes = reuse.feed.micro_batch_size, reuse.feed.preprocess.image_size
        check_memory(loop, levels(config.freeze, num_stages, phases[-1]), *sizes)
    if resumed:
        _go_on(config, loop, reuse, resumed, origin)
    sweep = None if resumed or num_last else sweep_of(config, loop, reuse, beside)
    keeper = Keeper(
        record,
        loop,
        reuse,
        num_last,
        origin=origin,
        goes_on=not sweep,
        elapsed=lambda: stood.seconds + time.monotonic() - started,
        is_halted=is_halted,
    )

    # -- Epochs ------------------------------------------------------------------------------------
    begun = stood.begun
    for epoch in range(stood.epoch, config.train.epochs):
        keeper.epoch = epoch
        if epoch in phases and not begun.num_batches:
            _enter_phase(loop, reuse, levels(config.freeze, num_stages, epoch))
        try:
            if sweep and is_halted():
                keeper.halt()
            finished = _run_epoch(loop, reuse, sweep or keeper, epoch, begun)
        except HaltedError:
            return TrialResult("interrupted", keeper.best)
        except DivergedError as err:
            keeper.end("diverged", str(err))
            return TrialResult("diverged", keeper.best, str(err))
        begun = NOT_BEGUN
        report(keeper.keep(replace(finished, latency_seconds=latency, seconds=keeper.elapsed())))
    return TrialResult("completed", keeper.best)


def _go_on(
    config: TrialConfig,
    loop: Loop,
    reuse: Reuse,
    resumed: Resumed,
    origin: Mapping[str, str | None],
) -> None:
    """Put what trains where a checkpoint left it, in the phase that it was broken off in."""
    resumed.check_origin(origin, config.backbone.name)
    stood = resumed.stood
    epoch = stood.epoch if stood.begun.num_batches else stood.epoch - 1
    num_stages = len(loop.classifier.stages.names)
    _enter_phase(loop, reuse, levels(config.freeze, num_stages, epoch))
    load_training_state(loop, resumed)


def build(config: TrialConfig, images: Images | None, world: World, beside: Beside) -> Built:
    """What a trial trains, and what it trains with."""
    accelerator = build_accelerator(config)
    warm, on_gpu = beside.warm, accelerator.device.type == "cuda"
    loaded = load_backbone(config, warm)
    preprocess = loaded.backbone.preprocess
    check(config.freeze, len(loaded.backbone.stages.names), config.backbone.name)

    def opened() -> tuple[Dataset, Splits]:
        dataset, splits = open_data(config.data, images)
        use_decoded_cache(config.data, dataset, splits, preprocess)
        return dataset, splits

    dataset, splits = warm.once("data", repr([config.data, images, preprocess]), opened)
    classifier = new_classifier(config, loaded, len(dataset.class_names))
    if world.rank:  # the same weights, and dropout of its own
        torch.manual_seed(config.train.seed + world.rank)
    feed = Feed(config, dataset, splits, preprocess, world, pin_memory=on_gpu)
    feed.check_shares()
    loop = Loop(accelerator, classifier, preprocess, config.optim, config.train)
    reuse = Reuse(feed, loop, demand_of(beside, config), warm, loaded.warm)
    latency = loaded.warm.once(
        "latency",
        repr([config.head, accelerator.device, config.train.mixed_precision]),
        lambda: latency_seconds(loop, preprocess.image_size),
    )
    images_sha256, weights_sha256 = dataset.manifest.sha256, loaded.weights_sha256
    origin = {"data_sha256": images_sha256, "weights_sha256": weights_sha256}
    return Built(loop, reuse, latency, origin)


def _enter_phase(loop: Loop, reuse: Reuse, of_stages: tuple[Level, ...]) -> None:
    loop.enter_phase(of_stages, reuse.enter(of_stages))


def _run_epoch(
    loop: Loop, reuse: Reuse, how: Member | Keeper, epoch: int, begun: Begun
) -> EpochReport:
    """The figures of an epoch counted from 0; what is known of the trial is added by the caller.

    `how`: among others that are trained together, or alone with checkpoints between.
    """
    started = time.monotonic()
    num_steps = reuse.feed.num_steps
    if isinstance(how, Member):
        trained, validated, train_seconds = how.epoch(epoch, reuse)
    else:
        batches = reuse.train(epoch, first_batch=begun.num_batches)
        trained = loop.train_epoch(batches, epoch, num_steps, begun, how)
        train_seconds = time.monotonic() - started
        validated = loop.evaluate(reuse.val())
    if not math.isfinite(validated.loss):
        raise DivergedError(num_steps * (epoch + 1))
    parameters = list(loop.classifier.parameters())
    return EpochReport(
        epoch=epoch + 1,
        val_acc=validated.acc,
        val_loss=validated.loss,
        train_loss=trained.loss,
        images_per_second=(trained.seen - begun.num_images) / train_seconds,
        trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        total_params=sum(p.numel() for p in parameters),
        latency_seconds=0.0,
        seconds=0.0,
        checkpoint=None,
        fill_seconds=reuse.fill_seconds,
        saved_seconds=reuse.saved_seconds,
        reused_bytes=reuse.num_bytes,
    )
