"""What a search will keep of frozen stages and what that takes and saves, measured beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tlrunner.config import TrialConfig
from tlrunner.model.classifier import build_classifier
from tlrunner.model.split import SplitError
from tlrunner.train.beside import Demand, Uses
from tlrunner.train.cut import Cut, Values, measure_cut, probe_images
from tlrunner.train.demand import CutPlan, demands, plan_cut, sharing_key, within
from tlrunner.train.feed import node_cache


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
    images, measured = (num_train, num_val), _Measured()
    config_of = {sharing_key(config): config for config in reversed(configs)}
    cuts: dict[str, dict[int, KeptCut]] = {}
    notes: dict[str, None] = {}
    for key, demand in demands(configs).items():
        config = config_of[key]
        if not demand or config.reuse.mode == "off" or config.data.streaming == "on":
            continue
        try:
            plans = _plans(config, demand, images, measured)
        except SplitError as err:
            notes[f"nothing frozen of {config.backbone.name} is reused: {err}"] = None
            continue
        cuts[key] = {
            depth: KeptCut(config.backbone.name, depth, demand[depth], plan)
            for depth, plan in plans.items()
        }
    return ReusePlan(images, cuts, list(notes))


class _Measured:
    """Cuts of one backbone after another, each measured once."""

    def __init__(self) -> None:
        self.cuts: dict[str, Cut] = {}

    def cut(self, config: TrialConfig, depth: int) -> Cut:
        size, precision = config.data.image_size, config.train.mixed_precision
        of = (config.backbone, size, config.head.pooling, config.reuse.dtype, precision, depth)
        if repr(of) not in self.cuts:
            self.cuts[repr(of)] = _measure(config, depth)
        return self.cuts[repr(of)]


def _plans(
    config: TrialConfig, demand: Demand, images: tuple[int, int], measured: _Measured
) -> dict[int, CutPlan]:
    plans = {}
    for depth, uses in sorted(demand.items()):
        cut = measured.cut(config, depth)
        num_bytes, seconds = cut.layout.num_bytes, cut.seconds
        plans[depth] = plan_cut(config.reuse.mode, uses, images, num_bytes, seconds)
    return within(plans, node_cache(config.data).limit)


def _measure(config: TrialConfig, depth: int) -> Cut:
    has_gpu = config.resources.gpus_per_worker != 0 and torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    torch.set_num_threads(config.resources.cpus_per_worker)
    random_weights = config.backbone.model_copy(update={"weights": "none", "weights_sha256": None})
    size = config.data.image_size
    classifier, preprocess = build_classifier(random_weights, config.head, 2, size)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    classifier.eval().to(device).to(memory_format=layout)
    images_BHWC = probe_images(preprocess.image_size).to(device)
    images_BCHW = (images_BHWC.permute(0, 3, 1, 2) / 255).contiguous(memory_format=layout)
    dtype = torch.float16 if config.train.mixed_precision == "fp16" else torch.bfloat16
    is_mixed = config.train.mixed_precision != "no"

    def frozen(part: nn.Module, values: Values) -> Values:
        with torch.no_grad(), torch.autocast(device, dtype, enabled=is_mixed):
            computed: Values = part(*values)
        return computed

    return measure_cut(classifier, depth, images_BCHW, config.reuse.dtype, frozen)
