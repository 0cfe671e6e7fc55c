"""Resizing, exactly or fast: (height, width, 3) uint8 in and out.

Both stay in the calling thread. torch's own uint8 kernels do not: they start OpenMP threads, which
fight with the loader's for the same cores.
"""

import math

import cv2
import numpy as np
from PIL import Image

from tlrunner.data.decode import Pixels

Box = tuple[float, float, float, float]  # left, top, right, bottom; fractions of pixels count

# Shrinking by less than the first needs no filter against aliasing, by more than the second one
# that grows with it. Between them OpenCV's area average is a rougher filter, and 4 times slower.
_MILD_SHRINK, _STRONG_SHRINK = 1.5, 2.4
_ENLARGING = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
}


def resize_exact(pixels: Pixels, size_hw: tuple[int, int], interpolation: str, box: Box) -> Pixels:
    """Resize part of an image with Pillow's antialiasing filter, which evaluations are done with.

    Pixels outside the box still count where the filter reaches over its edge, so this is what
    resizing the whole and cropping afterwards gives.
    """
    resample = Image.Resampling[interpolation.upper()]
    return np.asarray(Image.fromarray(pixels).resize(size_hw[::-1], resample, box))


def resize_fast(
    pixels: Pixels, size_hw: tuple[int, int], interpolation: str, out_HWC: Pixels | None = None
) -> Pixels:
    """Resize for training, several times faster and within 1.7 levels of the exact way.

    `out_HWC`: where the result goes, of this size; made if None.
    """
    height, width = size_hw
    shrink_hw = pixels.shape[0] / height, pixels.shape[1] / width
    smooth, method = _filtered(pixels, shrink_hw, interpolation)
    return np.asarray(
        cv2.resize(smooth, (width, height), dst=out_HWC, interpolation=method), np.uint8
    )


def resize_crop(pixels: Pixels, box: Box, interpolation: str, out_HWC: Pixels) -> None:
    """Resize the whole pixels nearest to a box into `out_HWC`, fast."""
    left, top, right, bottom = box
    rows = _whole(top, bottom, pixels.shape[0])
    columns = _whole(left, right, pixels.shape[1])
    resize_fast(pixels[rows, columns], out_HWC.shape[:2], interpolation, out_HWC)


def resize_box(pixels: Pixels, box: Box, interpolation: str, out_HWC: Pixels) -> None:
    """Resize a box with fractions of pixels into `out_HWC`.

    The warp takes four times as long as `resize_crop`. It is for an image decoded at a fraction of
    its size, of which a pixel is many of the original's, and half of one is seen: from the box of
    the original, resized exactly, the fast way is off by 5.5 levels on photos, this one by 2.4.
    (Pillow: by 1.6, in twice the time of a warp.)
    """
    (height, width), (left, top, right, bottom) = out_HWC.shape[:2], box
    scale_y, scale_x = (bottom - top) / height, (right - left) / width
    if max(scale_x, scale_y) > _STRONG_SHRINK:  # the fraction is a small one of an output pixel
        resize_crop(pixels, box, interpolation, out_HWC)
        return
    x, y = max(0, math.floor(left) - 1), max(0, math.floor(top) - 1)
    pixels = pixels[y : math.ceil(bottom) + 1, x : math.ceil(right) + 1]
    smooth, method = _filtered(pixels, (scale_y, scale_x), interpolation)
    shift_x, shift_y = left - x + (scale_x - 1) / 2, top - y + (scale_y - 1) / 2
    cv2.warpAffine(
        smooth,
        np.array([[scale_x, 0, shift_x], [0, scale_y, shift_y]]),
        (width, height),
        dst=out_HWC,
        flags=method | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _whole(start: float, stop: float, length: int) -> slice:
    """The whole pixels that are nearest; at least one. The length is rounded, not both ends."""
    count = min(length, max(1, round(stop - start)))
    first = min(length - count, round(start))
    return slice(first, first + count)


def _filtered(
    pixels: Pixels, shrink_hw: tuple[float, float], interpolation: str
) -> tuple[Pixels, int]:
    """Pixels that can be shrunk without aliasing, and the method that shrinks or enlarges them."""
    most = max(shrink_hw)
    if most <= 1 or interpolation == "nearest":
        return pixels, _ENLARGING[interpolation]
    if most < _MILD_SHRINK:
        return pixels, cv2.INTER_LINEAR
    if most > _STRONG_SHRINK:
        return pixels, cv2.INTER_AREA
    rows, columns = (3 if shrink >= _MILD_SHRINK else 1 for shrink in shrink_hw)
    return cv2.GaussianBlur(pixels, (columns, rows), 0), cv2.INTER_LINEAR
