"""Which files are taken for images, and what Pillow does not see in them."""

import logging
import warnings
import zlib

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
# Listed wherever Pillow opens something: left to guess, it hands EPS bytes to Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_SCANS = 500  # encoders make ten, or one for each of a few bits of each colour
_START_OF_SCAN = b"\xff\xda"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")

# Of broken metadata Pillow warns on stderr; what is wrong with an image is told by its reason.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def check_whole(data: bytes) -> None:
    """Raise ValueError for what Pillow would not, or only after a very long time.

    That is a WebP cut short, and a progressive JPEG in scans without number: each takes a few
    bytes, and as long to decode as the whole image.
    """
    if data[8:12] == b"WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ValueError("truncated WebP")
    if data.startswith(b"\xff\xd8") and data.count(_START_OF_SCAN) > MAX_SCANS:
        raise ValueError(f"a JPEG in more than {MAX_SCANS} scans")


def bare(data: bytes) -> bytes:
    """A PNG without the chunks that hold no pixels of its first frame; any other bytes as they are.

    libpng would complain of such chunks on stderr whenever the image is decoded.

    Raises:
        ValueError: the checksum of a chunk is wrong, which Pillow ignores, or the end is missing.
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while kept[-1][4:8] != b"IEND":
        num_bytes = 12 + int.from_bytes(data[at : at + 4], "big")  # length, name, data, checksum
        chunk = data[at : at + num_bytes]
        if len(chunk) < num_bytes:
            raise ValueError("truncated PNG")
        if chunk[4:8] in _PNG_PIXELS:
            if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
                raise ValueError(f"wrong checksum in {chunk[4:8]!r}")
            kept.append(chunk)
        at += num_bytes
    return b"".join(kept)
