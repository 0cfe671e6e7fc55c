"""Images decoded once for all trials of a node: uint8 pixels, in one mapped file of its cache.

A validation image is kept as evaluation renders it, so that it is the same to the bit. A training
image is kept with the shorter side that evaluation resizes to, or with its own if that is smaller;
random crops are cut from these pixels instead of from the full image's.

A row is decoded by whoever needs it first, under a lock on a byte that dies with its process. Marks
of what is there last until the machine restarts: the kernel may write them to the disk before the
pixels they speak of.
"""

import fcntl
import hashlib
import logging
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray

from tlrunner.config import Preprocess
from tlrunner.data.augment import EvalTransform, short_side
from tlrunner.data.cache import NodeCache
from tlrunner.data.decode import Encoded, Picture, Pixels
from tlrunner.data.order import Rows
from tlrunner.data.resize import resize_exact
from tlrunner.errors import StorageError
from tlrunner.files import sha256_json

log = logging.getLogger("tlrunner")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def train_sizes(sizes_R2: NDArray[np.int64], preprocess: Preprocess) -> NDArray[np.int64]:
    """(height, width) at which training images of these sizes are kept."""
    short = short_side(preprocess)
    shorter_R = sizes_R2.min(axis=1, keepdims=True)
    scaled_R2 = (short * sizes_R2 / np.maximum(shorter_R, 1) + 1e-6).astype(np.int64)
    return np.where(shorter_R > short, scaled_R2, sizes_R2)


@dataclass(frozen=True)
class Kept:
    """Which rows are kept, and in what shape.

    Attributes:
        train_R, val_R: row numbers.
        sizes_N2: (height, width) of all rows of the data set.
    """

    train_R: Rows
    val_R: Rows
    sizes_N2: NDArray[np.int64]
    preprocess: Preprocess

    @property
    def rows_E(self) -> Rows:  # noqa: N802  (a shape ends its name)
        """The row of each entry of the file."""
        return np.concatenate([self.train_R, self.val_R])

    @cached_property
    def sizes_E2(self) -> NDArray[np.int64]:  # noqa: N802
        """(height, width) of each entry."""
        side = self.preprocess.image_size
        val_sizes = np.full((len(self.val_R), 2), side, np.int64)
        return np.concatenate(
            [train_sizes(self.sizes_N2[self.train_R], self.preprocess), val_sizes]
        )

    @property
    def pixel_bytes(self) -> int:
        return int(3 * self.sizes_E2.prod(axis=1).sum())

    @property
    def num_bytes(self) -> int:
        """Of the whole file: pixels, and a mark for each entry."""
        return self.pixel_bytes + len(self.sizes_E2)


class DecodedCache:
    """Pixels of a data set's training and validation rows, for one preprocessing.

    Args:
        images_sha256: of the data set's manifest.
        read: row -> its JPEG or PNG.

    Where the cache has no room, rows are decoded each time, to the same pixels.
    """

    def __init__(
        self, cache: NodeCache, images_sha256: str, kept: Kept, read: Callable[[int], bytes]
    ) -> None:
        self._read, self._kept, self._file, self._locks = read, kept, -1, -1
        self._transform = EvalTransform(kept.preprocess)
        self._entry_of = np.full(len(kept.sizes_N2), -1)
        self._entry_of[kept.rows_E] = np.arange(len(kept.rows_E))
        lengths_E = 3 * kept.sizes_E2.prod(axis=1)
        self._starts_E = np.cumsum(lengths_E) - lengths_E
        rows = [
            hashlib.sha256(rows_R.tobytes()).hexdigest() for rows_R in (kept.train_R, kept.val_R)
        ]
        versions = [PIL.__version__, cv2.__version__, simplejpeg.__version__]
        recipe = [images_sha256, rows, kept.preprocess.model_dump(), versions, _boot()]
        try:
            name = f"{sha256_json(recipe)}.decoded"
            self._file = cache.hold(name, kept.num_bytes, lambda path: None)
            # of its own, since on NFS a lock on a byte and one on the whole file are the same
            locks = cache.directory / f"{name}.rows.lock"
            self._locks = os.open(locks, os.O_RDWR | os.O_CREAT, 0o644)
        except (StorageError, OSError) as err:
            log.warning("images are decoded each time: %s", err)
            return
        content = np.frombuffer(mmap.mmap(self._file, kept.num_bytes), np.uint8)
        self._pixels, self._is_there_E = content[: kept.pixel_bytes], content[kept.pixel_bytes :]

    def __del__(self) -> None:
        for descriptor in (self._file, self._locks):
            if descriptor >= 0:
                os.close(descriptor)

    def pixels(self, row: int) -> Pixels | None:
        """What is kept of a row, (height, width, 3) RGB, not to be written to; None: not kept.

        Raises:
            BadImage: the stored bytes are no image.
            DataError, StorageError: they cannot be read.
        """
        entry = int(self._entry_of[row])
        if entry < 0:
            return None
        if self._locks < 0:
            return self._decoded(row, entry)
        height, width = self._kept.sizes_E2[entry].tolist()
        start = int(self._starts_E[entry])
        pixels = self._pixels[start : start + 3 * height * width].reshape(height, width, 3)
        if not self._is_there_E[entry]:
            self._fill(row, entry, pixels)
        return pixels

    def _fill(self, row: int, entry: int, pixels: Pixels) -> None:
        fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, entry)
        try:
            if not self._is_there_E[entry]:
                pixels[...] = self._decoded(row, entry)
                self._is_there_E[entry] = 1
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, entry)

    def _decoded(self, row: int, entry: int) -> Pixels:
        picture = Encoded(self._read(row))
        height, width = self._kept.sizes_E2[entry].tolist()
        if entry >= len(self._kept.train_R):
            rendered_HWC = np.empty((height, width, 3), np.uint8)
            self._transform.render(picture, rendered_HWC)
            return rendered_HWC
        pixels, scale = picture.decode_for((height, width))
        if pixels.shape[:2] == (height, width):
            return pixels
        whole = (0.0, 0.0, picture.size_hw[1] * scale, picture.size_hw[0] * scale)
        return resize_exact(pixels, (height, width), self._kept.preprocess.interpolation, whole)


@dataclass(frozen=True)
class KeptTransform:
    """Renders validation images from what is kept of them, which is what an evaluation sees."""

    preprocess: Preprocess

    def render(self, picture: Picture, out_HWC: Pixels) -> None:
        out_HWC[...], _ = picture.decode_for((0, 0))


def _boot() -> str:
    """Names this machine since it started; this process, where the system does not say."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else f"process {os.getpid()}"
