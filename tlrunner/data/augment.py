"""One sample's bytes -> the pixels a model sees: a random view to train on, or the plain one.

All randomness of a view is `uniforms(sample id, seed, view)`, drawn at fixed places, so turning
one augmentation on does not change what another does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from tlrunner.config import AugmentConfig, Preprocess
from tlrunner.data import colour
from tlrunner.data.decode import Pixels, decode_for, image_size
from tlrunner.data.order import uniforms
from tlrunner.data.resize import Box, resize_exact, resize_fast
from tlrunner.data.trivial import Fill, trivially_augmented

AUGMENT_STREAM, MIX_STREAM = 1, 2
# append only: a number's place is what makes it the same number tomorrow
_DRAWS = (
    *("area", "ratio", "x", "y", "horizontal_flip", "vertical_flip"),
    *("rotation", "right", "down", "zoom", "shear_x", "shear_y"),
    *("brightness", "contrast", "saturation", "hue"),
    *("erase", "erase_area", "erase_ratio", "erase_x", "erase_y"),
    *("trivial_which", "trivial_strength", "trivial_sign"),
)
Draws = dict[str, float]
Frame = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the image


def view_of(epoch: int, num_views: int | None) -> int:
    """Which view of each sample an epoch trains on."""
    return epoch if num_views is None else epoch % num_views


@dataclass(frozen=True)
class TrainTransform:
    """Renders random views of samples."""

    augment: AugmentConfig
    preprocess: Preprocess
    seed: int

    def render(self, data: bytes | memoryview, sample_id: int, view: int, out_HWC: Pixels) -> None:
        """Render one view of a stored image into `out_HWC`, image_size squared.

        Raises:
            BadImage: the bytes are not what was once stored.
        """
        ids_B = np.array([sample_id], np.uint64)
        drawn = uniforms(ids_B, self.seed, view, AUGMENT_STREAM, len(_DRAWS))[0]
        draws = dict(zip(_DRAWS, drawn.tolist(), strict=True))
        pixels = self._framed(data, draws)
        pixels = self._coloured(self._flipped(pixels, draws), draws)
        if self.augment.trivial_augment:
            which, strength, sign = (draws[f"trivial_{x}"] for x in ("which", "strength", "sign"))
            pixels = trivially_augmented(pixels, which, strength, sign, self._fill)
        out_HWC[...] = pixels
        if draws["erase"] < self.augment.random_erasing:
            self._erase(out_HWC, draws)

    @property
    def _fill(self) -> Fill:
        red, green, blue = (round(255 * mean) for mean in self.preprocess.mean)
        return red, green, blue

    def _framed(self, data: bytes | memoryview, draws: Draws) -> Pixels:
        """Decode no more than the frame needs; cut it out, and move it if asked to."""
        a, size = self.augment, self.preprocess.image_size
        full_hw = image_size(data)
        frame = self._random_frame(full_hw, draws) if a.crop_scale else None
        left, top, right, bottom = shares = frame or central_frame(full_hw, self.preprocess)
        pixels = decode_for(data, _least_hw(shares, size))
        height, width = pixels.shape[:2]
        box = left * width, top * height, right * width, bottom * height
        if a.rotation or a.translation or a.zoom or a.shear:
            return self._moved(pixels, box, draws)
        if frame is None:  # what an evaluation sees
            return resize_exact(pixels, (size, size), self.preprocess.interpolation, box)
        crop = pixels[_rounded(box[1], box[3], height), _rounded(box[0], box[2], width)]
        return resize_fast(crop, (size, size), self.preprocess.interpolation)

    def _random_frame(self, full_hw: tuple[int, int], draws: Draws) -> Frame:
        """A random resized crop (Szegedy et al., 2015)."""
        low, high = self.augment.crop_scale or (1, 1)
        share = low + (high - low) * draws["area"]
        box_hw = fitting_box(full_hw, share, draws["ratio"], (3 / 4, 4 / 3))
        height, width = (box / full for box, full in zip(box_hw, full_hw, strict=True))
        left, top = draws["x"] * (1 - width), draws["y"] * (1 - height)
        return left, top, left + width, top + height

    def _moved(self, pixels: Pixels, box: Box, draws: Draws) -> Pixels:
        """Cut out, rotate, shear, zoom and shift in one warp; beyond its edges an image mirrors.

        A warp has no antialiasing filter, so what must shrink is resized first.
        """
        a, size = self.augment, self.preprocess.image_size
        zoom = 1 + a.zoom * _signed(draws["zoom"])
        corners = np.array(box).reshape(2, 2)  # (left, top) and (right, bottom)
        before = np.array([pixels.shape[1], pixels.shape[0]])
        after = np.minimum(before, np.ceil(before * size * zoom / (corners[1] - corners[0])))
        shrunk = (int(after[1]), int(after[0]))
        if shrunk != pixels.shape[:2]:
            pixels = resize_fast(pixels, shrunk, self.preprocess.interpolation)
        corners = corners * (after / before)
        # an output pixel's place in [-1/2, 1/2] -> its place in the box -> its place in the image
        linear = np.diag(corners[1] - corners[0]) @ self._turn(draws) / zoom
        shift = a.translation * np.array([_signed(draws["right"]), _signed(draws["down"])])
        offset = corners.mean(axis=0) - linear @ (shift + (size - 1) / 2 / size) - 0.5
        return np.asarray(
            cv2.warpAffine(
                pixels,
                np.column_stack([linear / size, offset]),
                (size, size),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REFLECT_101,
            )
        )

    def _turn(self, draws: Draws) -> NDArray[np.float64]:
        """Rotation and shear of the unit square, (2, 2)."""
        angle = math.radians(self.augment.rotation * _signed(draws["rotation"]))
        shear_x, shear_y = (
            math.tan(math.radians(self.augment.shear * _signed(draws[name])))
            for name in ("shear_x", "shear_y")
        )
        rotation = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        sheared: NDArray[np.float64] = np.array([[1, shear_x], [0, 1]]) @ [[1, 0], [shear_y, 1]]
        return np.asarray(rotation @ sheared)

    def _flipped(self, pixels: Pixels, draws: Draws) -> Pixels:
        if draws["horizontal_flip"] < self.augment.horizontal_flip:
            pixels = cv2.flip(pixels, 1)
        if draws["vertical_flip"] < self.augment.vertical_flip:
            pixels = cv2.flip(pixels, 0)
        return pixels

    def _coloured(self, pixels: Pixels, draws: Draws) -> Pixels:
        a = self.augment
        for name, change, greatest in (
            ("brightness", colour.brightened, a.brightness),
            ("contrast", colour.contrasted, a.contrast),
            ("saturation", colour.saturated, a.saturation),
        ):
            if greatest:
                pixels = change(pixels, 1 + greatest * _signed(draws[name]))
        return colour.hue_shifted(pixels, a.hue * _signed(draws["hue"])) if a.hue else pixels

    def _erase(self, out_HWC: Pixels, draws: Draws) -> None:
        size = out_HWC.shape[0]
        share = 0.02 + (0.33 - 0.02) * draws["erase_area"]
        box = fitting_box((size, size), share, draws["erase_ratio"], (0.3, 1 / 0.3))
        height, width = (max(1, round(side)) for side in box)
        top, left = int(draws["erase_y"] * (size - height)), int(draws["erase_x"] * (size - width))
        out_HWC[top : top + height, left : left + width] = self._fill


@dataclass(frozen=True)
class EvalTransform:
    """Renders samples as the backbone's authors evaluated it: resize, then centre crop."""

    preprocess: Preprocess

    def render(self, data: bytes | memoryview, out_HWC: Pixels) -> None:
        """Render a stored image into `out_HWC`, image_size squared.

        Raises:
            BadImage: the bytes are not what was once stored.
        """
        size = self.preprocess.image_size
        frame = left, top, right, bottom = central_frame(image_size(data), self.preprocess)
        pixels = decode_for(data, _least_hw(frame, size))
        height, width = pixels.shape[:2]
        box = left * width, top * height, right * width, bottom * height
        out_HWC[...] = resize_exact(pixels, (size, size), self.preprocess.interpolation, box)


def central_frame(full_hw: tuple[int, int], preprocess: Preprocess) -> Frame:
    """What is left of an image after torchvision's and timm's Resize and CenterCrop.

    Both round to whole pixels on the way, and so does this.
    """
    size = preprocess.image_size
    # 224 / 0.875 must stay 256, whatever the fraction's last bit
    short = math.floor(size / preprocess.crop_fraction + 1e-6)
    height, width = (int(short * side / min(full_hw) + 1e-6) for side in full_hw)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return left / width, top / height, (left + size) / width, (top + size) / height


def fitting_box(
    full_hw: Sequence[int], share: float, where: float, ratios: tuple[float, float]
) -> tuple[float, float]:
    """(height, width) of a box with this share of an area, and a width/height within `ratios`.

    `where` in [0, 1) chooses, uniformly in its logarithm, among those ratios at which the box fits
    inside; if none does, the box is cut. Nothing is drawn twice, as rejection sampling would.
    """
    height, width = full_hw
    area = height * width * share
    low, high = max(ratios[0], area / height**2), min(ratios[1], width**2 / area)
    ratio = math.exp(math.log(low) + where * (math.log(high) - math.log(low)))
    if low > high:  # a strip of an image
        ratio = ratios[0] if width < height else ratios[1]
    return min(height, math.sqrt(area / ratio)), min(width, math.sqrt(area * ratio))


def _least_hw(frame: Frame, size: int) -> tuple[int, int]:
    """How large the whole image must be decoded for the frame to have `size` pixels each way."""
    left, top, right, bottom = frame
    return math.ceil(size / (bottom - top) - 1e-6), math.ceil(size / (right - left) - 1e-6)


def _rounded(start: float, stop: float, length: int) -> slice:
    """The whole pixels that are nearest; at least one. The length is rounded, not both ends."""
    count = min(length, max(1, round(stop - start)))
    first = min(length - count, round(start))
    return slice(first, first + count)


def _signed(uniform: float) -> float:
    return 2 * uniform - 1
