"""Images decoded once for all trials of a node: uint8 pixels, in one mapped file of its cache.

An image is kept as large as evaluation needs it: its shorter side is that of the resize that comes
before the centre crop, or its own if that is smaller. So an evaluation sees the very pixels that it
sees without the cache, while training crops come from these pixels instead of the full image's.

A row is decoded by whoever needs it first, under a lock on its byte of the file that dies with its
process. Marks of what is there last until the machine restarts: the kernel may write them to the
disk before the pixels they speak of.
"""

import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tlrunner.config import Preprocess
from tlrunner.data.augment import short_side
from tlrunner.data.cache import NodeCache
from tlrunner.data.decode import Encoded, Pixels
from tlrunner.data.resize import resize_exact
from tlrunner.errors import StorageError
from tlrunner.files import sha256_json

VERSION = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def decoded_sizes(sizes_N2: NDArray[np.int64], preprocess: Preprocess) -> NDArray[np.int64]:
    """(height, width) at which images of these sizes are kept."""
    short = short_side(preprocess)
    shorter_N = sizes_N2.min(axis=1, keepdims=True)
    scaled_N2 = (short * sizes_N2 / np.maximum(shorter_N, 1) + 1e-6).astype(np.int64)
    return np.where(shorter_N > short, scaled_N2, sizes_N2)


def decoded_bytes(sizes_N2: NDArray[np.int64], preprocess: Preprocess) -> int:
    """Size of the file that holds images of these sizes, decoded."""
    return int(3 * decoded_sizes(sizes_N2, preprocess).prod(axis=1).sum() + len(sizes_N2))


class DecodedCache:
    """The pixels of a data set's rows at the size that a backbone's evaluation needs.

    Args:
        images_sha256: of the data set's manifest.
        read: row -> its JPEG or PNG.

    Where the cache has no room, rows are decoded each time, to the same pixels.
    """

    def __init__(
        self,
        cache: NodeCache,
        images_sha256: str,
        sizes_N2: NDArray[np.int64],
        preprocess: Preprocess,
        read: Callable[[int], bytes],
    ) -> None:
        self._read, self._interpolation = read, preprocess.interpolation
        self._sizes_N2 = decoded_sizes(sizes_N2, preprocess)
        lengths_N = 3 * self._sizes_N2.prod(axis=1)
        self._offsets_N = np.cumsum(lengths_N) - lengths_N
        self._marks_start = int(lengths_N.sum())
        recipe = [VERSION, images_sha256, short_side(preprocess), preprocess.interpolation, _boot()]
        num_bytes = decoded_bytes(sizes_N2, preprocess)
        try:
            self._file = cache.hold(f"{sha256_json(recipe)}.decoded", num_bytes, lambda path: None)
        except StorageError:
            self._file = -1
            return
        self._content = np.frombuffer(mmap.mmap(self._file, num_bytes), np.uint8)
        self._is_there_N = self._content[self._marks_start :]

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def pixels(self, row: int) -> Pixels:
        """A row's image, (height, width, 3) RGB; not to be written to.

        Raises:
            BadImage: the stored bytes are no image.
            DataError, StorageError: they cannot be read.
        """
        if self._file < 0:
            return self._decoded(row)
        height, width = self._sizes_N2[row].tolist()
        start = int(self._offsets_N[row])
        kept = self._content[start : start + 3 * height * width].reshape(height, width, 3)
        if not self._is_there_N[row]:
            place = self._marks_start + row
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, place)
            try:
                if not self._is_there_N[row]:
                    kept[...] = self._decoded(row)
                    self._is_there_N[row] = 1
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)
        return kept

    def _decoded(self, row: int) -> Pixels:
        height, width = self._sizes_N2[row].tolist()
        picture = Encoded(self._read(row))
        pixels, scale = picture.decode_for((height, width))
        if pixels.shape[:2] == (height, width):
            return pixels
        whole = (0.0, 0.0, picture.size_hw[1] * scale, picture.size_hw[0] * scale)
        return resize_exact(pixels, (height, width), self._interpolation, whole)


def _boot() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
