"""Small files that would unfold beyond all measure: refused before they take memory or time.

Each batch is read in a process of its own, whose largest memory is compared before and after.
"""

import base64
import io
import json
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE = 60_000
MOST_MIB = 100
PATIENCE_SECONDS = 15  # of computing, most of it imports; a busy machine takes longer

IMAGES = """
import base64, json, sys
from tlrunner.data.decode import BadImage, decode, normalise

def mib():
    status = open("/proc/self/status").read()  # getrusage knows of the parent's memory as well
    return int(status.split("VmHWM:")[1].split()[0]) >> 10

def fate(function, data):
    try:
        function(data)
        return "taken"
    except BadImage as bad:
        return bad.reason

files = {name: base64.b64decode(data) for name, data in json.load(sys.stdin).items()}
function, before = {"normalise": normalise, "decode": decode}[sys.argv[1]], mib()
fates = {name: fate(function, data) for name, data in files.items()}
print(json.dumps({"fates": fates, "mib": mib() - before}))
"""

CONFIGS = """
import json, sys
from tlrunner.cli import run_job
from tlrunner.jobconfig import JobConfig

def mib():
    status = open("/proc/self/status").read()  # getrusage knows of the parent's memory as well
    return int(status.split("VmHWM:")[1].split()[0]) >> 10

before = mib()
codes = {f: run_job("tune", JobConfig, "none:none", argv=["--config", f]) for f in sys.argv[1:]}
print(json.dumps({"codes": codes, "mib": mib() - before}))
"""


def encoded(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 127, np.uint8)).save(file, kind, **options)
    return file.getvalue()


def jpeg(side: int, **options: object) -> bytes:
    """A JPEG that claims another size."""
    data = bytearray(encoded("JPEG", **options))
    frame = data.index(b"\xff\xc2" if options else b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def png(side: int, pixels: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(side: int) -> bytes:
    data = encoded("TIFF")
    for tag in (256, 257):  # width and length, each one short at first
        at = data.index(struct.pack("<HHI", tag, 4, 1))
        data = data[: at + 8] + struct.pack("<I", side) + data[at + 12 :]
    return data


def webp(side: int) -> bytes:
    data = bytearray(encoded("WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little") >> 28 << 28
    data[at : at + 4] = (bits | (side - 1) << 14 | (side - 1)).to_bytes(4, "little")
    return bytes(data)


def gif(side: int) -> bytes:
    data = bytearray(encoded("GIF"))
    data[6:10] = struct.pack("<HH", side, side)
    return bytes(data)


def bmp(side: int) -> bytes:
    data = bytearray(encoded("BMP"))
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


def in_many_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan comes so often; turned, so that Pillow decodes it."""
    exif = Image.Exif()
    exif[0x0112] = 3
    data = jpeg(5000, progressive=True, exif=exif)
    scan = data[data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda")) : -2]
    return data[:-2] + number * scan + b"\xff\xd9"


def be_patient() -> None:
    """In a new process: its computing time is bounded, however busy the machine is."""
    resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE_SECONDS, PATIENCE_SECONDS))


def read(function: str, files: dict[str, bytes]) -> tuple[dict[str, str], int]:
    """What became of each file, and by how many MiB the process grew."""
    done = subprocess.run(
        [sys.executable, "-c", IMAGES, function],
        input=json.dumps({name: base64.b64encode(data).decode() for name, data in files.items()}),
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=be_patient,
    )
    found = json.loads(done.stdout)
    return found["fates"], found["mib"]


def test_an_image_beyond_all_measure_is_refused_before_it_takes_memory() -> None:
    files = {
        "JPEG": jpeg(SIDE),
        "progressive JPEG": jpeg(SIDE, progressive=True),
        "PNG": png(SIDE, b""),
        "PNG that has its pixels": png(SIDE, bytes(SIDE * (SIDE // 8 + 1))),
        "TIFF": tiff(SIDE),
        "WebP": webp(16383),
        "GIF": gif(SIDE),
        "BMP": bmp(SIDE),
        "PPM": b"P6 60000 60000 255\n" + bytes(99),
    }
    assert all(len(data) < 1_000_000 for data in files.values())
    fates, mib = read("normalise", files)
    assert fates == dict.fromkeys(files, "too_large")
    assert mib < MOST_MIB


def test_a_stored_image_beyond_all_measure_is_refused_before_it_takes_memory() -> None:
    files = {"JPEG": jpeg(SIDE), "PNG": png(SIDE, b"")}
    fates, mib = read("decode", files)
    assert fates == dict.fromkeys(files, "unreadable")
    assert mib < MOST_MIB


def test_a_jpeg_in_scans_without_number_is_refused_before_it_takes_time() -> None:
    files = {"many": in_many_scans(20_000), "usual": encoded("JPEG", progressive=True)}
    fates, mib = read("normalise", files)
    assert fates == {"many": "unreadable", "usual": "taken"}
    assert mib < MOST_MIB


def aliases(value: str, references: str) -> str:
    """Nine maps of YAML, each of which holds the one before nine times."""
    lines = [f"a0: &a0 {value}"]
    for number in range(1, 9):
        again = ", ".join([f"*a{number - 1}"] * 9)
        lines.append(f"a{number}: &a{number} {references.replace('...', again)}")
    return "\n".join(lines)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_config_that_unfolds_is_refused_before_it_takes_memory_or_time(
    suffix: str, tmp_path: Path
) -> None:
    texts = {
        "aliases": aliases("[x, x, x, x, x, x, x, x, x]", "[...]"),
        "merged": aliases("{x: 1}", "{<<: [...]}"),
        "of_itself": "a: &a [*a]",
        "deep": "[" * 500_000,
        "deep_maps": '{"a":' * 100_000,
        "large": "#" * (2 << 20),
        "digits": '{"train": ' + "1" * 1_000_000,
        "sixtieths": "train: {epochs: 1" + ":59" * 340_000 + "}",
        "nearly_a_number": "x: " + "1" * 500_000 + "." + "1" * 500_000 + "e",
        "pickled": "x: !!python/object/apply:os.system [exit]",
    }
    files = [tmp_path / f"{name}{suffix}" for name in texts]
    for file in files:
        file.write_text(texts[file.stem])
    done = subprocess.run(
        [sys.executable, "-c", CONFIGS, *map(str, files)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=be_patient,
    )
    found = json.loads(done.stdout)
    assert found["codes"] == dict.fromkeys(map(str, files), 64)
    assert found["mib"] < MOST_MIB
    lines = done.stderr.splitlines()
    assert len(lines) == len(files), lines
    assert max(map(len, lines)) < 1000
