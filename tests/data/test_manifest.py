import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tlrunner.data.manifest import Manifest, Shard, read_manifest, write_manifest
from tlrunner.errors import DataError

MANIFEST = Manifest(1, ("ant", "bee"), (Shard("a.parquet", 5, 99, "0" * 64),), 5, 1, (2, 3))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert read_manifest(tmp_path).sha256 == MANIFEST.sha256


def test_the_hash_follows_the_content() -> None:
    other = replace(MANIFEST, shards=(replace(MANIFEST.shards[0], sha256="1" * 64),))
    assert other.sha256 != MANIFEST.sha256


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("class_names", [1, 2]),
        ("class_names", ["ant"]),
        ("num_images", "5"),
        ("num_images", True),
        ("num_images", 6),
        ("num_bad", -1),
        ("label_counts", [2, 2]),
        ("shards", [{"path": "a.parquet"}]),
        ("shards", None),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    write_manifest(tmp_path, MANIFEST)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataError, match="not a usable manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("path", ["../a.parquet", "/etc/passwd", "sub/a.parquet", "..", ""])
def test_a_shard_outside_the_directory_is_refused(tmp_path: Path, path: str) -> None:
    write_manifest(tmp_path, replace(MANIFEST, shards=(Shard(path, 5, 99, "0" * 64),)))
    with pytest.raises(DataError, match="plain file name"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"'])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError):
        read_manifest(tmp_path)
