"""Odd and damaged files of the accepted formats, and what must become of each."""

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from pictures import encoded, picture
from PIL import Image

HEIGHT, WIDTH = 40, 48
UPRIGHT = (HEIGHT, WIDTH)
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Case:
    """A file and its fate: the reason to refuse it, or the (height, width) it is stored with.

    `like`: the RGB picture that it shows, where that is known; `tolerance`: in mean levels.
    """

    data: bytes
    fate: str | tuple[int, int]
    like: Image.Image | None = None
    tolerance: float = 0


def jpegs() -> dict[str, Case]:
    rgb, cmyk, grey = picture(), picture().convert("CMYK"), picture().convert("L")
    plain = encoded(rgb, quality=95)
    ycck = encoded(cmyk).replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2")
    start = plain.index(b"\xff\xda") + 20
    return {
        "JPEG": Case(plain, UPRIGHT, rgb, 3),
        "progressive JPEG": Case(encoded(rgb, progressive=True), UPRIGHT, rgb, 6),
        "grey JPEG": Case(encoded(grey), UPRIGHT, grey, 4),
        "CMYK JPEG": Case(encoded(cmyk), UPRIGHT, rgb, 6),
        "YCCK JPEG": Case(ycck, UPRIGHT),
        "JPEG without its end": Case(plain[:-2], "truncated"),
        "JPEG with garbage behind its end": Case(plain + b"garbage" * 99, UPRIGHT, rgb, 3),
        "two JPEGs, one behind the other": Case(plain + encoded(picture(5)), UPRIGHT, rgb, 3),
        "JPEG with garbage before it": Case(b"\r\n" + plain, "unreadable"),
        "JPEG with a marker inside its scan": Case(
            plain[: start + 99] + b"\xff\xd9\xff\xd9" + plain[start + 103 :], "truncated"
        ),
        "JPEG with a scan of noise": Case(
            plain[:start] + bytes(range(256)) * 8 + b"\xff\xd9", "unreadable"
        ),
        "JPEG without tables": Case(plain.replace(b"\xff\xdb", b"\xff\xfe"), "unreadable"),
        "JPEG of height 0": Case(_resized_jpeg(plain, 0, WIDTH), "unreadable"),
        "JPEG that claims more rows": Case(_resized_jpeg(plain, 4000, WIDTH), "aspect"),
        "JPEG that claims twice its rows": Case(_resized_jpeg(plain, 80, WIDTH), "truncated"),
        "JPEG that claims 65500x65500": Case(_resized_jpeg(plain, 65500, 65500), "too_large"),
        "MPO of two views": Case(
            encoded(rgb, "MPO", save_all=True, append_images=[picture(1)], quality=95),
            UPRIGHT,
            rgb,
            3,
        ),
        "JPEG with an ICC profile of garbage": Case(
            encoded(rgb, quality=95, icc_profile=b"garbage" * 20), UPRIGHT, rgb, 3
        ),
        "JPEG with a comment of 60 kB": Case(
            encoded(rgb, quality=95, comment=b"x" * 60_000), UPRIGHT, rgb, 3
        ),
    }


def _resized_jpeg(data: bytes, height: int, width: int) -> bytes:
    """A JPEG whose header claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def pngs() -> dict[str, Case]:
    rgb = picture()
    plain = encoded(rgb, "PNG")
    levels = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(UPRIGHT)
    shown = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    white = Image.new("RGB", (WIDTH, HEIGHT), "white")
    palette = rgb.quantize(64)
    wrong_crc = bytearray(plain)
    wrong_crc[29] ^= 1
    wrong_data_crc = bytearray(plain)
    wrong_data_crc[plain.index(b"IEND") - 5] ^= 1
    bomb = zlib.compress(bytes(80 << 20))
    return {
        "PNG": Case(plain, UPRIGHT, rgb),
        "1-bit PNG": Case(encoded(rgb.convert("1"), "PNG"), UPRIGHT, rgb.convert("1")),
        "palette PNG": Case(encoded(palette, "PNG"), UPRIGHT, palette),
        "palette PNG, all transparent": Case(
            encoded(palette, "PNG", transparency=bytes(64)), UPRIGHT, white
        ),
        "RGBA PNG, all transparent": Case(
            encoded(Image.new("RGBA", (WIDTH, HEIGHT), (9, 9, 9, 0)), "PNG"), UPRIGHT, white
        ),
        "RGBA PNG, opaque": Case(encoded(rgb.convert("RGBA"), "PNG"), UPRIGHT, rgb),
        "LA PNG, all transparent": Case(
            encoded(Image.new("LA", (WIDTH, HEIGHT), (9, 0)), "PNG"), UPRIGHT, white
        ),
        "RGB PNG with one transparent colour": Case(
            encoded(Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
            UPRIGHT,
            white,
        ),
        "grey PNG": Case(encoded(rgb.convert("L"), "PNG"), UPRIGHT, rgb.convert("L")),
        "16-bit grey PNG": Case(encoded(Image.fromarray(levels), "PNG"), UPRIGHT, shown),
        "16-bit RGB PNG": Case(_png16(rgb), UPRIGHT, rgb, 0.01),
        "interlaced PNG": Case(
            _interlaced_png(), UPRIGHT, Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128))
        ),
        "PNG with a wrong CRC in its header": Case(bytes(wrong_crc), "unreadable"),
        "PNG with a wrong CRC in its data": Case(bytes(wrong_data_crc), "unreadable"),
        "PNG without data": Case(PNG + _header(WIDTH, HEIGHT) + _chunk(b"IEND", b""), "unreadable"),
        "PNG with data of noise": Case(
            PNG
            + _header(WIDTH, HEIGHT)
            + _chunk(b"IDAT", bytes(range(200)))
            + _chunk(b"IEND", b""),
            "unreadable",
        ),
        "PNG with too little data": Case(
            PNG
            + _header(WIDTH, HEIGHT)
            + _chunk(b"IDAT", zlib.compress(bytes(500)))
            + _chunk(b"IEND", b""),
            "truncated",
        ),
        "PNG with a zTXt bomb": Case(_with_chunk(plain, b"zTXt", b"x\0\0" + bomb), "unreadable"),
        "PNG with an iTXt bomb": Case(
            _with_chunk(plain, b"iTXt", b"x\0\1\0\0\0" + bomb), "unreadable"
        ),
        "PNG with an iCCP bomb": Case(_with_chunk(plain, b"iCCP", b"x\0\0" + bomb), "unreadable"),
        "PNG with text": Case(
            _with_chunk(plain, b"zTXt", b"x\0\0" + zlib.compress(b"text")), UPRIGHT, rgb
        ),
        "PNG of width 0": Case(_png(0, HEIGHT, b"\0" * HEIGHT), "unreadable"),
        "PNG of 99 megapixels, hardly more than a header": Case(
            _png(11_000, 9_000, b""), "too_large"
        ),
        "PNG of 400 megapixels in 400 kB": Case(
            _png(20_000, 20_000, bytes(20_000 * 2_501), bits=1), "too_large"
        ),
        "PNG of a size beyond 32 bits": Case(_png(2**31, 2**31, b""), "too_large"),
    }


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _header(width: int, height: int, bits: int = 8, colour: int = 0, interlaced: int = 0) -> bytes:
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))


def _png(
    width: int, height: int, rows: bytes, bits: int = 8, colour: int = 0, interlaced: int = 0
) -> bytes:
    header = _header(width, height, bits, colour, interlaced)
    return PNG + header + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _png16(image: Image.Image) -> bytes:
    values = np.asarray(image).astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return _png(image.width, image.height, rows, bits=16, colour=2)


def _interlaced_png() -> bytes:
    """All grey, so that only the number of rows in each of the seven passes matters."""
    starts_steps = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    passes = [
        (len(range(x, WIDTH, dx)), len(range(y, HEIGHT, dy))) for x, y, dx, dy in starts_steps
    ]
    rows = b"".join((b"\0" + b"\x80" * width) * height for width, height in passes)
    return _png(WIDTH, HEIGHT, rows, interlaced=1)


def _with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    return png[:33] + _chunk(kind, data) + png[33:]


def tiffs() -> dict[str, Case]:
    rgb = picture()
    grey16 = Image.fromarray(np.full(UPRIGHT, 257 * 100, np.uint16))
    pages = {"save_all": True, "append_images": [picture(1), picture(2)]}
    packed = {
        f"TIFF packed by {name}": Case(encoded(rgb, "TIFF", compression=name), UPRIGHT, rgb)
        for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma")
    }
    return packed | {
        "TIFF": Case(encoded(rgb, "TIFF"), UPRIGHT, rgb),
        "TIFF packed as JPEG": Case(
            encoded(rgb, "TIFF", compression="jpeg", quality=95), UPRIGHT, rgb, 6
        ),
        "TIFF of a fax": Case(
            encoded(rgb.convert("1"), "TIFF", compression="group4"), UPRIGHT, rgb.convert("1")
        ),
        "TIFF of several pages": Case(encoded(rgb, "TIFF", **pages), UPRIGHT, rgb),
        "TIFF in CMYK": Case(encoded(rgb.convert("CMYK"), "TIFF"), UPRIGHT, rgb, 1),
        "TIFF in Lab": Case(encoded(Image.new("LAB", (WIDTH, HEIGHT)), "TIFF"), UPRIGHT),
        "16-bit TIFF": Case(encoded(grey16, "TIFF"), UPRIGHT, Image.new("L", (WIDTH, HEIGHT), 100)),
        "32-bit TIFF": Case(
            encoded(Image.fromarray(np.full(UPRIGHT, 1 << 20, np.int32)), "TIFF"), "unreadable"
        ),
        "TIFF of fractions": Case(
            encoded(Image.fromarray(np.full(UPRIGHT, 0.5, np.float32)), "TIFF"), "unreadable"
        ),
        "TIFF whose directory lies outside": Case(
            b"II*\0" + struct.pack("<I", 1 << 30) + bytes(100), "unreadable"
        ),
        "TIFF of 2048 samples a pixel": Case(_with_tag(277, 2048), "unreadable"),
        "TIFF whose directory is a ring": Case(_ring(), UPRIGHT, rgb),
    }


def _with_tag(tag: int, value: int) -> bytes:
    """A TIFF with another number for one of its tags."""
    data = bytearray(encoded(picture(), "TIFF"))
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into("<I", data, entry + 8, value)
    return bytes(data)


def _ring() -> bytes:
    """A TIFF whose first page names itself as the next."""
    data = bytearray(encoded(picture(), "TIFF"))
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    struct.pack_into("<I", data, at + 2 + 12 * count, at)
    return bytes(data)


def bitmaps() -> dict[str, Case]:
    rgb = picture()
    grey = rgb.convert("L")
    ascii_ppm = f"P3\n# a comment\n{WIDTH} {HEIGHT}\n255\n" + " ".join(
        map(str, np.asarray(rgb).ravel())
    )
    ascii_pgm = f"P2 {WIDTH} {HEIGHT} 255\n" + "\n".join(map(str, np.asarray(grey).ravel()))
    return {
        "BMP": Case(encoded(rgb, "BMP"), UPRIGHT, rgb),
        "BMP with run lengths": Case(
            _rle_bmp(), UPRIGHT, Image.new("RGB", (WIDTH, HEIGHT), (9, 8, 7))
        ),
        "BMP from the top down": Case(_flipped_bmp(), UPRIGHT, rgb),
        "BMP whose pixels lie outside": Case(
            encoded(rgb, "BMP")[:10] + struct.pack("<I", 1 << 30) + encoded(rgb, "BMP")[14:],
            "truncated",
        ),
        "PPM as text": Case(ascii_ppm.encode(), UPRIGHT, rgb),
        "PGM as text": Case(ascii_pgm.encode(), UPRIGHT, grey),
        "PPM of words": Case(b"P3 48 40 255 " + b"red " * 5760, "unreadable"),
        "PBM": Case(encoded(rgb.convert("1"), "PPM"), UPRIGHT, rgb.convert("1")),
        "PPM of negative width": Case(b"P6 -48 40 255\n" + bytes(9999), "unreadable"),
    }


def _rle_bmp() -> bytes:
    """8 bits with run lengths, all of colour 1."""
    pixels = (bytes([WIDTH, 1]) + b"\0\0") * HEIGHT + b"\0\1"
    palette = bytes(4) + bytes([7, 8, 9, 0]) + bytes(4 * 254)
    info = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 8, 1, len(pixels), 2835, 2835, 256, 0)
    offset = 14 + len(info) + len(palette)
    return (
        b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + info + palette + pixels
    )


def _flipped_bmp() -> bytes:
    data = bytearray(encoded(picture().transpose(Image.Transpose.FLIP_TOP_BOTTOM), "BMP"))
    struct.pack_into("<i", data, 22, -HEIGHT)
    return bytes(data)


def animations() -> dict[str, Case]:
    """Their first frames."""
    rgb = picture()
    frames = {"save_all": True, "append_images": [picture(1), picture(2)], "duration": 50}
    indexed = rgb.quantize(64)
    white = Image.new("RGB", (WIDTH, HEIGHT), "white")
    return {
        "GIF": Case(encoded(indexed, "GIF"), UPRIGHT, indexed),
        "animated GIF": Case(
            encoded(indexed, "GIF", save_all=True, append_images=[picture(1).quantize(64)]),
            UPRIGHT,
            indexed,
        ),
        "GIF, all transparent": Case(
            encoded(Image.new("P", (WIDTH, HEIGHT), 0), "GIF", transparency=0), UPRIGHT, white
        ),
        "GIF of one pixel": Case(encoded(Image.new("P", (1, 1)), "GIF"), "too_small"),
        "animated PNG": Case(encoded(rgb, "PNG", **frames), UPRIGHT, rgb),
        "animated PNG with another default image": Case(
            encoded(rgb, "PNG", default_image=True, **frames), UPRIGHT, rgb
        ),
        "animated WebP": Case(encoded(rgb, "WEBP", lossless=True, **frames), UPRIGHT, rgb),
        "lossy WebP": Case(encoded(rgb, "WEBP", quality=95), UPRIGHT, rgb, 6),
        "lossless WebP": Case(encoded(rgb, "WEBP", lossless=True), UPRIGHT, rgb),
        "WebP, all transparent": Case(
            encoded(
                Image.new("RGBA", (WIDTH, HEIGHT), (9, 9, 9, 0)), "WEBP", lossless=True, exact=True
            ),
            UPRIGHT,
            white,
        ),
    }
