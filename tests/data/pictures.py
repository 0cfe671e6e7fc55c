"""Small images and folders of them, made on the spot."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int = 0, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth, colourful picture that differs for each seed."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    phases = np.array([1.3, 2.1, 3.7]) * (seed + 1)
    waves = [np.sin(4 * x * (i + 1) + 3 * y + phase) for i, phase in enumerate(phases)]
    return Image.fromarray(np.uint8(127.5 + 127 * np.stack(waves, 2)))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_folder(root: Path, classes: tuple[str, ...] = ("ant", "bee"), each: int = 12) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.jpg").write_bytes(encoded(picture(100 * label + i)))
    return root
