"""Bad and odd image files, built on the spot: what each is, and what must become of it."""

import io
import struct
import zipfile

import numpy as np
from odd_images import HEIGHT, PNG, UPRIGHT, WIDTH, Case, animations, bitmaps, jpegs, pngs, tiffs
from pictures import encoded, picture
from PIL import Image


def corpus() -> dict[str, Case]:
    return {
        **_not_images(),
        **_other_formats(),
        **_truncated(),
        **jpegs(),
        **pngs(),
        **tiffs(),
        **bitmaps(),
        **animations(),
        **_sizes(),
        **_exif(),
    }


def _not_images() -> dict[str, Case]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x.jpg", encoded(picture()))
    files = {
        "one byte": b"\xff",
        "null bytes": bytes(10_000),
        "text": b"not an image\n" * 20,
        "HTML error page": b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>",
        "JSON": b'{"error": "rate limit exceeded"}',
        "PDF": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="48" height="40"></svg>',
        "ZIP": archive.getvalue(),
        "gzip": b"\x1f\x8b\x08" + bytes(50),
        "MP4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(100),
        "program": b"\x7fELF\2\1\1" + bytes(100),
        "signature of a JPEG alone": b"\xff\xd8\xff",
        "signature of a PNG alone": PNG,
        "pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n",
    }
    short = {
        "empty": Case(b"", "empty"),
        "signature of a WebP alone": Case(b"RIFF\x1a\0\0\0WEBPVP8L", "truncated"),
    }
    return short | {k: Case(v, "unreadable") for k, v in files.items()}


def _other_formats() -> dict[str, Case]:
    """Pictures in formats that are not accepted: refused before any parser of theirs is run."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\n%%EndComments\nshowpage\n%%EOF\n"
    files = {
        "EPS": eps,
        "EPS behind a DOS header": b"\xc5\xd0\xd3\xc6"
        + struct.pack("<7I", 32, len(eps), *[0] * 5)
        + eps,
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        "AVIF": encoded(picture(), "AVIF"),
        "JPEG 2000": encoded(picture(), "JPEG2000"),
        "JPEG XL": b"\xff\x0a" + bytes(range(100)),
        "JPEG XL in a container": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100),
        "ICO": encoded(picture(), "ICO"),
        "TGA": encoded(picture(), "TGA"),
        "PCX": encoded(picture(), "PCX"),
        "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, HEIGHT, WIDTH, 8, 3) + bytes(99),
        "DDS": encoded(picture(), "DDS"),
        "XBM": encoded(picture().convert("1"), "XBM"),
        "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(100),
    }
    return {name: Case(data, "unreadable") for name, data in files.items()}


def _truncated() -> dict[str, Case]:
    large, smooth = noise(160, 200), picture(width=200, height=160)
    whole = {
        "JPEG": encoded(large),
        "progressive JPEG": encoded(large, progressive=True),
        "grey JPEG": encoded(large.convert("L")),
        "CMYK JPEG": encoded(large.convert("CMYK")),
        "PNG": encoded(large, "PNG"),
        "smooth PNG": encoded(smooth, "PNG"),
        "BMP": encoded(large, "BMP"),
        "PPM": encoded(large, "PPM"),
        "TIFF": encoded(large, "TIFF"),
        "TIFF with LZW": encoded(large, "TIFF", compression="tiff_lzw"),
        "lossy WebP": encoded(large, "WEBP"),
        "lossless WebP": encoded(large, "WEBP", lossless=True),
        "GIF": encoded(large, "GIF"),
    }
    cases = {}
    for name, data in whole.items():
        # Pillow writes the directory of a packed TIFF behind its pixels
        fate = "unreadable" if name == "TIFF with LZW" else "truncated"
        cases[f"{name}, two thirds"] = Case(data[: len(data) * 2 // 3], fate)
        cases[f"{name}, all but a little"] = Case(data[:-200], fate)
    return cases


def _sizes() -> dict[str, Case]:
    cases = {}
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"):
        for name, (width, height), fate in (
            ("too small", (100, 7), "too_small"),
            ("strip", (510, 10), "aspect"),
            ("just large enough", (8, 400), (400, 8)),
        ):
            cases[f"{kind}, {name}"] = Case(
                encoded(picture(width=width, height=height), kind), fate
            )
    return cases


def _exif() -> dict[str, Case]:
    cases = {}
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        for orientation in (0, 3, 6, 8, 9, 65535):
            exif = Image.Exif()
            exif[0x0112] = orientation
            fate = (WIDTH, HEIGHT) if orientation in (6, 8) else UPRIGHT
            cases[f"{kind}, orientation {orientation}"] = Case(
                encoded(picture(), kind, exif=exif), fate
            )
    garbage = {
        "of noise": bytes(range(256)),
        "header alone": b"Exif\0\0",
        "cut short": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        "in a ring": b"Exif\0\0MM\0*\0\0\0\x08\0\1\x87\x69\0\4\0\0\0\1\0\0\0\x08\0\0\0\x08",
        "far away": b"Exif\0\0II*\0\xff\xff\xff\x7f",
        "orientation as text": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\2\0\0\0x\0\0\0\0\0\0\0",
    }
    for name, exif in garbage.items():
        for kind in ("JPEG", "PNG", "WEBP"):
            cases[f"{kind}, EXIF {name}"] = Case(encoded(picture(), kind, exif=exif), UPRIGHT)
    return cases


def noise(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)
