"""What counts as an image, and how its bytes become pixels.

Writing: `normalise` turns whatever a user has into plain JPEG or PNG, or raises `BadImage`.
Reading: `decode` and `decode_for` turn those stored bytes into pixels, which are everywhere
(height, width, 3) uint8 RGB. A plain JPEG is kept byte for byte; all else that can be read is
stored losslessly as PNG. Colour profiles are ignored, as when the backbones were pretrained.
"""

import io
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
# Listed wherever Pillow opens something: left to guess, it hands EPS bytes to Ghostscript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MIN_SIDE, MAX_ASPECT = 8, 50


class BadImage(Exception):  # noqa: N818  (a finding about the data, counted and reported)
    """An image that cannot be used: a short stable `reason`, and a detail for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class StoredImage:
    """A normalised image: JPEG or PNG bytes, and its size in pixels."""

    data: bytes
    width: int
    height: int


def normalise(data: bytes, max_pixels: int = 50_000_000) -> StoredImage:
    """Bytes of any accepted format -> bytes worth storing, upright and 8-bit.

    Raises:
        BadImage: empty, unreadable, truncated, too_small, too_large, or aspect (a strip).
    """
    if not data:
        raise BadImage("empty")
    try:
        # Pillow raises whatever its parsers meet: SyntaxError, struct.error, zlib.error and more
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(image.size, max_pixels)
            upright = _orientation(image) == 1
            if upright and _is_plain_jpeg(image, data):
                return _verified_jpeg(data)
            pixels = upright_rgb(image)
            keep = upright and _is_plain_png(image)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise BadImage("too_large", str(err)) from err
    except Exception as err:
        raise _bad(err) from err
    height, width = pixels.shape[:2]
    return StoredImage(data if keep else encode_png(pixels), width, height)


def upright_rgb(image: Image.Image) -> Pixels:
    """An image of Pillow -> its pixels: turned as EXIF says, on white, 16 bits scaled to 8.

    Raises:
        BadImage: samples of 32 bits, or fractions.
    """
    image.load()  # before asking for the orientation: Pillow turns a TIFF as it loads it
    return np.ascontiguousarray(_turned(_rgb(image), _orientation(image)))


def encode_png(pixels: Pixels) -> bytes:
    """(height, width, 3) RGB -> PNG bytes."""
    ok, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    assert ok
    return bytes(encoded)


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """(height, width) of stored bytes, from their header.

    Raises:
        BadImage: they are not what was once stored.
    """
    if bytes(data[:8]) == _PNG_SIGNATURE and len(data) >= 24:
        return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError as err:
        raise _bad(err) from err
    return int(height), int(width)


def decode(data: bytes | memoryview) -> Pixels:
    """Stored bytes -> all their pixels.

    Raises:
        BadImage: they are not what was once stored.
    """
    return decode_for(data, (0, 0))


def decode_for(data: bytes | memoryview, least_hw: tuple[int, int]) -> Pixels:
    """Stored bytes -> pixels, at an eighth to a half of their size if that is enough.

    `least_hw`: the whole image is wanted at least this high and wide; (0, 0) means in full. A JPEG
    scaled down while it is decoded costs a fraction of one that is resized afterwards.
    """
    try:
        if simplejpeg.is_jpeg(data):
            if least_hw == (0, 0):
                return np.asarray(simplejpeg.decode_jpeg(data))
            height, width = least_hw
            return np.asarray(
                simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=2)
            )
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except (ValueError, cv2.error) as err:
        raise _bad(err) from err
    if pixels is None:
        raise BadImage("unreadable")
    return np.asarray(pixels, np.uint8)


def _check_size(size_wh: tuple[int, int], max_pixels: int) -> None:
    width, height = size_wh
    size = f"{width}x{height}"
    if width * height > max_pixels:
        raise BadImage("too_large", f"{size}, at most {max_pixels:,} pixels")
    if min(width, height) < MIN_SIDE:
        raise BadImage("too_small", f"{size}, at least {MIN_SIDE} each way")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage("aspect", f"{size}, at most {MAX_ASPECT}:1")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # noqa: BLE001  (broken EXIF is common, and no reason to lose an image)
        return 1


def _is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg_header(data)
    except ValueError:  # a legal but rare subsampling, which only Pillow reads
        return False
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _is_plain_png(image: Image.Image) -> bool:
    return image.format == "PNG" and image.mode == "RGB" and not image.has_transparency_data


def _verified_jpeg(data: bytes) -> StoredImage:
    height, width = simplejpeg.decode_jpeg(data, strict=True).shape[:2]
    return StoredImage(data, width, height)


def _rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):  # 16 bits: convert("RGB") would clip at 255
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("unreadable", "32-bit samples")
        grey = np.rint(values / 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise BadImage("unreadable", "floating-point samples")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Apply one of the eight orientations of EXIF; anything else means upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _bad(err: Exception) -> BadImage:
    detail = str(err)
    cut_short = ("truncated", "premature", "incomplete", "unexpected end")
    truncated = any(word in detail.lower() for word in cut_short)
    return BadImage("truncated" if truncated else "unreadable", detail)
