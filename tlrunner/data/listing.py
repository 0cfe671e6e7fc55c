"""A list of images: `NAME.csv` with a header, or `NAME.jsonl` with one object a line.

Columns are `path`, `label` and, where wanted, `split`; any others are ignored. A path is absolute,
relative to the list's own directory (or S3 prefix), file:// or s3://. The path as written is the
sample's key. Classes are numbered in the order of their labels: as numbers if all are, else as
text. Space around a label does not count.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tlrunner.data.fetch import open_store
from tlrunner.data.places import file_facts, place_of, read_file, read_place
from tlrunner.data.source import SPLIT_SPELLINGS, Source, in_class_order, one_class, split_of
from tlrunner.errors import DataError
from tlrunner.files import sha256_json
from tlrunner.uris import local_path

LIST_EXTENSIONS = (".csv", ".jsonl")
_COLUMNS = "path,label or path,label,split"


@dataclass(frozen=True)
class _Entry:
    """A row of a list: the line it ends on, what it says, and the place that its path means."""

    line: int
    path: str
    label: str
    split: str
    place: str


def open_list(uri: str, *, labelled: bool = True) -> Source:
    """The images that a CSV or JSONL file lists, in its order; none of them is looked into.

    Its fingerprint changes with the list's bytes, and with the size or time of change of a local
    image; images in S3 are taken to stay what they are. Without `labelled`, a list may have no
    labels, or some only, which then count as none.

    Raises:
        DataError: naming the line, whatever is wrong with the list.
        StorageError: it is in S3, and that cannot be read.
        OSError: it is a local file that cannot be read.
    """
    base, content = _read_list(uri)
    text = _decoded(content, uri)
    rows = _csv_rows(text, uri) if uri.lower().endswith(".csv") else _json_rows(text, uri)
    entries = [_entry(row, line, base, uri, labelled) for line, row in rows]
    if not entries:
        raise DataError(f"{uri} lists no images", "one row an image, below the header if CSV")
    _check_distinct(entries, uri)
    names, labels = _classes(entries, uri, labelled)
    facts = [file_facts(entry.place) for entry in entries]
    splits = [entry.split for entry in entries]
    where = base if uri.startswith("s3://") else ""  # which images its relative paths mean
    places = [entry.place for entry in entries]
    return Source(
        uri=uri,
        class_names=names,
        keys=[entry.path for entry in entries],
        labels=labels,
        fingerprint=sha256_json([names, where, hashlib.sha256(content).hexdigest(), facts]),
        num_bytes=sum(size for size, _ in facts),
        read=lambda i: read_place(places[i]),
        splits=splits if any(splits) else (),
    )


def _read_list(uri: str) -> tuple[str, bytes]:
    """What its paths are relative to, and its bytes."""
    if not uri.startswith("s3://"):
        path = local_path(uri)
        return str(path.parent), read_file(path)
    base, _, name = uri.rpartition("/")
    try:
        return base, open_store(base).read(name)
    except FileNotFoundError as err:
        raise DataError(f"{uri} does not exist", "", "check the URI") from err


def _decoded(content: bytes, uri: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = content.count(b"\n", 0, err.start) + 1
        raise DataError(
            f"{uri} line {line} is not UTF-8: byte {content[err.start]:#04x}",
            "UTF-8, with or without a byte order mark",
            "save the list as UTF-8",
        ) from err


def _csv_rows(text: str, uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row by column name, and its line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        header = next((row for row in reader if row), [])
        _check_header(header, uri)
        for row in reader:
            if len(row) not in (0, len(header)):
                raise DataError(
                    f"{uri} line {reader.line_num} has {len(row)} fields, the header {len(header)}",
                    "",
                    'put paths and labels with commas in double quotes ("a,b.jpg")',
                )
            if row:
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as err:
        raise DataError(f"{uri} line {reader.line_num} is not CSV: {err}", "", "repair it") from err


def _check_header(header: Sequence[str], uri: str) -> None:
    if not header:
        raise DataError(f"{uri} is empty", f"a header ({_COLUMNS}) and one row an image")
    twice = [name for name in ("path", "label", "split") if header.count(name) > 1]
    if twice:
        raise DataError(f"{uri} has two columns '{twice[0]}'", _COLUMNS, "remove one")
    if "path" not in header:
        raise _no_column(uri, "path", header)


def _json_rows(text: str, uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each object, and its line."""
    for line, written in enumerate(text.split("\n"), start=1):
        if not written.strip():
            continue
        try:
            row = json.loads(written)
        except (ValueError, RecursionError) as err:
            what = err.msg if isinstance(err, json.JSONDecodeError) else type(err).__name__
            raise DataError(f"{uri} line {line} is not JSON: {what}", "one object a line") from err
        if not isinstance(row, dict):
            raise DataError(f"{uri} line {line} is a JSON {type(row).__name__}", "an object")
        yield line, row


def _entry(row: dict[str, Any], line: int, base: str, uri: str, labelled: bool) -> _Entry:
    for needed in ("path", "label")[: 1 + labelled]:
        if needed not in row:
            raise _no_column(f"{uri} line {line}", needed, row)
    path, label, split = (_text(row, name, line, uri) for name in ("path", "label", "split"))
    if not path.strip():
        raise DataError(f"{uri} line {line} has an empty path", "a path, file:// or s3://")
    if labelled and not label.strip():
        raise DataError(f"{uri} line {line} has an empty label: {path}", "a label in every row")
    known = split_of(split)
    if known is None:
        raise DataError(f"{uri} line {line} has split '{split}'", f"{SPLIT_SPELLINGS}, or empty")
    try:
        place = place_of(path, base)
    except ValueError as err:
        valid = "an absolute path, one relative to the list, file:// or s3://"
        raise DataError(f"{uri} line {line}: {err}", valid) from err
    return _Entry(line, path, label.strip(), known, place)


def _text(row: dict[str, Any], name: str, line: int, uri: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    is_number = type(value) is int and name == "label"
    if not isinstance(value, str) and not is_number:
        valid = "text or a whole number" if name == "label" else "text"
        raise DataError(f"{uri} line {line} has {name} {value!r}", valid)
    text = str(value)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError(f"{uri} line {line} has {name} {text!r}, half a character", "text")
    return text


def _check_distinct(entries: list[_Entry], uri: str) -> None:
    """Refuse an image that is listed twice: it could be trained on and tested with."""
    first_at: dict[str, _Entry] = {}
    for entry in entries:
        first = first_at.setdefault(entry.place, entry)
        if first is entry:
            continue
        lines = f"{uri} lines {first.line} and {entry.line}"
        if first.label != entry.label:
            found = f"{lines} give {entry.path} two labels: '{first.label}' and '{entry.label}'"
            raise DataError(found, "one label an image", "remove one of the two")
        raise DataError(f"{lines} both list {entry.path}", "each image once", "remove one of them")


def _classes(
    entries: list[_Entry], uri: str, labelled: bool
) -> tuple[tuple[str, ...], Sequence[int]]:
    """Class names, and the number of each entry's class."""
    names = in_class_order(entry.label for entry in entries)
    if labelled and len(names) < 2:
        raise one_class(uri, names)
    if len(names) < 2 or "" in names:
        return (), [-1] * len(entries)
    number_of = {name: number for number, name in enumerate(names)}
    return names, [number_of[entry.label] for entry in entries]


def _no_column(where: str, name: str, found: Any) -> DataError:
    remedy = "images without labels are of use to jobs/predict.py alone" if name == "label" else ""
    columns = ", ".join(map(str, found))
    return DataError(f"{where} has no column '{name}'; its columns: {columns}", _COLUMNS, remedy)
