import errno
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pictures import encoded, image_folder, picture

from tlrunner.data import shardfile, write
from tlrunner.data.dataset import open_dataset, verify_shards
from tlrunner.data.decode import decode
from tlrunner.data.index import build_index, index_path, load_index
from tlrunner.data.manifest import SPLITS
from tlrunner.data.shardfile import SCHEMA
from tlrunner.data.sources import open_source
from tlrunner.data.write import WriteSettings, write_shards
from tlrunner.errors import ConfigError, DataError, StorageError


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "images")


def test_every_image_comes_back_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    manifest = write_shards(open_source(str(folder)), tmp_path / "shards")
    dataset = open_dataset(tmp_path / "shards")
    assert len(dataset) == manifest.num_images == 24
    assert manifest.label_counts == (12, 12)
    for row, key in enumerate(dataset.keys):
        assert dataset.image_bytes(row) == (folder / key).read_bytes()
        assert dataset.class_names[dataset.labels_N[row]] == key.split("/")[0]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of about 3 kB, shards of about 8."""
    monkeypatch.setattr(shardfile, "ROW_GROUP_BYTES", 3000)
    monkeypatch.setattr(shardfile, "MAX_ROW_GROUP_BYTES", 4000)
    monkeypatch.setattr(write, "MIN_SHARD_BYTES", 8000)


@pytest.mark.usefixtures("small_shards")
def test_many_row_groups_and_shards_are_indexed(folder: Path, tmp_path: Path) -> None:
    manifest = write_shards(open_source(str(folder)), tmp_path / "shards")
    assert len(manifest.shards) > 1
    assert pq.ParquetFile(tmp_path / "shards" / manifest.shards[0].path).num_row_groups > 1
    dataset = open_dataset(tmp_path / "shards")
    assert all(
        dataset.image_bytes(row) == (folder / key).read_bytes()
        for row, key in enumerate(dataset.keys)
    )


@pytest.mark.usefixtures("small_shards")
def test_blocks_are_the_row_groups_and_the_footer(folder: Path, tmp_path: Path) -> None:
    manifest = write_shards(open_source(str(folder)), tmp_path / "shards")
    for shard in manifest.shards:
        content = (tmp_path / "shards" / shard.path).read_bytes()
        metadata = pq.read_metadata(tmp_path / "shards" / shard.path)
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert [block.num_rows for block in shard.blocks] == [*groups, 0]
        pieces = [content[b.start : b.start + b.num_bytes] for b in shard.blocks]
        assert b"".join(pieces) == content
        assert [sha256(piece).hexdigest() for piece in pieces] == [b.sha256 for b in shard.blocks]
        index = load_index(tmp_path / "shards" / shard.index_path, shard)
        ends = np.cumsum([block.num_bytes for block in shard.blocks])
        first = np.searchsorted(ends, index["offset"], side="right")
        last = np.searchsorted(ends, index["offset"] + index["length"] - 1, side="right")
        assert (first == last).all()  # no image lies in two blocks
        assert np.bincount(first).tolist() == groups


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full")])
def test_a_broken_run_continues_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    whole = write_shards(open_source(str(folder)), tmp_path / "whole")
    real, calls = shardfile.build_index, [0]

    def failing(path: Path) -> np.ndarray:
        calls[0] += 1
        if calls[0] == 3:
            raise fault
        return real(path)

    monkeypatch.setattr(shardfile, "build_index", failing)
    expected = StorageError if isinstance(fault, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_shards(open_source(str(folder)), tmp_path / "shards")
    assert leftovers(tmp_path / "shards") == [
        *(f"shard-0000{i}.{kind}" for i in (0, 1) for kind in ("index.npy", "parquet")),
        "unfinished.json",
    ]
    with pytest.raises(DataError, match=r"not written to their end.*continues them"):
        open_source(str(tmp_path / "shards"))
    with pytest.raises(StorageError, match="other images or with other settings"):
        write_shards(open_source(str(folder)), tmp_path / "shards", WriteSettings(seed=1))
    seen: list[int] = []
    source = open_source(str(folder))
    again = write_shards(
        source, tmp_path / "shards", progress=lambda done, total: seen.append(done)
    )
    done_before = sum(shard.num_rows for shard in whole.shards[:2])
    assert seen == list(range(done_before + 1, 25))
    assert again == whole
    assert "unfinished.json" not in leftovers(tmp_path / "shards")
    verify_shards(tmp_path / "shards")


def test_larger_images_are_scaled_down_where_asked_to(folder: Path, tmp_path: Path) -> None:
    (folder / "ant" / "small.png").write_bytes(encoded(picture(width=20, height=16), "PNG"))
    (folder / "ant" / "large.png").write_bytes(encoded(picture(width=90, height=60), "PNG"))
    source = open_source(str(folder))
    write_shards(source, tmp_path / "shards", WriteSettings(max_side=24))
    dataset = open_dataset(tmp_path / "shards")
    sizes = dict(zip(dataset.keys, dataset.sizes_N2.tolist(), strict=True))
    assert sizes["ant/0.jpg"] == [20, 24]  # was 40 x 48
    assert sizes["ant/large.png"] == [16, 24]
    assert sizes["ant/small.png"] == [16, 20]
    for row in range(len(dataset)):
        assert decode(dataset.image_bytes(row)).shape[:2] == tuple(dataset.sizes_N2[row])


def test_what_a_source_says_of_splits_is_kept(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    splits = [("train", "val", "test", "")[i % 4] for i in range(24)]
    manifest = write_shards(replace(source, splits=splits), tmp_path / "shards")
    assert manifest.counts == dict.fromkeys(("test", "train", "unsplit", "val"), (3, 3))
    dataset = open_dataset(tmp_path / "shards")
    said = dict(zip(source.keys, splits, strict=True))
    for row, key in enumerate(dataset.keys):
        assert SPLITS[dataset.splits_N[row]] == (said[key] or "unsplit")


def test_shards_are_plain_parquet_with_the_documented_schema(folder: Path, tmp_path: Path) -> None:
    manifest = write_shards(open_source(str(folder)), tmp_path / "shards")
    table = pq.read_table(tmp_path / "shards" / manifest.shards[0].path)
    assert table.schema.equals(SCHEMA)
    assert table["width"].to_pylist() == [48] * 24
    assert decode(table["image"][3].as_py()).shape == (40, 48, 3)


def test_rows_are_shuffled_the_same_way_every_time(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    hashes = {
        name: write_shards(source, tmp_path / name, WriteSettings(seed=seed)).sha256
        for name, seed in (("first", 0), ("second", 0), ("other", 1))
    }
    assert hashes["first"] == hashes["second"] != hashes["other"]
    labels = open_dataset(tmp_path / "first").labels_N
    assert 0 < np.count_nonzero(np.diff(labels)) != 1  # not one class after the other


def test_a_limit_is_stratified(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", ("ant", "bee", "cat"), each=10)
    source = open_source(str(tmp_path / "images"))
    assert write_shards(source, tmp_path / "shards", WriteSettings(limit=7)).label_counts == (
        3,
        2,
        2,
    )
    with pytest.raises(ConfigError, match=r"data.limit is 2"):
        write_shards(source, tmp_path / "none", WriteSettings(limit=2))


def test_bad_images_are_left_out_and_listed(folder: Path, tmp_path: Path) -> None:
    (folder / "ant" / "bad.jpg").write_bytes(b"no image")
    manifest = write_shards(open_source(str(folder)), tmp_path / "shards", max_bad_fraction=0.05)
    assert (manifest.num_images, manifest.num_bad) == (24, 1)
    listed = pq.read_table(tmp_path / "shards" / "bad_images.parquet").to_pylist()
    assert [row["key"] for row in listed] == ["ant/bad.jpg"]
    assert listed[0]["reason"].startswith("unreadable")


def test_too_many_bad_images_stop_the_job_and_are_listed(folder: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (folder / "bee" / f"{name}.jpg").write_bytes(encoded(picture())[:500])
    with pytest.raises(DataError, match=r"2 of 26 images cannot be used: bee/.\.jpg \(truncated\)"):
        write_shards(open_source(str(folder)), tmp_path / "shards", max_bad_fraction=0.05)
    assert leftovers(tmp_path) == ["shards.bad_images.parquet"]
    assert pq.read_table(tmp_path / "shards.bad_images.parquet").num_rows == 2


def test_an_image_that_vanishes_while_writing_is_bad(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    (folder / "ant" / "3.jpg").unlink()
    assert write_shards(source, tmp_path / "shards", max_bad_fraction=0.1).num_bad == 1


def test_a_directory_that_holds_something_is_not_touched(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds something already"):
        write_shards(open_source(str(folder)), folder)
    assert len(list(folder.rglob("*.jpg"))) == 24


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full")])
def test_a_fault_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    def failing(*args: object) -> None:
        raise fault

    monkeypatch.setattr(shardfile, "build_index", failing)
    expected = StorageError if isinstance(fault, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_shards(open_source(str(folder)), tmp_path / "shards")
    assert leftovers(tmp_path) == []


def test_an_index_that_is_missing_is_built_again(folder: Path, tmp_path: Path) -> None:
    write_shards(open_source(str(folder)), tmp_path / "shards")
    before = bytes(open_dataset(tmp_path / "shards").image_bytes(7))
    index_path(tmp_path / "shards" / "shard-00000.parquet").unlink()
    assert bytes(open_dataset(tmp_path / "shards").image_bytes(7)) == before


def test_damaged_shards_are_noticed(folder: Path, tmp_path: Path) -> None:
    write_shards(open_source(str(folder)), tmp_path / "good")
    shard, index = "shard-00000.parquet", "shard-00000.index.npy"

    def damaged(name: str, damage: object) -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "good", copy)
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(damage(data))
        return copy

    with pytest.raises(DataError, match="bytes, not"):
        open_dataset(damaged(shard, lambda data: data[:-10]))
    for damage in (lambda data: data[:-8], lambda data: b"", lambda data: b"x" * len(data)):
        with pytest.raises(DataError, match="not the index that was written"):
            open_dataset(damaged(index, damage))
    flipped = damaged(shard, lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    with pytest.raises(DataError, match="not the file that was written"):
        verify_shards(flipped)
    verify_shards(tmp_path / "good")
    (tmp_path / "good" / shard).unlink()
    with pytest.raises(DataError, match=r"shard-00000\.parquet is not in .*the manifest lists it"):
        open_dataset(tmp_path / "good")


def test_a_compressed_file_cannot_be_indexed(folder: Path, tmp_path: Path) -> None:
    write_shards(open_source(str(folder)), tmp_path / "shards")
    table = pq.read_table(tmp_path / "shards" / "shard-00000.parquet")
    pq.write_table(table, tmp_path / "packed.parquet", compression="gzip")
    with pytest.raises(DataError, match="contiguously"):
        build_index(tmp_path / "packed.parquet")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kept", ["unfinished.json", "first shard"])
def test_a_writer_killed_at_any_moment_is_followed_by_another(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """A kill does not clean up: what is in place then is what the next writer finds."""
    source, target = open_source(str(folder)), tmp_path / "shards"
    killed = RuntimeError("as if killed")
    real = write.LocalStore.put

    def put(store: object, name: str, path: Path) -> None:
        real(store, name, path)
        if name == ("unfinished.json" if kept == "unfinished.json" else "shard-00000.parquet"):
            raise killed

    monkeypatch.setattr(write.LocalStore, "put", put)
    monkeypatch.setattr(write.LocalStore, "delete", lambda *_: None)
    with pytest.raises(RuntimeError):
        write_shards(source, target)
    monkeypatch.undo()
    assert "unfinished.json" in leftovers(target)
    assert write_shards(source, target).num_images == 24
    verify_shards(target)


def test_the_same_call_again_finds_it_done(folder: Path, tmp_path: Path) -> None:
    source, target = open_source(str(folder)), tmp_path / "shards"
    first = write_shards(source, target)
    (target / "unfinished.json").write_bytes((target / "made_from.json").read_bytes())  # a kill
    before = (target / "manifest.json").stat().st_mtime_ns
    assert write_shards(source, target) == first
    assert (target / "manifest.json").stat().st_mtime_ns == before
    assert "unfinished.json" not in leftovers(target)
    with pytest.raises(StorageError, match="from other images or with other settings"):
        write_shards(source, target, WriteSettings(seed=1))
