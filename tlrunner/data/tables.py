"""The columns of Parquet files that others wrote, their images aside; for `foreign`."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from tlrunner.data.fetch import fetch, open_store
from tlrunner.data.folders import text_of
from tlrunner.data.places import file_facts
from tlrunner.data.source import SPLIT_SPELLINGS, split_of
from tlrunner.errors import DataError

_BINARY = (types.is_binary, types.is_large_binary, types.is_binary_view)
_TEXT = (types.is_string, types.is_large_string, types.is_string_view)
_REMEDY = "rename or convert the column, or write a CSV list of image files"


@dataclass(frozen=True)
class TableFile:
    """A Parquet file.

    Attributes:
        name: relative to the source, with `/` between its parts.
        path: where it lies on this machine.
        base: the directory or S3 prefix that the paths in it are relative to.
        version: facts that change when it does.
    """

    name: str
    path: Path
    base: str
    version: tuple[str | int, ...]


@dataclass(frozen=True)
class Layout:
    """What must be alike in all files of a source.

    Attributes:
        image: dotted path of the column that holds the bytes.
        path: dotted path of the column that holds paths, or "".
        label: numbers, text, or "" without labels.
        names: of the numbers, where the file gives them.
        split: whether there is a split column.
    """

    image: str
    path: str
    label: str
    names: tuple[str, ...]
    split: bool


@dataclass(frozen=True)
class Table:
    """What a file says of each of its rows. `group_rows`: rows of each row group."""

    file: TableFile
    layout: Layout
    group_rows: list[int]
    labels: list[int | str | None]
    paths: list[str | None]
    splits: list[str]

    def __len__(self) -> int:
        return sum(self.group_rows)


def local_tables(root: Path, candidates: Iterable[Path]) -> list[TableFile]:
    """The Parquet files among some paths below a directory."""
    named = ((text_of(path.relative_to(root).as_posix()), path) for path in candidates)
    found = sorted((name, path) for name, path in named if _is_table(name) and path.is_file())
    return [
        TableFile(name, path, str(path.parent.absolute()), file_facts(path)) for name, path in found
    ]


def s3_tables(uri: str, cache_dir: str | Path) -> list[TableFile]:
    """The Parquet object at a URI, or those below it, fetched into the cache.

    Raises:
        StorageError: they cannot be read.
    """
    root, _, name = uri.rstrip("/").rpartition("/")
    if _is_table(name) and root.count("/") > 1 and open_store(root).size(name) is not None:
        names = [name]
    else:
        root = uri.rstrip("/")
        names = [entry.name for entry in open_store(root).list() if _is_table(entry.name)]
    fetched = [(name, fetch(f"{root}/{name}", cache_dir)) for name in names]
    return [
        # the directory of a fetched file is named by the version of the object
        TableFile(name, path, f"{root}/{name}".rpartition("/")[0], (path.parent.name,))
        for name, path in fetched
    ]


def file_split(name: str) -> str:
    """The split that a file's name or else its nearest such folder gives; "" if none does."""
    *folders, file = PurePosixPath(name).parts
    word = re.match("[A-Za-z]*", file)
    candidates = [word[0] if word else "", *reversed(folders)]
    return next((split for split in map(split_of, candidates) if split), "")


def read_table(file: TableFile, labelled: bool) -> Table:
    """Everything about a file but its images.

    Raises:
        DataError: it is no Parquet, or broken, or lacks a column of the right type.
    """
    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            return _read(parquet, file, _layout(parquet.schema_arrow, file, labelled))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as err:
        raise DataError(
            f"{file.name} cannot be read as Parquet: {err}", "", "get it again"
        ) from err


def _is_table(name: str) -> bool:
    """Whether a file counts, by its name; as everywhere, names from `_` or `.` on do not."""
    return name.lower().endswith(".parquet") and not any(
        part.startswith((".", "_")) for part in name.split("/")
    )


def _layout(schema: pa.Schema, file: TableFile, labelled: bool) -> Layout:
    image, path = _image_leaves(_type_of(schema, "image", file), file)
    label = ""
    if labelled or "label" in schema.names:
        label = _label_kind(_type_of(schema, "label", file), file, labelled)
    split = "split" in schema.names
    if split and not _is_text(_type_of(schema, "split", file)):
        raise _wrong_type("split", schema.field("split").type, file, "text")
    names = _class_names(schema.metadata or {}) if label == "numbers" else ()
    return Layout(image, path, label, names, split)


def _type_of(schema: pa.Schema, name: str, file: TableFile) -> pa.DataType:
    if schema.names.count(name) != 1:
        number = "two columns" if name in schema.names else "no column"
        raise DataError(
            f"{file.name} has {number} '{name}'; its columns: {', '.join(schema.names)}",
            "image, label, and split where wanted",
            _REMEDY,
        )
    return schema.field(name).type


def _image_leaves(kind: pa.DataType, file: TableFile) -> tuple[str, str]:
    """Dotted paths of the columns that hold bytes, and paths or ""."""
    if _is_binary(kind):
        return "image", ""
    fields = {field.name: field.type for field in kind} if types.is_struct(kind) else {}
    if "bytes" not in fields or not _is_binary(fields["bytes"]):
        valid = "binary, or a struct of bytes (binary) and path (text)"
        raise _wrong_type("image", kind, file, valid)
    return "image.bytes", "image.path" if _is_text(fields.get("path")) else ""


def _label_kind(kind: pa.DataType, file: TableFile, labelled: bool) -> str:
    if types.is_integer(_value_type(kind)):
        return "numbers"
    if _is_text(kind):
        return "text"
    if labelled:
        raise _wrong_type("label", kind, file, "whole numbers or text")
    return ""


def _wrong_type(name: str, kind: pa.DataType, file: TableFile, valid: str) -> DataError:
    return DataError(f"{file.name} has {name} of type {kind}", valid, _REMEDY)


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """Names of the classes in Hugging Face's metadata; none if there are none of use."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        names = features["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    usable = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if usable and len({*names}) == len(names) else ()


def _read(parquet: pq.ParquetFile, file: TableFile, layout: Layout) -> Table:
    group_rows = _group_rows(parquet, file)
    columns = {
        "label": "label" if layout.label else "",
        "path": layout.path,
        "split": "split" if layout.split else "",
    }
    values: dict[str, list[Any]] = {name: [] for name in columns}
    wanted = [leaf for leaf in columns.values() if leaf]
    for group, num_rows in enumerate(group_rows):
        table = parquet.read_row_group(group, columns=wanted, use_threads=False)
        for name, leaf in columns.items():
            found = _values(table, leaf) if leaf else [None] * num_rows
            if len(found) != num_rows:
                raise DataError(f"{file.name} has columns of different lengths", "", "get it again")
            values[name] += found
    return Table(
        file=file,
        layout=layout,
        group_rows=group_rows,
        labels=values["label"],
        paths=values["path"],
        splits=_splits(values["split"], file) if layout.split else [],
    )


def _group_rows(parquet: pq.ParquetFile, file: TableFile) -> list[int]:
    """Rows of each row group; asked by reading, as broken metadata could end the process."""
    groups = range(parquet.metadata.num_row_groups)
    rows = [parquet.read_row_group(group, columns=[]).num_rows for group in groups]
    size = file.path.stat().st_size
    if min(rows, default=0) < 0 or sum(rows) > size:  # or a broken footer would fill the memory
        raise DataError(f"{file.name} claims {sum(rows)} rows in {size} bytes", "", "get it again")
    return rows


def _values(table: pa.Table, leaf: str) -> list[Any]:
    """A column's values as Python objects; text that is not UTF-8 raises ArrowInvalid."""
    name, _, child = leaf.partition(".")
    column = table[name].combine_chunks()
    if child:
        column = column.flatten()[0]  # a null struct has a null path
    column.validate(full=True)
    values: list[Any] = column.to_pylist()
    return values


def _splits(written: list[str | None], file: TableFile) -> list[str]:
    splits = [split_of(name or "") for name in written]
    if None in splits:
        row = splits.index(None)
        raise DataError(
            f"{file.name} row {row} has split '{written[row]}'", f"{SPLIT_SPELLINGS}, or empty"
        )
    return [split for split in splits if split is not None]


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if types.is_dictionary(kind) else kind


def _is_binary(kind: pa.DataType) -> bool:
    kind = _value_type(kind)
    return any(is_kind(kind) for is_kind in _BINARY)


def _is_text(kind: pa.DataType | None) -> bool:
    if kind is None:
        return False
    kind = _value_type(kind)
    return any(is_kind(kind) for is_kind in _TEXT)
