import json
from dataclasses import replace
from typing import Any

import pytest

from tlrunner.data.manifest import Block, Manifest, Shard, parse_manifest, to_json
from tlrunner.errors import DataError

BLOCKS = (Block(0, 90, 5, "2" * 64), Block(90, 9, 0, "3" * 64))
SHARD = Shard("a.parquet", 5, 99, "0" * 64, 50, "1" * 64, BLOCKS, (2, 3))
MANIFEST = Manifest(2, ("ant", "bee"), (SHARD,), 5, 1, {"unsplit": (2, 1), "val": (0, 2)})


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(to_json(MANIFEST)) | changes)


def test_what_is_written_is_read() -> None:
    found = parse_manifest(to_json(MANIFEST), "here")
    assert found == MANIFEST
    assert found.sha256 == MANIFEST.sha256
    assert found.label_counts == (2, 3)
    assert found.num_bytes == 99


def test_the_hash_follows_the_content() -> None:
    other = replace(MANIFEST, shards=(replace(SHARD, sha256="1" * 64),))
    assert other.sha256 != MANIFEST.sha256


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 1),
        ("class_names", [1, 2]),
        ("class_names", ["ant"]),
        ("num_images", "5"),
        ("num_images", True),
        ("num_images", 6),
        ("num_bad", -1),
        ("counts", {"unsplit": [2, 2]}),
        ("counts", {"unsplit": [2, 2, 1]}),
        ("counts", {"dev": [2, 3]}),
        ("shards", [{"path": "a.parquet"}]),
        ("shards", None),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(key: str, value: Any) -> None:
    with pytest.raises(DataError, match=r"s3://b/manifest\.json is not a usable manifest"):
        parse_manifest(changed(**{key: value}), "s3://b/manifest.json")


@pytest.mark.parametrize(
    "blocks",
    [
        BLOCKS[:1],  # the footer is not covered
        (BLOCKS[0], replace(BLOCKS[1], start=80)),
        (replace(BLOCKS[0], num_rows=4), BLOCKS[1]),
    ],
)
def test_blocks_that_do_not_make_up_their_shard_are_refused(blocks: Any) -> None:
    wrong = replace(MANIFEST, shards=(replace(SHARD, blocks=blocks),))
    with pytest.raises(DataError, match=r"blocks"):
        parse_manifest(to_json(wrong), "here")


@pytest.mark.parametrize("path", ["../a.parquet", "/etc/passwd", "sub/a.parquet", "..", ""])
def test_a_shard_outside_the_directory_is_refused(path: str) -> None:
    outside = replace(MANIFEST, shards=(replace(SHARD, path=path),))
    with pytest.raises(DataError, match="plain file name"):
        parse_manifest(to_json(outside), "here")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"'])
def test_a_file_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        parse_manifest(text, "here")
