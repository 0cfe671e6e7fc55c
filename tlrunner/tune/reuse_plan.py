"""What a search will keep of frozen stages and what that takes and saves, measured beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from tlrunner.config import TrialConfig
from tlrunner.model.split import SplitError
from tlrunner.train.beside import Uses
from tlrunner.train.cut import Cut, Values, measure_cut, plan_cuts, probe_images
from tlrunner.train.demand import CutPlan, demands, sharing_key
from tlrunner.train.warm import Warm
from tlrunner.tune.estimate import with_random_weights

MOST_CUTS = 1000  # measured at a time


@dataclass(frozen=True)
class KeptCut:
    """The values above the first `depth` stages, for trials that see the same images.

    `uses`: what those trials read of them.
    """

    backbone: str
    depth: int
    uses: Uses
    plan: CutPlan


@dataclass(frozen=True)
class ReusePlan:
    """What is kept for the trials of a search.

    Attributes:
        images: number of training and of validation images.
        cuts: by `sharing_key`, then by depth.
        notes: why nothing is kept of some backbones.
    """

    images: tuple[int, int]
    cuts: Mapping[str, Mapping[int, KeptCut]]
    notes: Sequence[str]

    def gain(self, config: TrialConfig) -> float:
        """Seconds that a trial has of it: a share by what it reads."""
        key, seconds = sharing_key(config), 0.0
        for depth, uses in demands([config])[key].items():
            if kept := self.cuts.get(key, {}).get(depth):
                share = self._reads(uses, kept.plan) / self._reads(kept.uses, kept.plan)
                seconds += share * (kept.plan.saved_seconds - kept.plan.spent_seconds)
        return seconds

    def _reads(self, uses: Uses, plan: CutPlan) -> int:
        num_train, num_val = self.images
        return plan.train * sum(uses.train.values()) * num_train + plan.val * uses.val * num_val


def plan_reuse(configs: Sequence[TrialConfig], num_train: int, num_val: int) -> ReusePlan:
    """Decide as the trials will, on this machine and with random weights."""
    images, measured = (num_train, num_val), Warm()
    config_of = {sharing_key(config): config for config in reversed(configs)}
    cuts: dict[str, dict[int, KeptCut]] = {}
    notes: dict[str, None] = {}
    for key, demand in demands(configs).items():
        config = config_of[key]
        if not demand or config.reuse.mode == "off" or config.data.streaming == "on":
            continue
        try:
            plans = plan_cuts(config, demand, images, partial(_cut, measured, config))
        except SplitError as err:
            notes[f"nothing frozen of {config.backbone.name} is reused: {err}"] = None
            continue
        cuts[key] = {
            depth: KeptCut(config.backbone.name, depth, demand[depth], plan)
            for depth, plan in plans.items()
        }
    return ReusePlan(images, cuts, list(notes))


def _cut(measured: Warm, config: TrialConfig, depth: int) -> Cut:
    """A cut, which is measured once for all trials that have it."""
    train = config.train
    of = (config.backbone, config.data.image_size, config.head.pooling, config.reuse.dtype)
    key = repr((*of, train.mixed_precision, train.channels_last))
    return measured.once(
        "cut", (key, depth), lambda: _measure(measured, key, config, depth), MOST_CUTS
    )


def _measure(measured: Warm, key: str, config: TrialConfig, depth: int) -> Cut:
    classifier, preprocess, device = measured.once(
        "classifier", key, lambda: with_random_weights(config, num_classes=2), 1
    )
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    classifier.eval().to(memory_format=layout)
    images_BHWC = probe_images(preprocess.image_size).to(device)
    images_BCHW = (images_BHWC.permute(0, 3, 1, 2) / 255).contiguous(memory_format=layout)
    dtype = torch.float16 if config.train.mixed_precision == "fp16" else torch.bfloat16
    is_mixed = config.train.mixed_precision != "no"

    def frozen(part: nn.Module, values: Values) -> Values:
        with torch.no_grad(), torch.autocast(device, dtype, enabled=is_mixed):
            computed: Values = part(*values)
        return computed

    return measure_cut(classifier, depth, images_BCHW, config.reuse.dtype, frozen)
