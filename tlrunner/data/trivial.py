"""TrivialAugment-wide: one operation of one strength (Müller and Hutter, 2021).

Operations and ranges are those of torchvision's TrivialAugmentWide. They run on numpy, OpenCV and
Pillow, which stay in the calling thread; what comes into view is painted in `fill`.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from tlrunner.data import colour
from tlrunner.data.decode import Pixels

Fill = tuple[int, int, int]

# each takes pixels, a strength from -1 to 1, and the fill colour
_OPERATIONS: tuple[Callable[[Pixels, float, Fill], Pixels], ...] = (
    lambda pixels, strength, fill: pixels,
    lambda pixels, strength, fill: _moved(pixels, fill, shear_x=0.99 * strength),
    lambda pixels, strength, fill: _moved(pixels, fill, shear_y=0.99 * strength),
    lambda pixels, strength, fill: _moved(pixels, fill, right=32 * strength),
    lambda pixels, strength, fill: _moved(pixels, fill, down=32 * strength),
    lambda pixels, strength, fill: _moved(pixels, fill, degrees=135 * strength),
    lambda pixels, strength, fill: colour.brightened(pixels, 1 + 0.99 * strength),
    lambda pixels, strength, fill: colour.saturated(pixels, 1 + 0.99 * strength),
    lambda pixels, strength, fill: colour.contrasted(pixels, 1 + 0.99 * strength),
    lambda pixels, strength, fill: _sharpened(pixels, 1 + 0.99 * strength),
    lambda pixels, strength, fill: pixels & np.uint8(0xFF << round(6 * abs(strength)) & 0xFF),
    lambda pixels, strength, fill: _solarised(pixels, 255 * (1 - abs(strength))),
    lambda pixels, strength, fill: np.asarray(ImageOps.autocontrast(Image.fromarray(pixels))),
    lambda pixels, strength, fill: np.asarray(ImageOps.equalize(Image.fromarray(pixels))),
)


def trivially_augmented(
    pixels: Pixels, which: float, strength: float, sign: float, fill: Fill
) -> Pixels:
    """(height, width, 3) in and out; `which`, `strength` and `sign` are uniform in [0, 1)."""
    operation = _OPERATIONS[int(which * len(_OPERATIONS))]
    level = int(strength * 31) / 30
    return operation(pixels, level if sign < 0.5 else -level, fill)


def _moved(
    pixels: Pixels,
    fill: Fill,
    *,
    degrees: float = 0,
    shear_x: float = 0,
    shear_y: float = 0,
    right: float = 0,
    down: float = 0,
) -> Pixels:
    """Rotate and shear about the centre, then shift by pixels."""
    height, width = pixels.shape[:2]
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    linear = np.array([[cosine, sine + shear_x], [shear_y - sine, cosine]])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    offset = centre - linear @ centre + (right, down)
    matrix = np.column_stack([linear, offset])
    return np.asarray(
        cv2.warpAffine(pixels, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=fill)
    )


def _sharpened(pixels: Pixels, factor: float) -> Pixels:
    return np.asarray(ImageEnhance.Sharpness(Image.fromarray(pixels)).enhance(factor))


def _solarised(pixels: Pixels, threshold: float) -> Pixels:
    return np.where(pixels >= threshold, 255 - pixels, pixels)
