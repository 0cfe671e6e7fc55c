"""The five flowers of `sample:flowers`, each drawn as a head onto an RGB canvas.

Kinds overlap in colour and in number of petals, as real ones do; what tells them apart is form.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from tlrunner.data.order import uniforms

Canvas = NDArray[np.uint8]
Colour = tuple[float, float, float]

WHITE, CREAM, YELLOW, GOLD = (244, 242, 236), (248, 236, 196), (246, 208, 36), (240, 164, 22)
ORANGE, RED, CRIMSON, PINK = (236, 112, 30), (206, 30, 38), (140, 12, 40), (238, 142, 172)
LILAC, PURPLE, BROWN, DARK = (186, 152, 214), (112, 44, 128), (92, 54, 24), (44, 26, 14)


class Dice:
    """Numbers to draw by, that depend on the class and index of an image alone."""

    def __init__(self, label: int, index: int) -> None:
        self._id = np.array([label << 32 | index], np.uint64)
        self._numbers = self._stream()
        self._fields = 0

    def _stream(self) -> Iterator[float]:
        block = 0
        while True:
            yield from uniforms(self._id, 0, block, 0, 512)[0].tolist()
            block += 1

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def count(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(next(self._numbers) * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return next(self._numbers) < probability

    def pick(self, *colours: Colour) -> Colour:
        return colours[self.count(0, len(colours) - 1)]

    def shade(self, colour: Colour, spread: float) -> Colour:
        """The colour, lighter or darker by up to a share of itself, and a little off."""
        light = 1 + self.between(-spread, spread)
        red, green, blue = (channel * light + self.between(-8, 8) for channel in colour)
        return red, green, blue

    def field(self, side: int, channels: int = 3) -> NDArray[np.float64]:
        """A (side, side, channels) array of numbers from -1 to 1."""
        self._fields += 1
        numbers = uniforms(self._id, 0, self._fields, 1, side * side * channels)
        return numbers.reshape(side, side, channels) * 2 - 1


@dataclass(frozen=True)
class Head:
    """Where a blossom goes: centre and radius in pixels, turned by `angle`, seen from a tilt."""

    x: float
    y: float
    radius: float
    angle: float
    squash: float
    tilt: float

    @cached_property
    def _matrix(self) -> NDArray[np.float64]:
        squashed = np.diag([1, self.squash]) @ _rotation(self.angle)
        matrix: NDArray[np.float64] = (_rotation(self.tilt) @ squashed * self.radius).T
        return matrix

    def place(self, points: NDArray[np.float64]) -> NDArray[np.int32]:
        """(P, 2) points of the unit circle -> pixels."""
        placed: NDArray[np.float64] = np.rint(points @ self._matrix + (self.x, self.y))
        return placed.astype(np.int32)


def daisy(canvas: Canvas, dice: Dice, head: Head) -> None:
    colour = dice.pick(WHITE, WHITE, WHITE, CREAM, PINK, LILAC, YELLOW, ORANGE)
    count, inner = dice.count(11, 24), dice.between(0.22, 0.36)
    width = dice.between(1.5, 2.6) / count
    _ring(canvas, dice, head, colour, count, width=width, tip=dice.between(1.2, 2.2))
    _disc(canvas, dice, head, inner, dice.pick(YELLOW, YELLOW, GOLD, ORANGE, BROWN))


def sunflower(canvas: Canvas, dice: Dice, head: Head) -> None:
    colour = dice.pick(YELLOW, YELLOW, GOLD, GOLD, ORANGE, CREAM, CRIMSON)
    count, inner = dice.count(14, 26), dice.between(0.36, 0.56)
    for length in (1.0, dice.between(0.82, 0.95)):
        width = dice.between(2.2, 3.2) / count
        _ring(canvas, dice, head, colour, count, length=length, width=width, tip=0.75)
    _disc(canvas, dice, head, inner, dice.pick(BROWN, BROWN, DARK, DARK, (120, 110, 40)))


def dandelion(canvas: Canvas, dice: Dice, head: Head) -> None:
    if dice.chance(0.35):
        _seed_ball(canvas, dice, head)
        return
    colour = dice.pick(YELLOW, YELLOW, GOLD, ORANGE, CREAM)
    for length in (1.0, 0.84, 0.66, 0.48, 0.3):
        count = dice.count(22, 38)
        _ring(canvas, dice, head, colour, count, length=length, width=0.065, tip=1.6)
        colour = dice.shade(colour, 0.06)


def rose(canvas: Canvas, dice: Dice, head: Head) -> None:
    colour = dice.pick(RED, RED, CRIMSON, PINK, PINK, WHITE, CREAM, YELLOW, ORANGE)
    layers = dice.count(5, 7)
    for layer in range(layers):
        reach = 1 - layer / (layers + 0.6)
        count = 5 if layer < layers - 2 else 3
        turn = layer * 2.4 + dice.between(-0.3, 0.3)
        for i in range(count):
            angle = turn + math.tau * i / count + dice.between(-0.15, 0.15)
            lobe = _lobe(reach * 0.52 * dice.between(0.9, 1.15), reach * 0.56)
            shape = lobe + np.array([reach * 0.46, 0])
            depth = 0.55 + 0.5 * reach
            tone = dice.shade(tuple_of(channel * depth for channel in colour), 0.12)
            _fill(canvas, head.place(shape @ _rotation(angle).T), tone, 0.72)
    swirl = np.linspace(0, 2.2 * math.tau, 60)
    spiral = np.stack([np.cos(swirl), np.sin(swirl)], 1) * (swirl / swirl[-1] * 0.26)[:, None]
    _line(canvas, head.place(spiral), tuple_of(channel * 0.42 for channel in colour), 2)


def tulip(canvas: Canvas, dice: Dice, head: Head) -> None:
    colour = dice.pick(RED, RED, PINK, YELLOW, WHITE, PURPLE, ORANGE, CRIMSON, CREAM)
    if dice.chance(0.2):  # open, seen from above
        _ring(canvas, dice, head, colour, 6, width=dice.between(0.3, 0.42), tip=0.9)
        _disc(canvas, dice, head, 0.16, dice.pick(YELLOW, DARK, CREAM))
        return
    lean, open_by = dice.between(-0.25, 0.25), dice.between(0.12, 0.42)
    for angle, width, depth in (
        *((-open_by, 0.34, 0.74), (open_by, 0.34, 0.74), (0.0, 0.3, 0.66)),
        *((-open_by * 0.7, 0.42, 0.9), (open_by * 0.7, 0.42, 0.94), (0.0, 0.38, 1.05)),
    ):
        shape = _petal(dice.between(1.5, 1.75), width * dice.between(0.9, 1.1), 0.8)
        shape = shape @ _rotation(angle + lean - math.pi / 2).T + (0, 0.8)
        tone = dice.shade(tuple_of(channel * depth for channel in colour), 0.08)
        upright = Head(head.x, head.y, head.radius * 0.8, head.angle * 0.12, 1.0, 0.0)
        _fill(canvas, upright.place(shape), tone, 0.78)


BLOSSOMS: dict[str, Callable[[Canvas, Dice, Head], None]] = {
    "daisy": daisy,
    "dandelion": dandelion,
    "rose": rose,
    "sunflower": sunflower,
    "tulip": tulip,
}


def tuple_of(channels: Iterator[float]) -> Colour:
    red, green, blue = channels
    return red, green, blue


def rgb(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (int(min(255, max(0, channel))) for channel in colour)
    return red, green, blue


def _rotation(angle: float) -> NDArray[np.float64]:
    sine, cosine = math.sin(angle), math.cos(angle)
    return np.array([[cosine, -sine], [sine, cosine]])


def _petal(length: float, width: float, tip: float) -> NDArray[np.float64]:
    """Outline of a petal from the origin along x; `tip` below 1 is pointed, above 1 blunt."""
    along = np.linspace(0, 1, 15)
    half = width / 2 * np.sin(math.pi * along ** (0.6 + 0.35 * tip)) ** 0.8
    upper = np.stack([along * length, half], 1)
    return np.concatenate([upper, (upper * (1, -1))[::-1]])


def _lobe(length: float, width: float) -> NDArray[np.float64]:
    around = np.linspace(0, math.tau, 24, endpoint=False)
    return np.stack([np.cos(around) * length, np.sin(around) * width], 1)


def _ring(
    canvas: Canvas,
    dice: Dice,
    head: Head,
    colour: Colour,
    count: int,
    *,
    length: float = 1.0,
    width: float,
    tip: float,
) -> None:
    """Petals all around, with gaps and uneven lengths, each with a vein."""
    start = dice.between(0, math.tau)
    for i in range(count):
        if dice.chance(0.04):
            continue
        angle = start + math.tau * i / count + dice.between(-0.25, 0.25) * math.tau / count / 2
        reach = length * dice.between(0.84, 1.06)
        shape = _petal(reach, width * dice.between(0.85, 1.15) * 1.6, tip) @ _rotation(angle).T
        tone = dice.shade(colour, 0.1)
        _fill(canvas, head.place(shape), tone, 0.8)
        vein = np.array([[0.3, 0], [0.85, 0]]) * reach @ _rotation(angle).T
        _line(canvas, head.place(vein), tuple_of(channel * 0.88 for channel in tone), 1)


def _disc(canvas: Canvas, dice: Dice, head: Head, radius: float, colour: Colour) -> None:
    """A centre of florets, laid out by the golden angle."""
    _fill(canvas, head.place(_lobe(radius, radius)), tuple_of(c * 0.8 for c in colour), 0.7)
    count = dice.count(40, 90)
    order = np.arange(count)
    around, reach = order * 2.39996, radius * 0.95 * np.sqrt((order + 0.5) / count)
    points = head.place(np.stack([np.cos(around), np.sin(around)], 1) * reach[:, None])
    size = max(1, round(head.radius * radius * 0.09))
    for x, y in points.tolist():
        cv2.circle(canvas, (x, y), size, rgb(dice.shade(colour, 0.3)), -1, cv2.LINE_AA)


def _seed_ball(canvas: Canvas, dice: Dice, head: Head) -> None:
    """A dandelion gone to seed: a pale veil, rays, and a tuft at the end of each."""
    veil = canvas.copy()
    _fill(veil, head.place(_lobe(0.95, 0.95)), dice.shade((216, 218, 214), 0.08), 1)
    canvas[...] = cv2.addWeighted(veil, 0.45, canvas, 0.55, 0)
    for _ in range(dice.count(70, 110)):
        angle, reach = dice.between(0, math.tau), math.sqrt(dice.between(0.1, 1))
        end = np.array([[0.12, 0], [reach, 0]]) @ _rotation(angle).T
        tone = dice.shade((226, 226, 222), 0.12)
        _line(canvas, head.place(end), tuple_of(channel * 0.86 for channel in tone), 1)
        for spread in (-0.5, 0.0, 0.5):
            tuft = np.array([[0, 0], [0.13, 0]]) @ _rotation(angle + spread).T + end[1]
            _line(canvas, head.place(tuft), tone, 1)
    _fill(canvas, head.place(_lobe(0.14, 0.14)), dice.shade((120, 100, 70), 0.2), 0.7)


def _fill(canvas: Canvas, points: NDArray[np.int32], colour: Colour, edge: float) -> None:
    """A polygon with an outline of its colour times `edge`."""
    cv2.fillPoly(canvas, [points], rgb(colour), cv2.LINE_AA)
    outline = tuple_of(channel * edge for channel in colour)
    cv2.polylines(canvas, [points], True, rgb(outline), 1, cv2.LINE_AA)


def _line(canvas: Canvas, points: NDArray[np.int32], colour: Colour, width: int) -> None:
    cv2.polylines(canvas, [points], False, rgb(colour), width, cv2.LINE_AA)
