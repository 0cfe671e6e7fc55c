"""Parquet files with images that others wrote, as on the Hugging Face Hub.

Columns: `image`, binary or a struct of `bytes` and `path`; `label`, whole numbers or text; and
`split` where wanted. Numbers are named by the ClassLabel in the schema's Hugging Face metadata, or
stand for themselves. Without a split column, splits are those that the names of the files or of
their folders give, if they give all of them one: `train-00000-of-00002.parquet`, `test/0.parquet`.
The paths in the structs are the samples' keys if they are distinct, else FILE#ROW is. A struct
without bytes means the file that its path names, relative to the Parquet file.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from tlrunner.data.column import ImageColumn, Spool
from tlrunner.data.places import file_facts, place_of, read_place
from tlrunner.data.source import Source, in_class_order, one_class
from tlrunner.data.tables import Table, TableFile, file_split, read_table
from tlrunner.errors import DataError
from tlrunner.files import sha256_json
from tlrunner.uris import local_path


def open_tables(
    uri: str, files: Sequence[TableFile], *, labelled: bool, spool_dir: str | Path
) -> Source:
    """The images in Parquet files, in the order of files and rows; none of them is looked into.

    The fingerprint changes with a file's size or time of change, and with those of local images
    that a file may name instead of holding them. `spool_dir`: for images that lie compressed.

    Raises:
        DataError: a file is no Parquet, lacks a column, has labels that cannot be used, or differs
            from the others in its schema; or there are no rows.
    """
    tables = [read_table(file, labelled) for file in files]
    _check_alike(tables)
    if not any(map(len, tables)):
        raise DataError(f"{uri} has no rows", "Parquet files with one row an image")
    names, labels = _classes(uri, tables, labelled)
    versions = [[table.file.name, *table.file.version] for table in tables]
    return Source(
        uri=uri,
        class_names=names,
        keys=_keys(tables),
        labels=labels,
        fingerprint=sha256_json([names, versions, _facts_of_named(tables)]),
        num_bytes=sum(table.file.path.stat().st_size for table in tables),
        read=_Reader(tables, Spool(local_path(spool_dir))).read,
        splits=_splits(tables),
    )


class _Reader:
    """Reads the image of any row of any file."""

    def __init__(self, tables: list[Table], spool: Spool) -> None:
        self._tables = tables
        self._starts = list(accumulate(map(len, tables), initial=0))
        self._columns = [
            ImageColumn(
                table.file.path, table.file.name, table.layout.image, table.group_rows, spool
            )
            for table in tables
        ]

    def read(self, i: int) -> bytes:
        file = bisect_right(self._starts, i) - 1
        row = i - self._starts[file]
        data = self._columns[file].read(row)
        if data is None:
            place = _place(self._tables[file], row)
            return read_place(place) if place else b""  # neither bytes nor a path: an empty image
        return data


def _check_alike(tables: list[Table]) -> None:
    first = tables[0]
    for table in tables[1:]:
        for what, one, other in zip(
            ("image column", "paths", "label column", "class names", "split column"),
            vars(first.layout).values(),
            vars(table.layout).values(),
            strict=True,
        ):
            if one != other:
                raise DataError(
                    f"{first.file.name} and {table.file.name} differ in their {what}: "
                    f"{_shown(one)} and {_shown(other)}",
                    "files of one schema",
                    "give one of them alone, or write them alike",
                )


def _shown(value: object) -> str:
    text = ", ".join(value) if isinstance(value, tuple) else str(value or "none")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _classes(
    uri: str, tables: list[Table], labelled: bool
) -> tuple[tuple[str, ...], Sequence[int]]:
    """Class names, and the number of each row's class."""
    unknown = next(_without_label(tables), None)
    if unknown and labelled:
        raise DataError(f"{unknown} has no label", "a label in every row", "remove the row")
    if unknown or not tables[0].layout.label:
        return (), [-1] * sum(map(len, tables))
    written = [label for table in tables for label in table.labels]
    names = tables[0].layout.names
    if names:
        _check_range(tables, names)
        number_of: dict[object, int] = {number: number for number in range(len(names))}
    else:
        names = in_class_order(map(str, {*written}))
        kind = int if tables[0].layout.label == "numbers" else str
        number_of = {kind(name): number for number, name in enumerate(names)}
    present = {*written}
    if len(present) < 2:
        if labelled:
            raise one_class(uri, [names[number_of[label]] for label in present])
        return (), [-1] * len(written)
    return names, [number_of[label] for label in written]


def _without_label(tables: list[Table]) -> Iterator[str]:
    """Rows whose label is null, empty, or the -1 of a ClassLabel that is not known."""
    for table in tables:
        none = {None, ""} | ({-1} if table.layout.names else set())
        for row, label in enumerate(table.labels):
            if label in none:
                yield f"{table.file.name} row {row}"


def _check_range(tables: list[Table], names: Sequence[str]) -> None:
    for table in tables:
        for row, label in enumerate(table.labels):
            if not isinstance(label, int) or not 0 <= label < len(names):
                found = f"{table.file.name} row {row} has label {label}"
                valid = f"0 to {len(names) - 1}, for the {len(names)} classes it names"
                raise DataError(found, valid, "repair the labels or the names")


def _place(table: Table, row: int) -> str:
    """The place of the image that a row may name instead of holding it, or ""."""
    path = table.paths[row]
    try:
        return place_of(path, table.file.base) if path else ""
    except ValueError:
        return ""


def _facts_of_named(tables: list[Table]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of the local images that rows name; most rows name none."""
    facts = []
    for table in tables:
        for row, path in enumerate(table.paths):
            size, changed = file_facts(_place(table, row)) if path else (0, 0)
            if path and changed:
                facts.append((path, size, changed))
    return facts


def _keys(tables: list[Table]) -> list[str]:
    paths = [path for table in tables for path in table.paths if path]
    if len({*paths}) == len(paths) == sum(map(len, tables)):
        return paths
    return [f"{table.file.name}#{row}" for table in tables for row in range(len(table))]


def _splits(tables: list[Table]) -> Sequence[str]:
    if tables[0].layout.split:
        splits = [split for table in tables for split in table.splits]
        return splits if any(splits) else ()
    of_file = [file_split(table.file.name) for table in tables]
    if not all(of_file):
        return ()
    pairs = zip(tables, of_file, strict=True)
    return [split for table, split in pairs for _ in range(len(table))]
