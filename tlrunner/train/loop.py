"""Batches -> sums: one epoch of training, one pass of evaluation.

A global batch is one optimizer step, whatever number of micro-batches it is computed in: each
micro-batch adds its summed loss over the size of the global batch.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn import functional as F

from tlrunner.config import OptimConfig, Preprocess, TrainConfig
from tlrunner.data.loader import Batch
from tlrunner.data.normalise import level_table, normalised
from tlrunner.model.classifier import Classifier
from tlrunner.model.freeze import Level
from tlrunner.model.split import Split
from tlrunner.train.between import Between, Due
from tlrunner.train.ema import Ema
from tlrunner.train.metrics import NOT_BEGUN, Begun, Metrics, Sums
from tlrunner.train.optim import (
    build_optimizer,
    carry_state,
    parameter_groups,
    schedule_factor,
    set_learning_rate,
)
from tlrunner.train.sweep import HeadState
from tlrunner.train.watchdog import Watchdog

LOOK_STEPS = 16  # at most between two looks at the losses, each of which waits for the device
LOOK_SECONDS = 1.0  # likewise, of steps that take long


class DivergedError(Exception):
    """The loss of `step`, counted from 1 over the whole trial, was not finite."""

    def __init__(self, step: int) -> None:
        super().__init__(f"non-finite loss at step {step}")
        self.step = step


class Loop:
    """A model with what it takes to train and to evaluate it, phase by phase.

    Each worker of a trial has one; figures and weights are the same in all of them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        classifier: Classifier,
        preprocess: Preprocess,
        optim: OptimConfig,
        train: TrainConfig,
    ) -> None:
        self.accelerator = accelerator
        self.classifier = classifier
        self.model_input = ModelInput(preprocess, accelerator.device)
        self.optim = optim
        self.train = train
        self.is_shared = accelerator.num_processes > 1  # among several workers
        if self.is_shared and accelerator.device.type == "cuda":
            classifier.synchronise_norms()
        self.model = classifier if self.is_shared else accelerator.prepare_model(classifier)
        self.optimizer: AcceleratedOptimizer | None = None
        self.ema: Ema | None = None
        self.has_moments = True  # those of the weights that it has, to go on from
        self.look_steps = 1  # until it is known what a step takes
        self.watchdog = Watchdog(train.stall_seconds)

    @property
    def _is_first(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def has_statistics_apart(self) -> bool:
        """Whether workers see BatchNorm statistics of their own, which differ, in this phase."""
        on_gpu = self.accelerator.device.type == "cuda"
        return self.is_shared and not on_gpu and self.classifier.num_moving_norms > 0

    def enter_phase(self, levels: tuple[Level, ...], split: Split | None = None) -> None:
        """From now on the stages train as `levels` say; what trained before keeps its moments.

        `split`: of the backbone, for batches that hold values at its cut.
        """
        self.classifier.set_levels(levels)
        self.classifier.split = split
        if self.is_shared:
            # DistributedDataParallel looks at what trains when it wraps, and never again.
            inner = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.accelerator.free_memory()
            self.model = self.accelerator.prepare_model(inner)
            # What moves in buffers is brought together once an epoch, not in every step.
            self.model.broadcast_buffers = False
        optimizer = build_optimizer(parameter_groups(self.classifier, self.optim), self.optim)
        former, self.optimizer = self.optimizer, self.accelerator.prepare_optimizer(optimizer)
        if former:  # carried once prepared: preparing moves Adam's step counts to the GPU
            carry_state(former.optimizer, optimizer)
        if self.train.ema_decay is not None:
            self.ema = self.ema or Ema(self.train.ema_decay)
            self.ema.follow(self.classifier.trainable_state())

    def train_epoch(
        self,
        batches: Iterable[Batch],
        epoch: int,
        num_batches: int,
        begun: Begun = NOT_BEGUN,
        between: Between | None = None,
    ) -> Metrics:
        """Train on every batch once; `epoch` counts from 0.

        Args:
            batches: those that are left of `num_batches`.
            begun: what is behind them.

        Raises:
            DivergedError: a loss was not finite.
            HaltedError: the trial was asked to halt.
        """
        assert self.optimizer is not None, "no phase entered"
        self.model.train()
        sums = Sums(self.accelerator.device, begun.totals if self._is_first else ())
        losses: list[Tensor] = []
        looked_at = time.monotonic()
        for index, batch in enumerate(self.watchdog.over(batches), start=begun.num_batches):
            moment = epoch + (index + 0.5) / num_batches
            set_learning_rate(
                self.optimizer, schedule_factor(self.optim, moment, self.train.epochs)
            )
            losses.append(self._step(self.optimizer, batch, sums))
            is_last = index + 1 == num_batches
            if len(losses) >= self.look_steps or is_last:
                first_step = epoch * num_batches + index + 2 - len(losses)
                due = self._look(losses, first_step, between, looked_at)
                losses.clear()
                looked_at = time.monotonic()
                # The epoch's own checkpoint is near, but for the evaluation before it.
                if between and due > (Due.CHECKPOINT if is_last else Due.NOTHING):
                    self._average_statistics()  # which comes to the same when done once more
                    between(due, index + 1, self._over_workers(sums.totals).tolist())
        self._average_statistics()
        return sums.metrics(self._over_workers)

    def _look(
        self, losses: list[Tensor], first_step: int, between: Between | None, looked_at: float
    ) -> Due:
        """Check the latest losses, and agree with all workers on what is due and when to look next.

        Raises:
            DivergedError: a loss was not finite.
        """
        due, steps = Due.NOTHING, 0
        if self._is_first:
            per_step = (time.monotonic() - looked_at) / len(losses)
            steps = max(1, min(LOOK_STEPS, int(LOOK_SECONDS / max(per_step, 1e-9))))
            due = between.due() if between else due
        told = torch.tensor([due, steps], dtype=losses[0].dtype, device=losses[0].device)
        looked = self._over_workers(torch.cat([torch.stack(losses), told]))
        check_finite(looked[:-2], first_step)
        due, self.look_steps = Due(int(looked[-2])), int(looked[-1])
        return due

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Metrics:
        """Accuracy and mean cross entropy (without smoothing), of the averaged weights if any."""
        self.classifier.eval()
        sums = Sums(self.accelerator.device)
        with self.ema.swapped_in() if self.ema else nullcontext():
            for batch in self.watchdog.over(batches):
                logits_BK = self._logits(self.classifier, batch)
                loss, correct = mixed_loss(logits_BK, batch, label_smoothing=0.0)
                sums.add(correct, loss, int(batch.mask_B.sum()))
        return sums.metrics(self._over_workers)

    def trained_state(self) -> dict[str, Tensor]:
        """Copies of all tensors that training changed, averaged if the config asks for it."""
        with self.ema.swapped_in() if self.ema else nullcontext():
            state = self.classifier.trainable_state()
            return {name: tensor.detach().clone() for name, tensor in state.items()}

    def _over_workers(self, totals: Tensor) -> Tensor:
        """The sum over all workers, which each of them gets."""
        total: Tensor = self.accelerator.reduce(totals, reduction="sum")
        return total

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """Give all workers the same buffers: the mean over workers of what each of them saw."""
        if not self.is_shared:
            return
        state = self.classifier.trainable_state()
        buffers = [name for name, _ in self.classifier.named_buffers() if name in state]
        for tensors in (state, self.ema.average if self.ema else {}):
            for name in buffers:
                if name in tensors and tensors[name].is_floating_point():
                    mean = self.accelerator.reduce(tensors[name], reduction="mean")
                    tensors[name].copy_(mean)

    def _step(self, optimizer: AcceleratedOptimizer, batch: Batch, sums: Sums) -> Tensor:
        """One optimizer step; gives the summed loss of this rank's images, still on the device."""
        parts = list(micro_batches(batch, self.train.gradient_accumulation_steps))
        total = torch.zeros((), device=self.accelerator.device)
        for index, part in enumerate(parts):
            is_last = index + 1 == len(parts)
            # Gradients of several workers are exchanged once, with the last micro-batch.
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                logits_BK = self._logits(self.model, part)
                loss, correct = mixed_loss(logits_BK, part, self.train.label_smoothing)
                share = self.accelerator.num_processes / batch.num_global
                self.accelerator.backward(loss * share)
            sums.add(correct, loss.detach(), int(part.mask_B.sum()))
            total += loss.detach()
        if self.optim.max_grad_norm is not None:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            # Accelerate's own clipping would unscale the optimizers of earlier phases once more.
            self.accelerator.unscale_gradients(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, self.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if self.ema:
            self.ema.update()
        return total

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of the images of a batch, or of the values that it has instead."""
        if not batch.values:
            return cast(Tensor, model(self.prepared(batch.images_BHWC)))
        device = self.accelerator.device
        values = tuple(value.to(device, non_blocking=True) for value in batch.values)
        return cast(Tensor, model(values=values))

    def adopt(self, head: Mapping[str, Tensor], whole: HeadState | None) -> None:
        """Take a head that was trained elsewhere, averaged if the config averages.

        `whole`: what to go on from; without it the loop has what is evaluated alone.
        """
        self.has_moments = whole is not None
        self.classifier.head.load_state_dict(whole.weights if whole else head)
        if self.ema:
            self.ema.follow(self.classifier.trainable_state())
            for name, tensor in head.items():
                self.ema.average[f"head.{name}"].copy_(tensor)
        if whole:
            assert self.optimizer is not None, "no phase entered"
            parameters = self.classifier.trainable_parameters()
            for name, moments in whole.moments.items():
                self.optimizer.state[parameters[f"head.{name}"]] = moments
            if self.ema:
                self.ema.num_steps = whole.num_steps

    def prepared(self, images_BHWC: Tensor) -> Tensor:
        """The model's input: normalised images, in the config's memory layout."""
        images_BCHW = self.model_input(images_BHWC)
        return images_BCHW if self.train.channels_last else images_BCHW.contiguous()


class ModelInput:
    """uint8 images (B, H, W, C) -> normalised float (B, C, H, W) in channels-last memory order.

    On a CPU by table, elsewhere by arithmetic, where images are copied as bytes. Mean and std are
    moved once: a copy to a GPU in each step would wait for all work before it.
    """

    def __init__(self, preprocess: Preprocess, device: torch.device) -> None:
        self.device = device
        self.table = level_table(preprocess)
        self.mean, self.std = (
            torch.tensor(values, device=device).mul_(255).view(1, 3, 1, 1)
            for values in (preprocess.mean, preprocess.std)
        )

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        if self.device.type == "cpu":
            images = normalised(images_BHWC.numpy(), self.table)
            return torch.from_numpy(images).permute(0, 3, 1, 2)
        return self.computed(images_BHWC)

    def computed(self, images_BHWC: Tensor) -> Tensor:
        """By arithmetic, the same to the bit."""
        images_BCHW = images_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        return images_BCHW.sub_(self.mean).div_(self.std)


def mixed_loss(logits_BK: Tensor, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Summed cross entropy against both labels of mixed images, and the number correct.

    An image is correct when the label that weighs more is predicted. Padding counts for neither.
    """
    logits_BK = logits_BK.float()

    def loss_against(labels_B: Tensor) -> Tensor:
        return F.cross_entropy(
            logits_BK, labels_B, reduction="none", label_smoothing=label_smoothing
        )

    labels_B = batch.labels_B.to(logits_BK.device, non_blocking=True)
    loss_B = loss_against(labels_B)
    if bool((batch.label_weight_B < 1).any()):  # on the CPU: nothing waits for a GPU
        partners_B = batch.partner_labels_B.to(logits_BK.device, non_blocking=True)
        weight_B = batch.label_weight_B.to(logits_BK.device, non_blocking=True)
        loss_B = weight_B * loss_B + (1 - weight_B) * loss_against(partners_B)
        labels_B = torch.where(weight_B >= 0.5, labels_B, partners_B)
    correct_B = logits_BK.argmax(1) == labels_B
    if not bool(batch.mask_B.all()):
        mask_B = batch.mask_B.to(logits_BK.device, non_blocking=True)
        # chosen, not multiplied: nothing times NaN would be NaN
        loss_B, correct_B = torch.where(mask_B, loss_B, 0), correct_B & mask_B
    return loss_B.sum(), correct_B.sum()


def micro_batches(batch: Batch, num_parts: int) -> Iterator[Batch]:
    """The batch in at most `num_parts` nearly equal parts, none of them empty."""
    size = len(batch.labels_B)
    num_parts = min(num_parts, size)
    for part in range(num_parts):
        rows = slice(part * size // num_parts, (part + 1) * size // num_parts)
        yield replace(
            batch,
            images_BHWC=batch.images_BHWC[rows],
            labels_B=batch.labels_B[rows],
            partner_labels_B=batch.partner_labels_B[rows],
            label_weight_B=batch.label_weight_B[rows],
            mask_B=batch.mask_B[rows],
            values=tuple(value[rows] for value in batch.values),
        )


def check_finite(losses_S: Tensor, first_step: int) -> None:
    """Raise DivergedError with the first step whose loss is NaN or infinite."""
    finite = torch.isfinite(losses_S).tolist()
    if not all(finite):
        raise DivergedError(first_step + finite.index(False))
