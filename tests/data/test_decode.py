import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, picture
from PIL import Image
from simplejpeg import is_jpeg

from tlrunner.data.decode import (
    BadImage,
    Decoded,
    Encoded,
    decode,
    normalise,
)


def image_size(data: bytes) -> tuple[int, int]:
    return Encoded(data).size_hw


def decode_for(data: bytes, least_hw: tuple[int, int]) -> np.ndarray:
    return Encoded(data).decode_for(least_hw)[0]


def pixels_of(data: bytes) -> np.ndarray:
    return decode(normalise(data).data)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [True, False])
def test_a_plain_jpeg_is_kept_byte_for_byte(mode: str, progressive: bool) -> None:
    data = encoded(picture().convert(mode), progressive=progressive)
    stored = normalise(data)
    assert stored.data == data
    assert (stored.width, stored.height) == (48, 40)
    assert decode(stored.data).shape == (40, 48, 3)


def test_a_plain_png_is_kept_and_decoded_in_rgb_order() -> None:
    data = encoded(picture(), "PNG")
    assert normalise(data).data == data
    assert (pixels_of(data) == np.asarray(picture())).all()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    assert (pixels_of(encoded(picture(), kind)) == np.asarray(picture())).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif)
    from PIL import ImageOps

    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    stored = normalise(data)
    assert upright.shape[:2] == (stored.height, stored.width) == image_size(stored.data)
    error = np.abs(decode(stored.data) - upright)
    is_encoded_anew = kind == "JPEG" and orientation > 1
    assert error.mean() <= (1.5 if is_encoded_anew else 0)
    assert is_jpeg(stored.data) == (kind == "JPEG")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    levels = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    found = pixels_of(encoded(Image.fromarray(levels), kind))[:, :, 0]
    assert np.abs(found.astype(int) - levels / 257).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_turn_white(mode: str) -> None:
    image = Image.new(mode, (16, 16), (0,) * len(mode))
    assert (pixels_of(encoded(image, "PNG")) == 255).all()


def test_a_palette_with_a_transparent_colour_is_flattened() -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert (pixels_of(encoded(image, "PNG", transparency=0)) == (255, 0, 0)).all()
    assert (pixels_of(encoded(image, "PNG", transparency=1)) == 255).all()


def test_cmyk_is_converted_as_pillow_does() -> None:
    data = encoded(picture().convert("CMYK"))
    with Image.open(io.BytesIO(data)) as image:
        assert np.abs(pixels_of(data) - np.asarray(image.convert("RGB")).astype(int)).mean() < 1.5
    assert is_jpeg(normalise(data).data)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    data = encoded(picture(0), "WEBP", save_all=True, append_images=[picture(1)], lossless=True)
    assert (pixels_of(data) == np.asarray(picture(0))).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP"])
def test_a_file_cut_short_is_refused(kind: str) -> None:
    data = encoded(picture(width=200, height=200), kind)
    with pytest.raises(BadImage) as caught:
        normalise(data[: len(data) * 2 // 3])
    assert caught.value.reason in ("truncated", "unreadable")


def test_reasons_are_short_and_stable() -> None:
    reasons = {
        b"": "empty",
        b"GIF89a, not an image": "unreadable",
        b"%!PS-Adobe-3.0 EPSF-3.0": "unreadable",
        encoded(picture(width=7, height=40), "PNG"): "too_small",
        encoded(picture(width=510, height=10), "PNG"): "aspect",
        encoded(picture(width=200, height=200))[:1000]: "truncated",
    }
    for data, reason in reasons.items():
        with pytest.raises(BadImage) as caught:
            normalise(data)
        assert caught.value.reason == reason


def test_size_is_checked_before_pixels_are_decoded() -> None:
    header_only = encoded(picture(width=100, height=100), "PNG")[:60]
    with pytest.raises(BadImage, match="too_large: 100x100"):
        normalise(header_only, max_pixels=9_999)


def test_a_photo_is_decoded_small_when_that_is_enough() -> None:
    data = encoded(picture(width=400, height=320), quality=95)
    assert decode_for(data, (160, 200)).shape == (160, 200, 3)
    assert decode_for(data, (161, 200)).shape == (320, 400, 3)
    assert decode_for(data, (40, 40)).shape[0] < 80
    small = np.asarray(Image.fromarray(decode(data)).resize((200, 160), Image.Resampling.BOX))
    assert np.abs(decode_for(data, (160, 200)).astype(int) - small).mean() < 1


@pytest.mark.parametrize("data", [b"", b"x" * 100, encoded(picture())[:300], b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_longer_an_image_are_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        image_size(data)
        decode(data)


def noisy(width: int, height: int) -> Image.Image:
    """A picture every row of which differs from the next in brightness and colour."""
    smooth = np.asarray(picture(width=width, height=height)).astype(int)
    noise = np.random.default_rng(0).integers(-40, 40, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


@settings(deadline=None)
@given(
    st.integers(60, 200),
    st.integers(40, 120),
    st.sampled_from(["444", "422", "420", "440", "411", "Gray"]),
    st.floats(1, 200),
    st.sampled_from([1, 2, 3, 4, 8]),
)
def test_upper_rows_are_the_same_pixels_without_the_lower_ones(
    height: int, width: int, sampling: str, bottom: float, eighths: int
) -> None:
    pixels = np.asarray(noisy(width, height))
    grey = sampling == "Gray"
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels[:, :, :1]) if grey else pixels,
        colorspace="GRAY" if grey else "RGB",
        colorsubsampling=sampling,
    )
    least_hw = (height * eighths // 8, width * eighths // 8)
    whole, scale = Encoded(data).decode_for(least_hw)
    upper, same_scale = Encoded(data).decode_for(least_hw, min(bottom, height))
    wanted = int(np.ceil(min(bottom, height) * scale))
    assert scale == same_scale
    assert len(upper) >= min(wanted, len(whole))
    assert (upper[:wanted] == whole[:wanted]).all()


def test_lower_rows_are_not_decoded_where_they_are_not_wanted() -> None:
    upper, _ = Encoded(encoded(noisy(200, 300))).decode_for((300, 200), bottom=90)
    assert upper.shape == (96, 200, 3)


def with_restart_markers(image: Image.Image) -> bytes:
    return encoded(image, restart_marker_rows=1)


def one_scan_a_colour(image: Image.Image) -> bytes:
    """The same JPEG, said to hold only one of its colours in its first scan."""
    data = bytearray(encoded(image))
    data[data.index(b"\xff\xda") + 4] = 1
    return bytes(data)


@pytest.mark.parametrize("data", [encoded(noisy(200, 300), progressive=True), b""])
def test_a_jpeg_whose_rows_do_not_come_in_turn_is_decoded_whole(data: bytes) -> None:
    data = data or with_restart_markers(noisy(200, 300))
    upper, _ = Encoded(data).decode_for((300, 200), bottom=90)
    assert (upper == decode(data)).all()
    assert len(upper) == 300


def test_of_a_jpeg_in_several_scans_the_height_is_left_alone() -> None:
    assert Encoded(encoded(noisy(200, 300)))._height_at is not None
    assert Encoded(one_scan_a_colour(noisy(200, 300)))._height_at is None


def test_damage_in_the_rows_that_are_wanted_is_found() -> None:
    data = bytearray(encoded(noisy(200, 300), quality=90))
    middle = data.index(b"\xff\xda") + 2000
    data[middle : middle + 2] = b"\xff\xd9"  # the image ends here, says the file
    with pytest.raises(BadImage):
        Encoded(bytes(data)).decode_for((300, 200), bottom=200)


def test_the_header_is_read_past_padding_and_other_segments() -> None:
    data = encoded(picture(), comment=b"\xff\xc0 is no frame here", exif=Image.Exif())
    padded = data[:2] + b"\xff\xff" + data[2:]
    assert image_size(padded) == image_size(data) == (40, 48)
    assert (decode(padded) == decode(data)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_header_without_pixels_is_refused(kind: str) -> None:
    data = bytearray(encoded(picture(), kind))
    place = data.index(b"\xff\xc0") + 5 if kind == "JPEG" else 20
    data[place : place + 4] = bytes(4)
    with pytest.raises(BadImage, match="no pixels"):
        Encoded(bytes(data))


def test_decoded_pixels_are_given_as_they_are() -> None:
    pixels = np.asarray(picture())
    image = Decoded(pixels)
    assert image.size_hw == (40, 48)
    assert image.decode_for((3, 3), bottom=5) == (pixels, 1.0)
