"""`sample:flowers`: 600 pictures of five kinds of flowers, drawn by tlrunner itself.

Something to try everything on where nothing can be downloaded. A picture depends on its class and
index alone. They are drawn to be hard enough that pretrained features are worth having.
"""

import math

import cv2
import numpy as np
import simplejpeg

from tlrunner.data.blossoms import BLOSSOMS, BROWN, Canvas, Colour, Dice, Head, rgb, tuple_of

CLASS_NAMES = tuple(BLOSSOMS)
NUM_PER_CLASS = 120
VERSION = 1

_GREENS: tuple[Colour, ...] = ((62, 104, 40), (88, 128, 52), (44, 84, 48), (112, 140, 70))
_SKIES: tuple[Colour, ...] = ((120, 164, 214), (168, 196, 222), (206, 210, 212), (94, 126, 170))
_THINGS: tuple[Colour, ...] = (*_GREENS, *_SKIES, BROWN, (168, 120, 96), (60, 60, 66))


def draw(class_index: int, index: int, size: int = 160) -> Canvas:
    """Picture number `index` of a class, (size, size, 3) uint8 RGB."""
    dice, side = Dice(class_index, index), 2 * size
    canvas = _background(dice, side)
    blossom = BLOSSOMS[CLASS_NAMES[class_index]]
    heads = _heads(dice, side)
    for head in heads:
        _stem(canvas, dice, head)
    for head in heads:
        blossom(canvas, dice, head)
    for _ in range(dice.count(0, 3)):
        _blade(canvas, dice)
    small = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return _photographed(small, dice)


def draw_jpeg(class_index: int, index: int) -> bytes:
    return bytes(simplejpeg.encode_jpeg(draw(class_index, index), quality=90))


def _heads(dice: Dice, side: int) -> list[Head]:
    """One large blossom, or several smaller ones, from far to near."""
    count = dice.count(1, 2) if dice.chance(0.6) else dice.count(3, 6)
    largest = 0.42 if count == 1 else 0.3 if count == 2 else 0.2
    heads = [
        Head(
            x=side * dice.between(0.2, 0.8),
            y=side * dice.between(0.2, 0.75),
            radius=side * largest * dice.between(0.5, 1.0),
            angle=dice.between(-math.pi, math.pi),
            squash=dice.between(0.5, 1.0),
            tilt=dice.between(-0.7, 0.7),
        )
        for _ in range(count)
    ]
    return sorted(heads, key=lambda head: head.radius)


def _stem(canvas: Canvas, dice: Dice, head: Head) -> None:
    """A bent stem from the head to the lower edge, with leaves that suit no kind in particular."""
    side = canvas.shape[0]
    foot, bend = head.x + side * dice.between(-0.25, 0.25), side * dice.between(-0.12, 0.12)
    t = np.linspace(0, 1, 16)[:, None]
    path = (1 - t) * (head.x, head.y) + t * (foot, side * 1.05) + t * (1 - t) * 4 * (bend, 0)
    green = dice.shade(dice.pick(*_GREENS), 0.15)
    width = max(2, round(head.radius * dice.between(0.05, 0.1)))
    cv2.polylines(canvas, [np.rint(path).astype(np.int32)], False, rgb(green), width, cv2.LINE_AA)
    for _ in range(dice.count(0, 3)):
        at = path[dice.count(6, 15)]
        axes = head.radius * dice.between(0.4, 0.9), head.radius * dice.between(0.1, 0.28)
        _ellipse(canvas, at, axes, dice.between(0, 180), dice.shade(green, 0.2))


def _blade(canvas: Canvas, dice: Dice) -> None:
    """A leaf or a blade of grass before everything else."""
    side = canvas.shape[0]
    at = np.array([side * dice.between(0, 1), side * dice.between(0.5, 1.05)])
    axes = side * dice.between(0.15, 0.4), side * dice.between(0.008, 0.04)
    colour = dice.shade(dice.pick(*_GREENS), 0.3)
    _ellipse(canvas, at, axes, dice.between(40, 140), colour)


def _background(dice: Dice, side: int) -> Canvas:
    kind = dice.count(0, 4)
    if kind == 0:
        canvas = _sky(dice, side)
    elif kind == 1:
        canvas = _mottled(dice, side, dice.shade((112, 84, 58), 0.4), 60)
    elif kind == 2:
        canvas = _grass(dice, side)
    elif kind == 3:
        canvas = _bokeh(dice, side)
    else:
        canvas = _clutter(dice, side)
    blur = side * dice.between(0.001, 0.02)
    return np.asarray(cv2.GaussianBlur(canvas, (0, 0), blur), np.uint8)


def _sky(dice: Dice, side: int) -> Canvas:
    """Sky that goes over into something else."""
    top, bottom = dice.pick(*_SKIES), dice.pick(*_SKIES, *_GREENS)
    t = np.clip(np.linspace(-0.5, 1.5, side) + dice.between(-0.4, 0.4), 0, 1)[:, None, None]
    canvas = np.broadcast_to((1 - t) * top + t * bottom, (side, side, 3))
    return _clipped(canvas + _cloudy(dice, side, 5) * 26)


def _mottled(dice: Dice, side: int, colour: Colour, contrast: float) -> Canvas:
    scales = ((6, 0.6), (24, 0.4), (80, 0.3))
    rough = sum(_cloudy(dice, side, cells, 1) * weight for cells, weight in scales)
    return _clipped(np.array(colour) + np.asarray(rough)[:, :, None] * contrast)


def _grass(dice: Dice, side: int) -> Canvas:
    canvas = _mottled(dice, side, dice.pick(*_GREENS), 40)
    for _ in range(140):
        x, y = side * dice.between(0, 1), side * dice.between(0, 1.2)
        tip = x + side * dice.between(-0.08, 0.08), y - side * dice.between(0.08, 0.3)
        colour = rgb(dice.shade(dice.pick(*_GREENS), 0.35))
        cv2.line(canvas, (int(x), int(y)), (int(tip[0]), int(tip[1])), colour, 2, cv2.LINE_AA)
    return canvas


def _bokeh(dice: Dice, side: int) -> Canvas:
    """Lights out of focus; some have the colours of flowers."""
    canvas = _mottled(dice, side, tuple_of(c * 0.6 for c in dice.pick(*_GREENS)), 40)
    for _ in range(dice.count(8, 30)):
        colour = dice.pick(*_GREENS, *_SKIES, (240, 220, 90), (220, 120, 150), (240, 240, 230))
        at = np.array([side * dice.between(0, 1), side * dice.between(0, 1)])
        radius = side * dice.between(0.02, 0.11)
        layer = canvas.copy()
        _ellipse(layer, at, (radius, radius), 0, colour)
        canvas = np.asarray(cv2.addWeighted(layer, 0.5, canvas, 0.5, 0), np.uint8)
    return canvas


def _clutter(dice: Dice, side: int) -> Canvas:
    """Boards, pots and leaves, as seen at the edge of a terrace."""
    canvas = _mottled(dice, side, dice.pick(*_THINGS), 30)
    for _ in range(dice.count(8, 24)):
        at = np.array([side * dice.between(0, 1), side * dice.between(0, 1)])
        axes = side * dice.between(0.03, 0.3), side * dice.between(0.02, 0.14)
        colour, angle = dice.shade(dice.pick(*_THINGS), 0.3), dice.between(0, 180)
        if dice.chance(0.5):
            _ellipse(canvas, at, axes, angle, colour)
        else:
            corners = cv2.boxPoints((tuple(at), axes, angle)).astype(np.int32)
            cv2.fillPoly(canvas, [corners], rgb(colour), cv2.LINE_AA)
    return canvas


def _photographed(canvas: Canvas, dice: Dice) -> Canvas:
    """Uneven light, exposure, a colour cast, less saturation, blur and noise."""
    side = canvas.shape[0]
    x, y = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side))
    angle, depth = dice.between(0, math.tau), dice.between(0, 0.35)
    light = 1 + depth * (x * math.cos(angle) + y * math.sin(angle))
    cast = np.array([dice.between(0.84, 1.12) for _ in range(3)]) * dice.between(0.62, 1.15)
    pixels = (canvas * light[:, :, None] * cast).astype(np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * dice.between(0.55, 1.15)
    if dice.chance(0.6):
        pixels = cv2.GaussianBlur(pixels, (0, 0), side * dice.between(0.002, 0.009))
    return _clipped(pixels + dice.field(side) * dice.between(2, 22))


def _cloudy(dice: Dice, side: int, cells: int, channels: int = 3) -> np.ndarray:
    field = dice.field(cells, channels).astype(np.float32)
    return np.asarray(cv2.resize(field, (side, side), interpolation=cv2.INTER_CUBIC))


def _clipped(values: np.ndarray) -> Canvas:
    clipped: Canvas = np.clip(values, 0, 255).astype(np.uint8)
    return clipped


def _ellipse(
    canvas: Canvas, at: np.ndarray, axes: tuple[float, float], angle: float, colour: Colour
) -> None:
    centre, size = (int(at[0]), int(at[1])), (max(1, int(axes[0])), max(1, int(axes[1])))
    cv2.ellipse(canvas, centre, size, angle, 0, 360, rgb(colour), -1, cv2.LINE_AA)
