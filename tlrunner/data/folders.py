"""An ImageFolder: one folder a class, or a folder of images without labels.

Classes are numbered in the order of their names. Files that are not named like images are
ignored, and so is everything whose name starts with a dot.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from tlrunner.data.formats import EXTENSIONS
from tlrunner.data.places import file_facts, read_file
from tlrunner.data.source import Source, one_class, split_of, unlabelled
from tlrunner.errors import DataError
from tlrunner.files import sha256_json


def open_folder(uri: str, root: Path, labelled: bool) -> Source:
    """The images below a directory.

    Raises:
        DataError: they are not one folder a class, or there are none.
        OSError: a folder cannot be read.
    """
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not _hidden(p.name))
    loose = sorted(p for p in root.iterdir() if _is_image(p.name) and not p.is_dir())
    files = [sorted(_images_below(folder)) for folder in folders]
    everything = [*loose, *(path for of_class in files for path in of_class)]
    if not everything:
        wanted = f"images ({' '.join(EXTENSIONS)}) in one folder a class, or .parquet files"
        raise DataError(f"{uri} holds no images", wanted, "check the path")
    is_image_folder = not loose and len(files) > 1 and all(files)
    if not labelled and not is_image_folder:
        return _listed(uri, root, (), everything, [-1] * len(everything))
    if not any(files):
        raise unlabelled(uri)
    _check_classes(uri, folders, files, loose)
    names = tuple(text_of(folder.name) for folder in folders)
    labels = [label for label, of_class in enumerate(files) for _ in of_class]
    return _listed(uri, root, names, everything, labels)


def holds_images(root: Path) -> bool:
    """Whether there is an image at any depth."""
    return next(_images_below(root), None) is not None


def text_of(name: str) -> str:
    """A file name as text: names are bytes, and those that are not UTF-8 must be stored too."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


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
    if all(split_of(name) for name in names):
        raise DataError(
            f"{uri} holds splits ({', '.join(names)}), not classes",
            "one folder a class; tlrunner makes the split itself (data.val_fraction)",
            f"use {uri.rstrip('/')}/{names[0]}, or a CSV list with a split column",
        )
    empty = [name for name, of_class in zip(names, files, strict=True) if not of_class]
    if empty:
        raise DataError(
            f"{uri} has class folders without images: {', '.join(empty[:5])}",
            f"at least one image ({' '.join(EXTENSIONS)}) in each",
            "remove the folder, or add images",
        )
    if len(names) < 2:
        raise one_class(uri, names)


def _listed(
    uri: str, root: Path, names: tuple[str, ...], paths: list[Path], labels: list[int]
) -> Source:
    keys = [text_of(path.relative_to(root).as_posix()) for path in paths]
    facts = [file_facts(path) for path in paths]
    return Source(
        uri=uri,
        class_names=names,
        keys=keys,
        labels=labels,
        fingerprint=sha256_json(
            [names, [[key, *fact] for key, fact in zip(keys, facts, strict=True)]]
        ),
        num_bytes=sum(size for size, _ in facts),
        read=lambda i: read_file(paths[i]),
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
