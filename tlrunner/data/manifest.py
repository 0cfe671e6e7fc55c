"""`manifest.json`: what a directory of shards holds. A directory without one holds no data set.

It is written last, so its presence says that everything it names is whole.
"""

from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from tlrunner.errors import DataError, StorageError
from tlrunner.files import read_json, sha256_json, write_json

MANIFEST_NAME = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One Parquet file, by name, and what it must be."""

    path: str
    num_rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A data set: its classes, its shards in row order, and how many images were left out.

    `class_names` and `label_counts` are empty for images without labels.
    """

    version: int
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    num_images: int
    num_bad: int
    label_counts: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Identifies the data set: equal for equal bytes of images, labels and keys."""
        return sha256_json(asdict(self))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    write_json(directory / MANIFEST_NAME, asdict(manifest))


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a directory of shards.

    Raises:
        DataError: absent, not a manifest, of another version, or at odds with itself.
    """
    path = directory / MANIFEST_NAME
    try:
        found = read_json(path)
    except StorageError as err:
        raise _unusable(path, err.found) from err
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise _unusable(path, f"its version is {version!r}, this tlrunner reads {VERSION}")
    try:
        manifest = Manifest(
            version=version,
            class_names=tuple(_typed(name, str) for name in found["class_names"]),
            shards=tuple(_shard(shard) for shard in found["shards"]),
            num_images=_typed(found["num_images"], int),
            num_bad=_typed(found["num_bad"], int),
            label_counts=tuple(_typed(count, int) for count in found["label_counts"]),
        )
        _check_sums(manifest)
    except (KeyError, TypeError, ValueError) as err:
        raise _unusable(path, f"{type(err).__name__}: {err}") from err
    return manifest


def _shard(found: Any) -> Shard:
    path = _typed(found["path"], str)
    if path in ("", "..") or PurePath(path).name != path:
        raise ValueError(f"shard path {path!r} is not a plain file name")
    num_rows, num_bytes = (_typed(found[key], int) for key in ("num_rows", "num_bytes"))
    return Shard(path, num_rows, num_bytes, _typed(found["sha256"], str))


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise TypeError(f"{value!r} where a {kind.__name__} belongs")
    return value


def _check_sums(manifest: Manifest) -> None:
    if sum(shard.num_rows for shard in manifest.shards) != manifest.num_images:
        raise ValueError("the rows of its shards do not add up to num_images")
    if len(manifest.label_counts) != len(manifest.class_names):
        raise ValueError("label_counts and class_names differ in length")
    if manifest.class_names and sum(manifest.label_counts) != manifest.num_images:
        raise ValueError("label_counts do not add up to num_images")


def _unusable(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is not a usable manifest: {why}",
        "a directory that jobs/prepare_images.py wrote",
        "prepare the images again",
    )
