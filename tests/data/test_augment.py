import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, picture
from PIL import Image
from torchvision.transforms import v2 as tv

from tlrunner.config import AugmentConfig, Preprocess
from tlrunner.data import colour, trivial
from tlrunner.data.augment import (
    AUGMENT_STREAM,
    EvalTransform,
    TrainTransform,
    fitting_box,
    view_of,
)
from tlrunner.data.decode import Decoded, Encoded, decode
from tlrunner.data.order import uniforms
from tlrunner.data.resize import resize_box, resize_crop, resize_fast

OFF: dict[str, Any] = {"crop_scale": None, "horizontal_flip": 0.0}
EVERYTHING = AugmentConfig(
    vertical_flip=0.5,
    rotation=30,
    translation=0.1,
    zoom=0.2,
    shear=10,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.1,
    random_erasing=0.5,
    trivial_augment=True,
)


def rendered(
    augment: AugmentConfig, preprocess: Preprocess, data: bytes, sample_id: int = 1, view: int = 0
) -> np.ndarray:
    out = np.zeros((preprocess.image_size, preprocess.image_size, 3), np.uint8)
    transform = TrainTransform(augment, preprocess, seed=0)
    (draws,) = transform.draws(np.array([sample_id], np.uint64), view)
    transform.render(Encoded(data), draws, out)
    return out


def evaluated(preprocess: Preprocess, data: bytes) -> np.ndarray:
    out = np.zeros((preprocess.image_size, preprocess.image_size, 3), np.uint8)
    EvalTransform(preprocess).render(Encoded(data), out)
    return out


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(227, 227), (130, 200), (90, 31)])
def test_evaluation_pixels_are_torchvisions(interpolation: str, shape: tuple[int, int]) -> None:
    preprocess = Preprocess(
        image_size=64,
        crop_fraction=0.875,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        interpolation=interpolation,
    )
    image = picture(width=shape[0], height=shape[1])
    method = tv.InterpolationMode(interpolation)
    expected = tv.CenterCrop(64)(tv.Resize(int(64 / 0.875), interpolation=method)(image))
    found = evaluated(preprocess, encoded(image, "PNG"))
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


def test_a_large_photo_decoded_small_evaluates_nearly_the_same(preprocess: Preprocess) -> None:
    image = picture(width=300, height=260)
    small, full = (
        evaluated(preprocess, data) for data in (encoded(image, quality=95), encoded(image, "PNG"))
    )
    assert np.abs(small.astype(int) - full).mean() < 1.5


def test_with_everything_off_training_sees_what_evaluation_sees(preprocess: Preprocess) -> None:
    data = encoded(picture(width=50, height=40), "PNG")
    train = rendered(AugmentConfig(**OFF), preprocess, data)
    assert (train == evaluated(preprocess, data)).all()


def test_a_warp_that_moves_nothing_changes_nothing(preprocess: Preprocess) -> None:
    data = encoded(picture(width=50, height=40), "PNG")
    plain = rendered(AugmentConfig(**OFF), preprocess, data)
    warped = rendered(AugmentConfig(**OFF, rotation=1e-6), preprocess, data)
    assert np.abs(warped.astype(int) - plain).mean() < 2


def test_a_view_is_a_function_of_seed_view_and_sample(preprocess: Preprocess) -> None:
    data = encoded(picture(width=90, height=70))
    views = [rendered(EVERYTHING, preprocess, data, i, v) for i in range(4) for v in range(4)]
    again = [rendered(EVERYTHING, preprocess, data, i, v) for i in range(4) for v in range(4)]
    assert all((a == b).all() for a, b in zip(views, again, strict=True))
    assert len({view.tobytes() for view in views}) == 16


@pytest.mark.parametrize(
    "on",
    [
        {"crop_scale": (0.3, 0.5)},
        {"horizontal_flip": 1.0},
        {"vertical_flip": 1.0},
        {"rotation": 45},
        {"translation": 0.3},
        {"zoom": 0.5},
        {"shear": 30},
        {"brightness": 0.5},
        {"contrast": 0.5},
        {"saturation": 0.9},
        {"hue": 0.4},
        {"random_erasing": 1.0},
    ],
)
def test_each_entry_alone_changes_the_picture(on: dict[str, Any], preprocess: Preprocess) -> None:
    data = encoded(picture(width=90, height=70))
    off = rendered(AugmentConfig(**OFF), preprocess, data)
    changed = [rendered(AugmentConfig(**OFF | on), preprocess, data, view=v) for v in range(5)]
    assert np.abs(np.array(changed, int) - off).mean() > 2


def test_flips_are_exact(preprocess: Preprocess) -> None:
    data = encoded(picture(width=90, height=70))
    off = rendered(AugmentConfig(**OFF), preprocess, data)
    flipped = rendered(AugmentConfig(**OFF | {"horizontal_flip": 1.0}), preprocess, data)
    upside_down = rendered(AugmentConfig(**OFF, vertical_flip=1.0), preprocess, data)
    assert (flipped == off[:, ::-1]).all()
    assert (upside_down == off[::-1]).all()
    turned = rendered(
        AugmentConfig(**OFF | {"horizontal_flip": 1.0}, vertical_flip=1.0), preprocess, data
    )
    assert (turned == off[::-1, ::-1]).all()


def test_what_is_erased_has_the_mean_colour(preprocess: Preprocess) -> None:
    data = encoded(Image.new("RGB", (40, 40), "blue"))
    erased = rendered(AugmentConfig(**OFF, random_erasing=1.0), preprocess, data)
    share = (erased == (128, 102, 76)).all(axis=2).mean()
    assert 0.015 < share < 0.35


@given(
    st.integers(8, 400),
    st.integers(8, 400),
    st.floats(0.05, 1),
    st.floats(0, 1, exclude_max=True),
)
def test_a_crop_fits_and_has_its_share(height: int, width: int, share: float, at: float) -> None:
    box_h, box_w = fitting_box((height, width), share, at, (3 / 4, 4 / 3))
    assert 0 < box_h <= height
    assert 0 < box_w <= width
    exact = math.isclose(box_h * box_w, share * height * width, rel_tol=1e-6)
    assert exact or not 0.75 <= width / height <= 4 / 3
    assert not exact or 0.7499 <= box_w / box_h <= 1.3334


def test_a_view_of_decoded_pixels_is_that_of_their_file(preprocess: Preprocess) -> None:
    image = picture(width=90, height=70)
    transform = TrainTransform(EVERYTHING, preprocess, seed=0)
    for draws in transform.draws(np.arange(9, dtype=np.uint64), 0):
        outs = [np.zeros((32, 32, 3), np.uint8) for _ in range(2)]
        transform.render(Encoded(encoded(image, "PNG")), draws, outs[0])
        transform.render(Decoded(np.asarray(image)), draws, outs[1])
        assert (outs[0] == outs[1]).all()


def test_a_view_is_the_same_whether_its_jpeg_is_decoded_in_part_or_whole(
    preprocess: Preprocess,
) -> None:
    data = encoded(picture(width=60, height=200))
    transform = TrainTransform(AugmentConfig(), preprocess, seed=0)
    for draws in transform.draws(np.arange(40, dtype=np.uint64), 0):
        outs = [np.zeros((32, 32, 3), np.uint8) for _ in range(2)]
        transform.render(Encoded(data), draws, outs[0])
        transform.render(Decoded(decode(data)), draws, outs[1])
        assert (outs[0] == outs[1]).all()


def test_what_chance_decides_of_a_sample_does_not_depend_on_its_company(
    preprocess: Preprocess,
) -> None:
    transform = TrainTransform(AugmentConfig(), preprocess, seed=3)
    ids = np.arange(7, dtype=np.uint64)
    alone = [transform.draws(ids[i : i + 1], 2)[0] for i in range(7)]
    assert transform.draws(ids, 2) == alone
    assert alone[0].area == uniforms(ids[:1], 3, 2, AUGMENT_STREAM, 1)[0, 0]


def test_views_repeat_only_when_their_number_is_set() -> None:
    assert [view_of(epoch, 3) for epoch in range(5)] == [0, 1, 2, 0, 1]
    assert [view_of(epoch, None) for epoch in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("side", [20, 31, 40, 47, 52, 64, 70, 76, 100])
def test_fast_resizing_is_close_to_exact(side: int) -> None:
    pixels = np.asarray(picture(width=side, height=side))
    exact = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(resize_fast(pixels, (32, 32), "bilinear").astype(int) - exact).mean() < 1.7


def mean_error(box: tuple[float, ...], out: np.ndarray, image: Image.Image) -> float:
    exact = image.resize(out.shape[1::-1], Image.Resampling.BILINEAR, box)
    return float(np.abs(out.astype(int) - np.asarray(exact)).mean())


@given(
    st.floats(130, 320), st.floats(130, 240), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9)
)
@settings(deadline=None, max_examples=30)
def test_a_box_of_an_image_decoded_small_is_cut_to_fractions_of_pixels(
    width: float, height: float, x: float, y: float, seed: int
) -> None:
    image = picture(seed, width=320, height=240)
    left, top = x * (320 - width), y * (240 - height)
    box = left, top, left + width, top + height
    least_hw = math.ceil(64 * 240 / height), math.ceil(64 * 320 / width)
    pixels, scale = Encoded(encoded(image, quality=95)).decode_for(least_hw)
    assert scale <= 0.5
    out = np.zeros((64, 64, 3), np.uint8)
    resize_box(pixels, tuple(side * scale for side in box), "bilinear", out)
    assert mean_error(box, out, image) < 2.5


def test_fractions_of_pixels_matter_where_pixels_are_few() -> None:
    image = picture(3, width=320, height=240)
    box = 11.0, 13.0, 173.0, 159.0
    pixels, scale = Encoded(encoded(image, quality=95)).decode_for((70, 80))
    scaled = tuple(side * scale for side in box)
    errors = []
    for resize in (resize_box, resize_crop):
        out = np.zeros((32, 32, 3), np.uint8)
        resize(pixels, scaled, "bilinear", out)
        errors.append(mean_error(box, out, image))
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize(
    ("ours", "theirs", "amount"),
    [
        (colour.brightened, tv.functional.adjust_brightness, 1.4),
        (colour.contrasted, tv.functional.adjust_contrast, 0.6),
        (colour.contrasted, tv.functional.adjust_contrast, 1.5),
        (colour.saturated, tv.functional.adjust_saturation, 0.3),
        (colour.hue_shifted, tv.functional.adjust_hue, -0.2),
    ],
)
def test_colours_change_as_in_torchvision(ours: Any, theirs: Any, amount: float) -> None:
    pixels = np.asarray(picture(width=64, height=64))
    expected = theirs(torch.from_numpy(pixels.copy()).permute(2, 0, 1), amount)
    difference = ours(pixels, amount).astype(int) - expected.permute(1, 2, 0).numpy()
    assert np.abs(difference).mean() < 2


def test_every_trivial_operation_runs_at_every_strength() -> None:
    pixels = np.asarray(picture(width=40, height=40)).copy()
    number = len(trivial._OPERATIONS)
    for which in np.arange(number) / number:
        for strength in (0.0, 0.5, 0.999):
            for sign in (0.0, 0.9):
                out = trivial.trivially_augmented(pixels, which, strength, sign, (9, 9, 9))
                assert out.shape == pixels.shape
                assert out.dtype == np.uint8
                if which > 0 and strength == 0.999:
                    assert (out != pixels).any()
