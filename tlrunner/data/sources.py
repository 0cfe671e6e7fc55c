"""Where images come from: a URI becomes keys, labels, and a way to read each image's bytes.

sample:flowers            drawn by tlrunner itself
DIR with manifest.json    shards, already prepared
DIR/CLASS/**/IMAGE        an ImageFolder; classes are numbered in the order of their names
DIR/IMAGE                 unlabelled images, where those are of use
"""

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tlrunner.data import sample
from tlrunner.data.dataset import open_dataset
from tlrunner.data.decode import EXTENSIONS
from tlrunner.data.manifest import MANIFEST_NAME
from tlrunner.errors import DataError
from tlrunner.files import sha256_json

_KINDS = "sample:flowers, an ImageFolder directory (DIR/CLASS/IMAGE), or a directory of shards"
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass(frozen=True)
class Source:
    """Samples that can be read one by one, in any order, from any thread.

    Attributes:
        class_names: by label; empty if the samples have no labels.
        keys: what identifies each sample, e.g. its path inside the directory.
        labels: the class number of each, -1 without labels.
        fingerprint: hash that changes when the samples do, found without reading them.
        num_bytes: of all image files together; 0 where nothing is stored yet.
        read: sample number -> bytes of its image file; may raise OSError.
        splits: of each sample what its source says of it: train, val, test, or "" where it says
            nothing; empty if it says nothing of any.
    """

    uri: str
    class_names: tuple[str, ...]
    keys: Sequence[str]
    labels: Sequence[int]
    fingerprint: str
    num_bytes: int
    read: Callable[[int], bytes]
    splits: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.keys)


def open_source(uri: str, *, labelled: bool = True) -> Source:
    """List the samples behind a URI, without reading them.

    `labelled`: refuse images that have no class; without it they are taken, with label -1.

    Raises:
        DataError: nothing usable is there.
    """
    scheme, colon, name = uri.partition(":")
    if scheme == "sample" and colon:
        return _open_sample(uri, name)
    with _reading(uri):
        root = _source_directory(uri)
        if (root / MANIFEST_NAME).is_file():
            return _open_shards(uri, root, labelled)
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not _hidden(p.name))
        return _open_folders(uri, root, folders, labelled)


def shards_at(uri: str) -> Path | None:
    """The directory that a URI names if it holds shards; None for every other source.

    Raises:
        DataError: there is no directory.
    """
    if uri.startswith("sample:"):
        return None
    with _reading(uri):
        root = _source_directory(uri)
        return root if (root / MANIFEST_NAME).is_file() else None


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Turn what the system refuses into an error about the data."""
    try:
        yield
    except OSError as err:
        raise DataError(
            f"{err.filename or uri} cannot be read: {err.strerror or err}",
            "",
            "check the path and its permissions",
        ) from err


def _source_directory(uri: str) -> Path:
    """The directory that a path or file:// URI names."""
    path = uri.removeprefix("file://")
    if "://" in path:
        reason = "images in S3 cannot be read yet" if path.startswith("s3:") else "unknown scheme"
        raise DataError(f"data.uri is '{uri}': {reason}", _KINDS, "copy the images to this machine")
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"{uri} does not exist", _KINDS, _similar_path(root))
    if not root.is_dir():
        raise DataError(f"{uri} is a file", _KINDS, "give the directory that holds it")
    return root


def _open_sample(uri: str, name: str) -> Source:
    if name != "flowers":
        raise DataError(f"data.uri is '{uri}'", "sample:flowers", "did you mean sample:flowers?")
    each = range(sample.NUM_PER_CLASS)
    pairs = [(label, i) for label in range(len(sample.CLASS_NAMES)) for i in each]
    return Source(
        uri=uri,
        class_names=sample.CLASS_NAMES,
        keys=[f"{sample.CLASS_NAMES[label]}/{i:04d}.jpg" for label, i in pairs],
        labels=[label for label, _ in pairs],
        fingerprint=sha256_json([uri, sample.VERSION]),
        num_bytes=0,
        read=lambda i: sample.draw_jpeg(*pairs[i]),
    )


def _open_shards(uri: str, root: Path, labelled: bool) -> Source:
    dataset = open_dataset(root)
    if labelled and not dataset.class_names:
        raise unlabelled(uri)
    return Source(
        uri=uri,
        class_names=dataset.class_names,
        keys=dataset.keys,
        labels=dataset.labels_N.tolist(),
        fingerprint=dataset.manifest.sha256,
        num_bytes=sum(shard.num_bytes for shard in dataset.manifest.shards),
        read=lambda i: bytes(dataset.image_bytes(i)),
    )


def unlabelled(uri: str) -> DataError:
    remedy = "use them with jobs/predict.py, or prepare a folder with one folder a class"
    return DataError(f"the images in {uri} have no labels", "images in one folder a class", remedy)


def _open_folders(uri: str, root: Path, folders: list[Path], labelled: bool) -> Source:
    loose = sorted(p for p in root.iterdir() if _is_image(p.name) and p.is_file())
    files = [sorted(_images_below(folder)) for folder in folders]
    everything = [*loose, *(path for of_class in files for path in of_class)]
    if not everything:
        wanted = f"images ({' '.join(EXTENSIONS)}) in one folder a class"
        raise DataError(f"{uri} holds no images", wanted, "check the path")
    is_image_folder = not loose and len(files) > 1 and all(files)
    if not labelled and not is_image_folder:
        return _listed(uri, root, (), everything, [-1] * len(everything))
    if not any(files):
        raise unlabelled(uri)
    _check_classes(uri, folders, files, loose)
    names = tuple(folder.name for folder in folders)
    labels = [label for label, of_class in enumerate(files) for _ in of_class]
    return _listed(uri, root, names, everything, labels)


def _check_classes(
    uri: str, folders: list[Path], files: list[list[Path]], loose: list[Path]
) -> None:
    if loose:
        raise DataError(
            f"{uri} holds {len(loose)} images outside any class folder, e.g. {loose[0].name}",
            "one folder a class, with its images inside",
            "move them into their class's folder, or away",
        )
    names = [folder.name for folder in folders]
    if {name.lower() for name in names} <= _SPLIT_NAMES:
        raise DataError(
            f"{uri} holds splits ({', '.join(names)}), not classes",
            "one folder a class; tlrunner makes the split itself (data.val_fraction)",
            f"use {uri.rstrip('/')}/{names[0]}",
        )
    empty = [name for name, of_class in zip(names, files, strict=True) if not of_class]
    if empty:
        raise DataError(
            f"{uri} has class folders without images: {', '.join(empty[:5])}",
            f"at least one image ({' '.join(EXTENSIONS)}) in each",
            "remove the folder, or add images",
        )
    if len(names) < 2:
        raise DataError(f"{uri} has one class: {names[0]}", "at least two class folders")


def _listed(
    uri: str, root: Path, names: tuple[str, ...], paths: list[Path], labels: list[int]
) -> Source:
    keys = [_key(path.relative_to(root)) for path in paths]
    stats = [path.stat() for path in paths]
    facts = [[key, stat.st_size, stat.st_mtime_ns] for key, stat in zip(keys, stats, strict=True)]
    return Source(
        uri=uri,
        class_names=names,
        keys=keys,
        labels=labels,
        fingerprint=sha256_json([names, facts]),
        num_bytes=sum(stat.st_size for stat in stats),
        read=lambda i: paths[i].read_bytes(),
    )


def _images_below(folder: Path) -> Iterator[Path]:
    """Images of a class, at any depth. Links to files are followed, links to folders are not."""
    for parent, subfolders, names in os.walk(folder, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not _hidden(name)]
        yield from (Path(parent, name) for name in names if _is_image(name))


def _raise(err: OSError) -> None:
    raise err


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not _hidden(name)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _key(path: Path) -> str:
    # file names are bytes; those that are not UTF-8 still need a key that can be stored
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _similar_path(path: Path) -> str:
    parent = path.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {parent / close[0]}?" if close else "check the path"
