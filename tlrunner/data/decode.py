"""What counts as an image, and how its bytes become pixels.

Writing: `normalise` turns whatever a user has into plain JPEG or PNG, or raises `BadImage`.
Reading: a `Picture` gives those stored bytes' pixels, which are everywhere (height, width, 3) uint8
RGB, and no more of them than a view needs. A plain JPEG is kept byte for byte, one that had to be
turned or converted is encoded anew; all else that can be read is stored losslessly as PNG. (A photo
as PNG takes ten times the bytes and the time.) Colour profiles are ignored, as in pretraining.
"""

import io
import math
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from tlrunner.data.formats import FORMATS, PNG_SIGNATURE, bare, check_whole

Pixels = NDArray[np.uint8]

_JPEG_SIGNATURE = b"\xff\xd8"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start-of-frame markers
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)  # with Huffman codes
MIN_SIDE, MAX_ASPECT = 8, 50
MAX_PIXELS = 1_000_000_000  # of what is stored, whatever a shard from elsewhere claims
_JPEG_FORMATS = ("JPEG", "MPO")


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
        check_whole(data)
        # Pillow raises whatever its parsers meet: SyntaxError, struct.error, zlib.error and more
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, max_pixels)
            if image.format not in _JPEG_FORMATS:
                image.load()  # asked for the EXIF of a PNG, Pillow loads it and forgets the error
            data = bare(data)
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
    if keep:
        return StoredImage(data, width, height)
    was_jpeg = image.format in _JPEG_FORMATS
    return StoredImage(encode_jpeg(pixels) if was_jpeg else encode_png(pixels), width, height)


def is_encoded_anew(image: Image.Image) -> bool:
    """Whether `normalise` stores a file of Pillow's as another JPEG than it is."""
    is_plain = image.mode in ("RGB", "L") and _orientation(image) == 1
    return image.format in _JPEG_FORMATS and not is_plain


def upright_rgb(image: Image.Image) -> Pixels:
    """An image of Pillow -> its pixels: turned as EXIF says, on white, 16 bits scaled to 8.

    Raises:
        BadImage: samples of 32 bits, or fractions.
    """
    image.load()  # before asking for the orientation: Pillow turns a TIFF as it loads it
    return np.ascontiguousarray(_turned(_rgb(image), _orientation(image)))


def encode_jpeg(pixels: Pixels) -> bytes:
    """(height, width, 3) RGB -> JPEG bytes of quality 95, with full colour resolution."""
    return bytes(simplejpeg.encode_jpeg(pixels, 95, colorsubsampling="444"))


def encode_png(pixels: Pixels) -> bytes:
    """(height, width, 3) RGB -> PNG bytes."""
    ok, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    assert ok
    return bytes(encoded)


class Picture(Protocol):
    """What a view is rendered from: an image whose size is known before its pixels are.

    Attributes:
        size_hw: height and width of the whole image, in pixels.
    """

    @property
    def size_hw(self) -> tuple[int, int]: ...

    def decode_for(
        self, least_hw: tuple[int, int], bottom: float | None = None
    ) -> tuple[Pixels, float]:
        """Pixels, and how much smaller they are than `size_hw` says (a scale of 1/8 to 1).

        `least_hw`: the whole image is wanted at least this high and wide. `bottom`: rows below it,
        in pixels of the whole image, are not wanted, and may be missing; None: all are wanted.

        Raises:
            BadImage: the bytes are not what was once stored.
        """


class Decoded:
    """Pixels that were decoded before: (height, width, 3) uint8 RGB."""

    __slots__ = ("pixels_HWC", "size_hw")

    def __init__(self, pixels_HWC: Pixels) -> None:
        self.pixels_HWC = pixels_HWC
        self.size_hw: tuple[int, int] = pixels_HWC.shape[:2]

    def decode_for(
        self, least_hw: tuple[int, int], bottom: float | None = None
    ) -> tuple[Pixels, float]:
        return self.pixels_HWC, 1.0


class Encoded:
    """Stored JPEG or PNG bytes, of which the header was read.

    Raises:
        BadImage: the bytes are not what was once stored.
    """

    __slots__ = ("_data", "_height_at", "_is_jpeg", "size_hw")

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = data
        self._height_at: int | None = None
        self._is_jpeg = data[:2] == _JPEG_SIGNATURE
        if self._is_jpeg:
            *size_hw, self._height_at = _jpeg_header(data)
            self.size_hw: tuple[int, int] = (size_hw[0], size_hw[1])
        elif data[:8] == PNG_SIGNATURE and len(data) >= 24:
            height, width = data[20:24], data[16:20]
            self.size_hw = int.from_bytes(height, "big"), int.from_bytes(width, "big")
        else:
            raise BadImage("unreadable", "neither JPEG nor PNG")
        if not 0 < math.prod(self.size_hw) <= MAX_PIXELS:
            raise BadImage("unreadable", "a header that says it has no pixels, or too many")

    def decode_for(
        self, least_hw: tuple[int, int], bottom: float | None = None
    ) -> tuple[Pixels, float]:
        if not self._is_jpeg:
            return self._decode_png(), 1.0
        eighths = _fewest_eighths(self.size_hw, least_hw)
        pixels = None if bottom is None else self._first_rows(bottom, eighths)
        return self._all_rows(eighths) if pixels is None else pixels, eighths / 8

    def _decode_png(self) -> Pixels:
        try:
            pixels = cv2.imdecode(np.frombuffer(self._data, np.uint8), cv2.IMREAD_COLOR_RGB)
        except cv2.error as err:
            raise _bad(err) from err
        if pixels is None:
            raise BadImage("unreadable")
        return np.asarray(pixels, np.uint8)

    def _all_rows(self, eighths: int) -> Pixels:
        try:
            return np.asarray(simplejpeg.decode_jpeg(self._data, **_at(self.size_hw, eighths)))
        except ValueError as err:
            raise _bad(err) from err

    def _first_rows(self, bottom: float, eighths: int) -> Pixels | None:
        """Rows down to `bottom` at least, or None where that would not save anything.

        The height in the header is made smaller: the decoder stops there, and then complains of
        the bytes that remain. It reports the first complaint it has, so a decoder that names these
        had nothing against what it decoded. Any other complaint is left to a decoding in full.
        """
        # Below a row of pixels the decoder looks at one more of colours, which may be two rows.
        rows = 16 * math.ceil((bottom + 2 * 8 / eighths) / 16)
        if self._height_at is None or rows >= self.size_hw[0]:
            return None
        shortened = bytearray(self._data)
        shortened[self._height_at : self._height_at + 2] = rows.to_bytes(2, "big")
        width = self.size_hw[1]
        pixels = np.empty((rows * eighths // 8, -(-width * eighths // 8), 3), np.uint8)
        try:
            simplejpeg.decode_jpeg(shortened, buffer=pixels, **_at((rows, width), eighths))
        except ValueError as err:
            if not str(err).endswith("extraneous bytes before marker 0xd9"):
                return None
        return pixels


def decode(data: bytes | memoryview) -> Pixels:
    """Stored bytes -> all their pixels.

    Raises:
        BadImage: they are not what was once stored.
    """
    picture = Encoded(data)
    return picture.decode_for(picture.size_hw)[0]


def _jpeg_header(data: bytes | memoryview) -> tuple[int, int, int | None]:
    """(height, width, where the height stands), the last None if it must not be changed.

    It can be where rows follow each other in one scan: neither progressive, nor one scan a colour,
    nor with restart markers, which the decoder would complain of instead of the bytes that remain.
    """
    frame_at, can_shorten, at = 0, True, 2
    try:
        while data[at + 1] != 0xDA:  # start of scan
            marker = data[at + 1]
            if data[at] != 0xFF:
                raise BadImage("unreadable", f"no marker at byte {at} of the JPEG header")
            if marker == 0xFF:  # padding
                at += 1
                continue
            if marker in _FRAMES:
                frame_at, can_shorten = at, can_shorten and marker in _SEQUENTIAL_FRAMES
            elif marker == 0xDD:  # restart interval
                can_shorten = False
            at += 2 + (data[at + 2] << 8 | data[at + 3])
        can_shorten = can_shorten and data[at + 4] == data[frame_at + 9]  # all colours in the scan
    except IndexError as err:
        raise BadImage("truncated", "the JPEG header has no end") from err
    if not frame_at:
        raise BadImage("unreadable", "the JPEG header has no size")
    height = data[frame_at + 5] << 8 | data[frame_at + 6]
    width = data[frame_at + 7] << 8 | data[frame_at + 8]
    return height, width, frame_at + 5 if can_shorten else None


def _fewest_eighths(size_hw: tuple[int, int], least_hw: tuple[int, int]) -> int:
    """At how many eighths of its size a JPEG is large enough.

    A JPEG scaled down while it is decoded costs a fraction of one that is resized afterwards; from
    five eighths on it costs more.
    """
    (height, width), (least_height, least_width) = size_hw, least_hw
    # that n eighths, rounded up, are enough means that n > 8 * (least - 1) / side
    eighths = 1 + max(8 * (least_height - 1) // height, 8 * (least_width - 1) // width, 0)
    return eighths if eighths <= 4 else 8


def _at(size_hw: tuple[int, int], eighths: int) -> dict[str, int]:
    """What makes simplejpeg decode an image of this size at so many eighths of it."""
    if eighths == 8:
        return {}
    height, width = (-(-side * eighths // 8) for side in size_hw)
    return {"min_height": height, "min_width": width, "min_factor": 2}


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
    return image.format in _JPEG_FORMATS and image.mode in ("RGB", "L")


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
