"""`manifest.json`: what a directory of shards holds. A directory without one holds no data set.

It is written last, so its presence says that everything it names is whole. Its hash identifies the
data set: it stands in run.json, in exported models and in the keys of caches.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from tlrunner.data.store import Part
from tlrunner.errors import DataError
from tlrunner.files import sha256_json

MANIFEST_NAME = "manifest.json"
UNFINISHED_NAME = "unfinished.json"  # stands for it while shards are being written
VERSION = 2
UNSPLIT = "unsplit"
SPLITS = (UNSPLIT, "train", "val", "test")  # by the number that stands for each in an index


@dataclass(frozen=True)
class Block:
    """A run of bytes that can be fetched and checked alone: a row group, or the footer.

    Blocks follow each other without a gap from the first byte of a shard to its last.
    """

    start: int
    num_bytes: int
    num_rows: int  # 0 in the footer
    sha256: str

    @property
    def part(self) -> Part:
        return Part(self.start, self.num_bytes, self.sha256)


@dataclass(frozen=True)
class Shard:
    """One Parquet file and its index, by name, and what they must be."""

    path: str
    num_rows: int
    num_bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str
    blocks: tuple[Block, ...]
    label_counts: tuple[int, ...]

    @property
    def index_path(self) -> str:
        return str(PurePath(self.path).with_suffix(".index.npy"))


@dataclass(frozen=True)
class Manifest:
    """A data set: its classes, its shards in row order, and how many images were left out.

    `class_names` is empty for images without labels. `counts`: images of each class, by the split
    that their source gave them; `unsplit` if it gave none.
    """

    version: int
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    num_images: int
    num_bad: int
    counts: dict[str, tuple[int, ...]]

    @property
    def label_counts(self) -> tuple[int, ...]:
        """Images of each class."""
        return tuple(sum(column) for column in zip(*self.counts.values(), strict=True))

    @property
    def num_bytes(self) -> int:
        """Of all shards, their indices aside."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Identifies the data set: equal for equal bytes of images, labels and keys."""
        return sha256_json(asdict(self))


def to_json(manifest: Manifest) -> str:
    return json.dumps(asdict(manifest), indent=1, allow_nan=False) + "\n"


def parse_manifest(text: bytes | str, where: str) -> Manifest:
    """Read and check a manifest; `where` names it in errors.

    Raises:
        DataError: not a manifest, of another version, or at odds with itself.
    """
    try:
        found = json.loads(text)
    except ValueError as err:
        raise _unusable(where, str(err)) from err
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise _unusable(where, f"its version is {version!r}, this tlrunner reads {VERSION}")
    try:
        manifest = Manifest(
            version=version,
            class_names=tuple(_typed(name, str) for name in found["class_names"]),
            shards=tuple(parse_shard(shard) for shard in found["shards"]),
            num_images=_typed(found["num_images"], int),
            num_bad=_typed(found["num_bad"], int),
            counts={_split(name): _counts(of) for name, of in found["counts"].items()},
        )
        _check_sums(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise _unusable(where, f"{type(err).__name__}: {err}") from err
    return manifest


def parse_shard(found: Any) -> Shard:
    """A shard's entry, from JSON.

    Raises:
        KeyError, TypeError, ValueError: it is none, or at odds with itself.
    """
    path = _typed(found["path"], str)
    if path in ("", "..") or PurePath(path).name != path:
        raise ValueError(f"shard path {path!r} is not a plain file name")
    shard = Shard(
        path=path,
        num_rows=_typed(found["num_rows"], int),
        num_bytes=_typed(found["num_bytes"], int),
        sha256=_typed(found["sha256"], str),
        index_bytes=_typed(found["index_bytes"], int),
        index_sha256=_typed(found["index_sha256"], str),
        blocks=tuple(_block(block) for block in found["blocks"]),
        label_counts=_counts(found["label_counts"]),
    )
    ends = np.cumsum([0, *(block.num_bytes for block in shard.blocks)]).tolist()
    if ends != [*(block.start for block in shard.blocks), shard.num_bytes]:
        raise ValueError(f"the blocks of {path} do not cover its {shard.num_bytes} bytes")
    if sum(block.num_rows for block in shard.blocks) != shard.num_rows:
        raise ValueError(f"the rows of {path}'s blocks do not add up to its {shard.num_rows}")
    return shard


def _block(found: Any) -> Block:
    start, num_bytes, num_rows = (
        _typed(found[key], int) for key in ("start", "num_bytes", "num_rows")
    )
    return Block(start, num_bytes, num_rows, _typed(found["sha256"], str))


def _counts(found: Any) -> tuple[int, ...]:
    return tuple(_typed(count, int) for count in found)


def _split(name: Any) -> str:
    if name not in SPLITS:
        raise ValueError(f"split {name!r} is none of {', '.join(SPLITS)}")
    return str(name)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise TypeError(f"{value!r} where a {kind.__name__} belongs")
    return value


def _check_sums(manifest: Manifest) -> None:
    num_classes = len(manifest.class_names)
    if sum(shard.num_rows for shard in manifest.shards) != manifest.num_images:
        raise ValueError("the rows of its shards do not add up to num_images")
    per_class = [*manifest.counts.values(), *(shard.label_counts for shard in manifest.shards)]
    if any(len(counts) != num_classes for counts in per_class):
        raise ValueError("counts and class_names differ in length")
    if num_classes and sum(map(sum, manifest.counts.values())) != manifest.num_images:
        raise ValueError("counts do not add up to num_images")


def _unusable(where: str, why: str) -> DataError:
    return DataError(
        f"{where} is not a usable manifest: {why}",
        "what jobs/prepare_images.py wrote",
        "prepare the images again",
    )
