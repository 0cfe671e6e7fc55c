"""One sample's bytes -> the pixels a model sees: a random view to train on, or the plain one.

All randomness of a view is `uniforms(sample id, seed, view)`, drawn at fixed places, so turning
one augmentation on does not change what another does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from tlrunner.config import AugmentConfig, Preprocess
from tlrunner.data import colour
from tlrunner.data.decode import Pixels, decode_for, image_size
from tlrunner.data.order import uniforms
from tlrunner.data.resize import resize_exact, resize_fast
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
        """Decode no more than the crop needs; crop, and move it if asked to."""
        full_hw, size = image_size(data), self.preprocess.image_size
        box_hw = self._box_hw(full_hw, draws)
        least_h, least_w = (
            math.ceil(full * size / box) for full, box in zip(full_hw, box_hw, strict=True)
        )
        pixels = decode_for(data, (least_h, least_w))
        # the box is placed on the grid of what was decoded, so its corners need no rounding later
        scale = pixels.shape[0] / full_hw[0], pixels.shape[1] / full_hw[1]
        box_hw = box_hw[0] * scale[0], box_hw[1] * scale[1]
        at = (draws["y"], draws["x"]) if self.augment.crop_scale else (0.5, 0.5)
        a = self.augment
        if a.rotation or a.translation or a.zoom or a.shear:
            return self._moved(pixels, box_hw, at, draws)
        return _cropped(pixels, box_hw, at, size, self.preprocess.interpolation)

    def _box_hw(self, full_hw: tuple[int, int], draws: Draws) -> tuple[float, float]:
        if self.augment.crop_scale is None:
            side = min(full_hw) * self.preprocess.crop_fraction
            return side, side
        low, high = self.augment.crop_scale
        share = low + (high - low) * draws["area"]
        return fitting_box(full_hw, share, draws["ratio"], (3 / 4, 4 / 3))

    def _moved(
        self,
        pixels: Pixels,
        box_hw: tuple[float, float],
        at: tuple[float, float],
        draws: Draws,
    ) -> Pixels:
        """Crop, rotate, shear, zoom and shift in one warp; beyond its edges an image is mirrored.

        A warp has no antialiasing filter, so what must shrink is resized first.
        """
        a, size = self.augment, self.preprocess.image_size
        zoom = 1 + a.zoom * _signed(draws["zoom"])
        height, width = pixels.shape[:2]
        target_hw = (
            min(height, math.ceil(height * size * zoom / box_hw[0])),
            min(width, math.ceil(width * size * zoom / box_hw[1])),
        )
        pixels = resize_fast(pixels, target_hw, self.preprocess.interpolation)
        box = np.array([box_hw[1] * target_hw[1] / width, box_hw[0] * target_hw[0] / height])
        image = np.array([target_hw[1], target_hw[0]])
        centre = box / 2 + (image - box) * np.array([at[1], at[0]])
        angle = math.radians(a.rotation * _signed(draws["rotation"]))
        shear_x, shear_y = (
            math.tan(math.radians(a.shear * _signed(draws[name])))
            for name in ("shear_x", "shear_y")
        )
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        turn = turn @ np.array([[1, shear_x], [0, 1]]) @ np.array([[1, 0], [shear_y, 1]]) / zoom
        shift = a.translation * np.array([_signed(draws["right"]), _signed(draws["down"])])
        # an output pixel's place in [-1/2, 1/2] -> its place in the box -> its place in the image
        linear = np.diag(box) @ turn / size
        offset = centre - np.diag(box) @ shift - linear @ np.full(2, (size - 1) / 2) - 0.5
        return np.asarray(
            cv2.warpAffine(
                pixels,
                np.column_stack([linear, offset]),
                (size, size),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REFLECT_101,
            )
        )

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
        height, width = image_size(data)
        size = self.preprocess.image_size
        # 224 / 0.875 must stay 256, whatever the fraction's last bit
        short = math.floor(size / self.preprocess.crop_fraction + 1e-6)
        scale = short / min(height, width)
        target_hw = int(height * scale + 1e-6), int(width * scale + 1e-6)
        pixels = decode_for(data, target_hw)
        down, right = pixels.shape[0] / target_hw[0], pixels.shape[1] / target_hw[1]
        top, left = (round((side - size) / 2) for side in target_hw)
        box = left * right, top * down, (left + size) * right, (top + size) * down
        out_HWC[...] = resize_exact(pixels, (size, size), self.preprocess.interpolation, box)


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


def _cropped(
    pixels: Pixels,
    box_hw: tuple[float, float],
    at: tuple[float, float],
    size: int,
    interpolation: str,
) -> Pixels:
    height, width = (
        min(full, max(1, round(box))) for full, box in zip(pixels.shape, box_hw, strict=False)
    )
    top, left = round(at[0] * (pixels.shape[0] - height)), round(at[1] * (pixels.shape[1] - width))
    crop = pixels[top : top + height, left : left + width]
    return resize_fast(crop, (size, size), interpolation)


def _signed(uniform: float) -> float:
    return 2 * uniform - 1
