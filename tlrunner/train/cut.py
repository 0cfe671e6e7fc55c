"""A cut of a backbone below its lowest stage that trains, and what keeping its values takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tlrunner.config import TrialConfig
from tlrunner.model.classifier import Classifier
from tlrunner.model.split import Split, split
from tlrunner.train.beside import Demand
from tlrunner.train.demand import CutPlan, Price, plan_chain, within
from tlrunner.train.entries import EntryLayout, layout_of
from tlrunner.train.feed import node_cache

PROBE_IMAGES = 8  # that a prefix is timed on
Values = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cut:
    """A cut, with what an image's values take: bytes, and seconds of the prefix."""

    split: Split
    layout: EntryLayout
    seconds: float


def probe_images(image_size: int) -> Tensor:
    """Images of noise, (B, H, W, C) in uint8."""
    noise = torch.Generator().manual_seed(0)
    shape = (PROBE_IMAGES, image_size, image_size, 3)
    return torch.randint(256, shape, dtype=torch.uint8, generator=noise)


def measure_cut(
    classifier: Classifier,
    depth: int,
    images_BCHW: Tensor,
    dtype: str,
    frozen: Callable[[nn.Module, Values], Values],
) -> Cut:
    """Split a classifier, in eval mode, above its first `depth` stages, and time the part below.

    Args:
        images_BCHW: `PROBE_IMAGES` of them.
        dtype: `reuse.dtype`.
        frozen: computes a part of the network from its values, as the trial would.

    Raises:
        SplitError: its graph cannot be cut there.
    """
    found = split(classifier.backbone, classifier.stages, range(depth), images_BCHW[:2])
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        values = frozen(found.prefix, (images_BCHW,))
        values[0].flatten()[0].item()  # waits for a GPU
        seconds = (time.perf_counter() - started) / len(images_BCHW)
    return Cut(found, layout_of(values, dtype), seconds)


def plan_cuts(
    config: TrialConfig, demand: Demand, images: tuple[int, int], cut_at: Callable[[int], Cut]
) -> dict[int, CutPlan]:
    """What is kept at which depth, as far as the node's cache has room.

    Args:
        images: number of training and of validation images.
        cut_at: depth -> the cut there, measured.
    """
    cuts = {depth: cut_at(depth) for depth in sorted(demand)}
    prices = {depth: Price(cut.seconds, cut.layout.num_bytes) for depth, cut in cuts.items()}
    is_exact = all(cut.layout.is_exact for cut in cuts.values())
    room_bytes = node_cache(config.data).limit
    while True:  # until all that pays beside each other has room
        plans = plan_chain(config.reuse.mode, demand, prices, images, is_exact=is_exact)
        chosen = within(plans, room_bytes)
        if chosen.keys() == plans.keys():
            return chosen
        too_large = plans.keys() - chosen.keys()
        demand = {depth: uses for depth, uses in demand.items() if depth not in too_large}
