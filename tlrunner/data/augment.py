"""One sample's picture -> the pixels a model sees: a random view to train on, or the plain one.

All randomness of a view is `uniforms(sample id, seed, view)`, drawn at fixed places, so turning
one augmentation on does not change what another does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from tlrunner.config import AugmentConfig, Preprocess
from tlrunner.data import colour
from tlrunner.data.decode import Picture, Pixels
from tlrunner.data.order import Ids, uniforms
from tlrunner.data.resize import Box, resize_box, resize_crop, resize_exact, resize_fast
from tlrunner.data.trivial import Fill, trivially_augmented

AUGMENT_STREAM, MIX_STREAM = 1, 2


class Draws(NamedTuple):
    """The uniform numbers of one view. Append only: its place makes a number what it is."""

    area: float
    ratio: float
    x: float
    y: float
    horizontal_flip: float
    vertical_flip: float
    rotation: float
    right: float
    down: float
    zoom: float
    shear_x: float
    shear_y: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    erase: float
    erase_area: float
    erase_ratio: float
    erase_x: float
    erase_y: float
    trivial_which: float
    trivial_strength: float
    trivial_sign: float


def view_of(epoch: int, num_views: int | None) -> int:
    """Which view of each sample an epoch trains on."""
    return epoch if num_views is None else epoch % num_views


@dataclass(frozen=True)
class TrainTransform:
    """Renders random views of samples."""

    augment: AugmentConfig
    preprocess: Preprocess
    seed: int

    @property
    def is_mixed(self) -> bool:
        """Whether batches are mixed in pairs after rendering."""
        return bool(self.augment.mixup or self.augment.cutmix)

    def draws(self, ids_B: Ids, view: int) -> list[Draws]:
        """What chance decides about a view of each sample; for many at once, as numpy likes it."""
        drawn = uniforms(ids_B, self.seed, view, AUGMENT_STREAM, len(Draws._fields))
        return list(map(Draws._make, drawn.tolist()))

    def render(self, picture: Picture, draws: Draws, out_HWC: Pixels) -> None:
        """Render one view of a picture into `out_HWC`, image_size squared.

        Raises:
            BadImage: the bytes are not what was once stored.
        """
        a = self.augment
        self._frame(picture, draws, out_HWC)
        self._flip(draws, out_HWC)
        if a.brightness or a.contrast or a.saturation or a.hue or a.trivial_augment:
            out_HWC[...] = self._coloured(out_HWC, draws)
        if draws.erase < a.random_erasing:
            self._erase(out_HWC, draws)

    @property
    def _fill(self) -> Fill:
        red, green, blue = (round(255 * mean) for mean in self.preprocess.mean)
        return red, green, blue

    def _frame(self, picture: Picture, draws: Draws, out_HWC: Pixels) -> None:
        """Decode no more than the frame needs; cut it out, and move it if asked to."""
        a, full_hw, method = self.augment, picture.size_hw, self.preprocess.interpolation
        is_moved = a.rotation or a.translation or a.zoom or a.shear
        if not (a.crop_scale or is_moved):  # what an evaluation sees
            EvalTransform(self.preprocess).render(picture, out_HWC)
            return
        box = (
            self._random_box(full_hw, draws)
            if a.crop_scale
            else central_box(full_hw, self.preprocess)
        )
        # anything in the image may be mirrored into what is moved
        least_hw, bottom = _least_hw(full_hw, box, len(out_HWC)), None if is_moved else box[3]
        pixels, scale = picture.decode_for(least_hw, bottom)
        if is_moved:
            out_HWC[...] = self._moved(pixels, _scaled(box, scale), draws)
        elif scale < 1:
            resize_box(pixels, _scaled(box, scale), method, out_HWC)
        else:
            resize_crop(pixels, box, method, out_HWC)

    def _random_box(self, full_hw: tuple[int, int], draws: Draws) -> Box:
        """A random resized crop (Szegedy et al., 2015)."""
        low, high = self.augment.crop_scale or (1, 1)
        share = low + (high - low) * draws.area
        height, width = fitting_box(full_hw, share, draws.ratio, (3 / 4, 4 / 3))
        left, top = draws.x * (full_hw[1] - width), draws.y * (full_hw[0] - height)
        return left, top, left + width, top + height

    def _moved(self, pixels: Pixels, box: Box, draws: Draws) -> Pixels:
        """Cut out, rotate, shear, zoom and shift in one warp; beyond its edges an image mirrors.

        A warp has no antialiasing filter, so what must shrink is resized first.
        """
        a, size = self.augment, self.preprocess.image_size
        zoom = 1 + a.zoom * _signed(draws.zoom)
        corners = np.array(box).reshape(2, 2)  # (left, top) and (right, bottom)
        before = np.array([pixels.shape[1], pixels.shape[0]])
        after = np.minimum(before, np.ceil(before * size * zoom / (corners[1] - corners[0])))
        shrunk = (int(after[1]), int(after[0]))
        if shrunk != pixels.shape[:2]:
            pixels = resize_fast(pixels, shrunk, self.preprocess.interpolation)
        corners = corners * (after / before)
        # an output pixel's place in [-1/2, 1/2] -> its place in the box -> its place in the image
        linear = np.diag(corners[1] - corners[0]) @ self._turn(draws) / zoom
        shift = a.translation * np.array([_signed(draws.right), _signed(draws.down)])
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
        angle = math.radians(self.augment.rotation * _signed(draws.rotation))
        shear_x, shear_y = (
            math.tan(math.radians(self.augment.shear * _signed(uniform)))
            for uniform in (draws.shear_x, draws.shear_y)
        )
        rotation = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        sheared: NDArray[np.float64] = np.array([[1, shear_x], [0, 1]]) @ [[1, 0], [shear_y, 1]]
        return np.asarray(rotation @ sheared)

    def _flip(self, draws: Draws, out_HWC: Pixels) -> None:
        horizontally = draws.horizontal_flip < self.augment.horizontal_flip
        vertically = draws.vertical_flip < self.augment.vertical_flip
        if horizontally or vertically:
            code = -1 if horizontally and vertically else int(horizontally)
            cv2.flip(out_HWC, code, dst=out_HWC)

    def _coloured(self, pixels: Pixels, draws: Draws) -> Pixels:
        a = self.augment
        for change, greatest, uniform in (
            (colour.brightened, a.brightness, draws.brightness),
            (colour.contrasted, a.contrast, draws.contrast),
            (colour.saturated, a.saturation, draws.saturation),
        ):
            if greatest:
                pixels = change(pixels, 1 + greatest * _signed(uniform))
        if a.hue:
            pixels = colour.hue_shifted(pixels, a.hue * _signed(draws.hue))
        if not a.trivial_augment:
            return pixels
        which, strength, sign = draws.trivial_which, draws.trivial_strength, draws.trivial_sign
        return trivially_augmented(pixels, which, strength, sign, self._fill)

    def _erase(self, out_HWC: Pixels, draws: Draws) -> None:
        size = out_HWC.shape[0]
        share = 0.02 + (0.33 - 0.02) * draws.erase_area
        box = fitting_box((size, size), share, draws.erase_ratio, (0.3, 1 / 0.3))
        height, width = (max(1, round(side)) for side in box)
        top, left = int(draws.erase_y * (size - height)), int(draws.erase_x * (size - width))
        out_HWC[top : top + height, left : left + width] = self._fill


@dataclass(frozen=True)
class EvalTransform:
    """Renders samples as the backbone's authors evaluated it: resize, then centre crop."""

    preprocess: Preprocess

    def render(self, picture: Picture, out_HWC: Pixels) -> None:
        """Render a picture into `out_HWC`, image_size squared.

        It is decoded in full, so that a flaw in any part of its bytes is found.

        Raises:
            BadImage: the bytes are not what was once stored.
        """
        size = self.preprocess.image_size
        box = central_box(picture.size_hw, self.preprocess)
        pixels, scale = picture.decode_for(_least_hw(picture.size_hw, box, size))
        interpolation = self.preprocess.interpolation
        out_HWC[...] = resize_exact(pixels, (size, size), interpolation, _scaled(box, scale))


def short_side(preprocess: Preprocess) -> int:
    """What an evaluation resizes an image's shorter side to, before it crops."""
    # 224 / 0.875 must stay 256, whatever the fraction's last bit
    return math.floor(preprocess.image_size / preprocess.crop_fraction + 1e-6)


def central_box(full_hw: tuple[int, int], preprocess: Preprocess) -> Box:
    """What is left of an image after torchvision's and timm's Resize and CenterCrop.

    Both round to whole pixels on the way, and so does this.
    """
    size, short = preprocess.image_size, short_side(preprocess)
    height, width = (int(short * side / min(full_hw) + 1e-6) for side in full_hw)
    left, top = round((width - size) / 2), round((height - size) / 2)
    per_row, per_column = full_hw[0] / height, full_hw[1] / width
    right, bottom = (left + size) * per_column, (top + size) * per_row
    return left * per_column, top * per_row, min(right, full_hw[1]), min(bottom, full_hw[0])


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


def _least_hw(full_hw: tuple[int, int], box: Box, size: int) -> tuple[int, int]:
    """How large the whole image must be decoded for the box to have `size` pixels each way."""
    left, top, right, bottom = box
    rows, columns = size * full_hw[0] / (bottom - top), size * full_hw[1] / (right - left)
    return math.ceil(rows - 1e-6), math.ceil(columns - 1e-6)


def _scaled(box: Box, scale: float) -> Box:
    left, top, right, bottom = box
    return left * scale, top * scale, right * scale, bottom * scale


def _signed(uniform: float) -> float:
    return 2 * uniform - 1
