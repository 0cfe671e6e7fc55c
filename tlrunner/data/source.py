"""What every kind of source gives: keys, labels, and a way to read each image's bytes.

`sources` makes one from a URI; `folders`, `listing` and `foreign` each know a kind of them.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tlrunner.errors import DataError

_SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_WHOLE_NUMBER = re.compile("-?[0-9]{1,18}")
SPLIT_SPELLINGS = ", ".join(_SPLIT_OF)


@dataclass(frozen=True)
class Source:
    """Samples that can be read one by one, in any order, from any thread.

    Attributes:
        class_names: by label; empty if the samples have no labels.
        keys: what identifies each sample, e.g. its path inside the directory.
        labels: the class number of each, -1 without labels.
        fingerprint: hash that changes when the samples do, found without reading them.
        num_bytes: of all image files together; 0 where nothing is stored yet or it is not known.
        read: sample number -> bytes of its image file. OSError: this image cannot be had;
            any TlrunnerError: the source as a whole is of no use any more.
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


def split_of(name: str) -> str | None:
    """train, val or test for any of its spellings, "" for an empty name, None for any other."""
    name = name.strip().lower()
    return _SPLIT_OF.get(name) if name else ""


def in_class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels as class names: each once, sorted as numbers if they all are, else as text."""
    names = sorted(set(labels))
    if all(_WHOLE_NUMBER.fullmatch(name) for name in names):
        names.sort(key=int)
    return tuple(names)


def unlabelled(uri: str) -> DataError:
    remedy = "use them with jobs/predict.py, or prepare a folder with one folder a class"
    return DataError(f"the images in {uri} have no labels", "images in one folder a class", remedy)


def one_class(uri: str, names: Sequence[str]) -> DataError:
    return DataError(f"{uri} has one class: {', '.join(names)}", "at least two classes")
