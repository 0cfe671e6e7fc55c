"""Mixup and cutmix of neighbours in a batch, in place, on uint8.

Images 2i and 2i+1 are mixed with each other (a last odd one stays as it is), as ranks cut batches
between pairs. Mixing pixels before normalisation is the same as after: it is linear.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from tlrunner.config import AugmentConfig
from tlrunner.data.order import Ids, uniforms


def mix_pairs(
    images_BHWC: NDArray[np.uint8],
    ids_B: Ids,
    augment: AugmentConfig,
    *,
    seed: int,
    view: int,
    stream: int,
) -> NDArray[np.float32]:
    """Mix neighbours in place; with both kinds on, each pair gets one of them by chance.

    Returns:
        The weight of each image's own label, (B,); the rest belongs to its neighbour's.
    """
    weights_B = np.ones(len(ids_B), np.float32)
    if not (augment.mixup or augment.cutmix):
        return weights_B
    drawn = uniforms(ids_B[: len(ids_B) // 2 * 2 : 2], seed, view, stream, 5).tolist()
    for pair, (kind, y, x, *chance) in enumerate(drawn):
        i = 2 * pair
        cut = kind < 0.5 if augment.mixup and augment.cutmix else bool(augment.cutmix)
        share = symmetric_beta(augment.cutmix if cut else augment.mixup, *chance)
        first, second = images_BHWC[i], images_BHWC[i + 1]
        weights_B[i : i + 2] = (
            swap_patch(first, second, share, (y, x)) if cut else blend(first, second, share)
        )
    return weights_B


def blend(first: NDArray[np.uint8], second: NDArray[np.uint8], share: float) -> float:
    """Mixup: each image keeps `share` of itself. Returns that share."""
    mixed = cv2.addWeighted(first, share, second, 1 - share, 0)
    second[...] = cv2.addWeighted(second, share, first, 1 - share, 0)
    first[...] = mixed
    return share


def swap_patch(
    first: NDArray[np.uint8],
    second: NDArray[np.uint8],
    share: float,
    centre: tuple[float, float],
) -> float:
    """Cutmix: exchange a patch of 1 - `share` of the area. Returns the share that was kept.

    The patch is cut off at the edges, as in the paper, and what it really covers is what counts.
    """
    height, width = first.shape[:2]
    half = math.sqrt(1 - share) / 2
    top, bottom = (int(np.clip(round((centre[0] + d) * height), 0, height)) for d in (-half, half))
    left, right = (int(np.clip(round((centre[1] + d) * width), 0, width)) for d in (-half, half))
    patch = first[top:bottom, left:right].copy()
    first[top:bottom, left:right] = second[top:bottom, left:right]
    second[top:bottom, left:right] = patch
    return 1 - float((bottom - top) * (right - left) / (height * width))


def symmetric_beta(alpha: float, first: float, second: float) -> float:
    """Two uniform numbers in [0, 1) -> a draw from Beta(alpha, alpha).

    Devroye, Random variate generation in one line of code (1996): Bailey's formula for Student's t
    with 2 alpha degrees of freedom, mapped to the unit interval. Written so that nothing overflows.
    numpy's own draws would do, but may change between its versions.
    """
    power, cosine = first ** (1 / alpha), math.cos(2 * math.pi * second)
    spread = (1 - power) * cosine**2  # never 0 / 0 below: no float has a cosine of exactly 0
    return 0.5 + math.copysign(0.5 * math.sqrt(spread / (power + spread)), cosine)
