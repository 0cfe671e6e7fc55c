import io
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, picture

from tlrunner.data import column
from tlrunner.data.source import Source
from tlrunner.data.sources import open_source
from tlrunner.errors import DataError, StorageError

N = 40
IMAGES = [encoded(picture(i), quality=95) for i in range(N)]
LABELS = [i % 3 for i in range(N)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["zebra", "ant", "bee"]
PLAIN = {"compression": "none", "use_dictionary": False}
FORMS = {
    "plain": PLAIN,
    "plain, pages of version 2": PLAIN | {"data_page_version": "2.0"},
    "plain, small pages": PLAIN | {"data_page_size": 1000, "write_batch_size": 3},
    "plain, checksums": PLAIN | {"write_page_checksum": True},
    "dictionary": {"compression": "none", "use_dictionary": True},
    "snappy": {"compression": "snappy"},
    "zstd": {"compression": "zstd", "write_page_checksum": True},
    "delta lengths": PLAIN | {"column_encoding": "DELTA_LENGTH_BYTE_ARRAY"},
}


def hugging_face(names: list[str] = NAMES) -> dict[str, str]:
    """Metadata of a schema as `datasets` writes it."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def structs(images: list[bytes | None], paths: list[str | None]) -> pa.Array:
    rows = [{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)]
    return pa.array(rows, STRUCT)


def table(
    *, image: Any = None, label: Any = LABELS, metadata: dict[str, str] | None = None, **more: Any
) -> pa.Table:
    image = structs(IMAGES, [f"{i}.jpg" for i in range(N)]) if image is None else image
    columns = {"image": image, "label": label} | more
    made = pa.table({name: values for name, values in columns.items() if values is not None})
    return made.replace_schema_metadata(metadata)


def write(path: Path, of: pa.Table, **form: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(of, path, **({"row_group_size": 7} | form))
    return str(path)


def opened(uri: str, tmp_path: Path, **options: Any) -> Source:
    return open_source(uri, cache_dir=tmp_path / "cache", **options)


def all_images(source: Source) -> list[bytes]:
    """Read as the writer does: by threads, in another order than they are stored in."""
    order = np.random.default_rng(0).permutation(len(source))
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(order, pool.map(source.read, order), strict=True))
    return [found[i] for i in range(len(source))]


def refused(uri: str, tmp_path: Path) -> str:
    with pytest.raises(DataError) as caught:
        opened(uri, tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind", [STRUCT, pa.binary(), pa.large_binary(), pa.binary_view()], ids=str
)
def test_every_image_comes_back_however_it_is_stored(
    tmp_path: Path, form: str, kind: pa.DataType
) -> None:
    options = dict(FORMS[form])
    leaf = "image.bytes" if kind == STRUCT else "image"
    if encoding := options.pop("column_encoding", None):
        options["column_encoding"] = {leaf: encoding}
    image = None if kind == STRUCT else pa.array(IMAGES, pa.binary()).cast(kind)
    uri = write(tmp_path / "x.parquet", table(image=image), **options)
    source = opened(uri, tmp_path)
    assert all_images(source) == IMAGES
    assert source.class_names == ("0", "1", "2")
    assert source.labels == LABELS
    assert source.keys[3] == ("3.jpg" if kind == STRUCT else "x.parquet#3")


def test_only_what_is_packed_is_copied(tmp_path: Path) -> None:
    for form, copied in (("plain", False), ("plain, small pages", False), ("snappy", True)):
        cache = tmp_path / form
        source = opened(write(tmp_path / "x.parquet", table(), **FORMS[form]), cache)
        all_images(source)
        assert (cache / "cache").exists() is copied
        assert not list(cache.rglob("*.*"))  # a copy has no name, and so leaves nothing behind


def test_one_large_row_group_is_copied_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(1 << 20) for _ in range(64)]
    big = table(image=pa.array(images), label=[0, 1] * 32)
    for form in (PLAIN, {"compression": "zstd"}):
        uri = write(tmp_path / "x.parquet", big, row_group_size=1000, write_batch_size=4, **form)
        source = opened(uri, tmp_path)
        before, peaks = pa.total_allocated_bytes(), list[int]()
        real = column.ImageColumn._batches

        def watched(self: Any, *args: Any, real: Any = real, peaks: Any = peaks) -> Any:
            for batch in real(self, *args):
                peaks.append(pa.total_allocated_bytes())
                yield batch

        monkeypatch.setattr(column.ImageColumn, "_batches", watched)
        assert source.read(63) == images[63]
        monkeypatch.setattr(column.ImageColumn, "_batches", real)
        assert max(peaks) - before < 48 << 20  # of 64 MiB


def test_classes_are_named_by_the_metadata_of_hugging_face(tmp_path: Path) -> None:
    uri = write(tmp_path / "x.parquet", table(metadata=hugging_face()))
    source = opened(uri, tmp_path)
    assert source.class_names == tuple(NAMES)
    assert source.labels == LABELS


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"info": {"features": {"label": {}}}}'])
def test_metadata_of_no_use_is_no_hindrance(tmp_path: Path, text: str) -> None:
    uri = write(tmp_path / "x.parquet", table(metadata={"huggingface": text}))
    assert opened(uri, tmp_path).class_names == ("0", "1", "2")


def test_labels_are_numbers_or_text(tmp_path: Path) -> None:
    numbers = table(label=pa.array([10, 9] * 20, pa.uint8()))
    assert opened(write(tmp_path / "x.parquet", numbers), tmp_path).class_names == ("9", "10")
    words = pa.array(["bee", "ant"] * 20)
    for label in (words, words.cast(pa.large_string()), words.dictionary_encode()):
        source = opened(write(tmp_path / "x.parquet", table(label=label)), tmp_path)
        assert source.class_names == ("ant", "bee")
        assert source.labels == [1, 0] * 20


def test_a_directory_is_read_at_any_depth_in_the_order_of_names(tmp_path: Path) -> None:
    whole = table(image=pa.array(IMAGES))
    write(tmp_path / "d" / "b.parquet", whole.slice(0, 10))
    write(tmp_path / "d" / "a" / "deep" / "x.PARQUET", whole.slice(10, 30), compression="zstd")
    for ignored in ("_metadata.parquet", ".x.parquet", "_tmp/x.parquet", "notes.txt"):
        (tmp_path / "d" / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / ignored).write_bytes(b"")
    source = opened(f"file://{tmp_path}/d", tmp_path)
    assert all_images(source) == IMAGES[10:] + IMAGES[:10]
    assert source.keys[0] == "a/deep/x.PARQUET#0"
    assert source.keys[-1] == "b.parquet#9"


def test_a_directory_may_be_named_like_a_file(tmp_path: Path) -> None:
    write(tmp_path / "set.parquet" / "part-00000.snappy.parquet", table())
    (tmp_path / "set.parquet" / "_SUCCESS").touch()
    assert len(opened(str(tmp_path / "set.parquet"), tmp_path)) == N


def test_images_win_over_parquet_files_beside_them(folder: Path, tmp_path: Path) -> None:
    write(folder / "notes.parquet", table())
    assert opened(str(folder), tmp_path).class_names == ("ant", "bee")


def test_paths_are_the_keys_only_if_they_are_distinct(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "d" / f"{name}.parquet", table())
    assert opened(str(tmp_path / "d"), tmp_path).keys[N + 1] == "b.parquet#1"
    some = structs(IMAGES, [None, *(f"{i}.jpg" for i in range(1, N))])
    uri = write(tmp_path / "x.parquet", table(image=some))
    assert opened(uri, tmp_path).keys[1] == "x.parquet#1"


def test_a_row_without_bytes_is_the_file_that_its_path_names(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(IMAGES[1])
    paths = ["0.jpg", "images/1.jpg", "gone.jpg", None, "3.jpg"]
    image = structs([IMAGES[0], None, None, None, b""], paths)
    uri = write(tmp_path / "x.parquet", table(image=image, label=[0, 1, 0, 1, 0]))
    source = opened(uri, tmp_path)
    assert [source.read(i) for i in (0, 1, 3, 4)] == [IMAGES[0], IMAGES[1], b"", b""]
    with pytest.raises(FileNotFoundError):
        source.read(2)
    before = source.fingerprint
    os.utime(tmp_path / "images" / "1.jpg", ns=(1, 1))
    assert opened(uri, tmp_path).fingerprint != before


def test_null_structs_and_null_binaries_are_empty_images(tmp_path: Path) -> None:
    for image in (pa.array([None, None], STRUCT), pa.array([None, None], pa.binary())):
        for form in ("plain", "snappy"):
            uri = write(tmp_path / "x.parquet", table(image=image, label=[0, 1]), **FORMS[form])
            assert all_images(opened(uri, tmp_path)) == [b"", b""]


def test_splits_come_from_a_column_or_from_names(tmp_path: Path) -> None:
    split = ["train", "validation", None, "TEST"] * 10
    uri = write(tmp_path / "d" / "train.parquet", table(split=split))
    assert opened(uri, tmp_path).splits == ["train", "val", "", "test"] * 10
    for name in ("train-00000-of-00001", "validation-00000-of-00001", "test_set"):
        write(tmp_path / "named" / "data" / f"{name}.parquet", table().slice(0, 2))
    assert opened(str(tmp_path / "named"), tmp_path).splits == [
        *("test", "test", "train", "train", "val", "val")
    ]
    for name in ("train/0000", "testing/0000"):
        write(tmp_path / "folders" / "data" / f"{name}.parquet", table().slice(0, 2))
    assert opened(str(tmp_path / "folders"), tmp_path).splits == ["test", "test", "train", "train"]
    write(tmp_path / "folders" / "testimony.parquet", table().slice(0, 2))
    assert opened(str(tmp_path / "folders"), tmp_path).splits == ()


def test_images_without_labels_are_taken_where_they_are_of_use(tmp_path: Path) -> None:
    uri = write(tmp_path / "x.parquet", table(label=None))
    assert opened(uri, tmp_path, labelled=False).labels == [-1] * N
    assert "x.parquet has no column 'label'; its columns: image" in refused(uri, tmp_path)
    unknown = table(label=[-1, 0] * 20, metadata=hugging_face())
    uri = write(tmp_path / "x.parquet", unknown)
    assert opened(uri, tmp_path, labelled=False).class_names == ()
    assert "x.parquet row 0 has no label" in refused(uri, tmp_path)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: table().drop_columns(["image"]), "no column 'image'; its columns: label"),
        (lambda: table(image=[1.0] * N), "image of type double; valid: binary, or a struct"),
        (lambda: table(image=["x"] * N), "image of type string"),
        (lambda: table(image=[{"path": "x"}] * N), "image of type struct<path: string>"),
        (lambda: table(label=[0.5] * N), "label of type double; valid: whole numbers or text"),
        (lambda: table(label=[0, None] * 20), "row 1 has no label"),
        (lambda: table(label=["a", ""] * 20), "row 1 has no label"),
        (lambda: table(label=[3] * N), "one class: 3"),
        (lambda: table(label=[0, 3] * 20, metadata=hugging_face()), "row 1 has label 3; valid: 0"),
        (lambda: table(label=[0, -2] * 20, metadata=hugging_face()), "row 1 has label -2"),
        (lambda: table(split=["train", "dev"] * 20), "row 1 has split 'dev'; valid: train"),
        (lambda: table(split=LABELS), "split of type int64"),
        (lambda: table().slice(0, 0), "has no rows"),
        (lambda: table().rename_columns(["image", "image"]), "two columns 'image'"),
    ],
)
def test_a_file_that_cannot_be_used_is_explained(tmp_path: Path, made: Any, said: str) -> None:
    message = refused(write(tmp_path / "x.parquet", made()), tmp_path)
    assert said in message
    assert "x.parquet" in message


def test_files_that_differ_are_both_named(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.parquet", table(metadata=hugging_face()))
    for other in (
        table(image=pa.array(IMAGES), metadata=hugging_face()),
        table(label=["x"] * N),
        table(metadata=hugging_face([*NAMES, "dog"])),
        table(split=["train"] * N, metadata=hugging_face()),
    ):
        write(tmp_path / "d" / "b.parquet", other)
        assert "a.parquet and b.parquet differ in their" in refused(str(tmp_path / "d"), tmp_path)


def test_what_is_no_parquet_is_explained(tmp_path: Path) -> None:
    good = (tmp_path / "good.parquet", table())
    write(*good)
    content = good[0].read_bytes()
    for data in (b"", b"PAR1", b"x" * 1000, content[:-1], content[:500], IMAGES[0]):
        (tmp_path / "x.parquet").write_bytes(data)
        message = refused(str(tmp_path / "x.parquet"), tmp_path)
        assert "x.parquet cannot be read as Parquet" in message


def test_a_page_that_fails_its_checksum_ends_the_reading(tmp_path: Path) -> None:
    for form, at in (("plain, checksums", 6000), ("zstd", 600)):  # inside of a page
        path = tmp_path / "x.parquet"
        write(path, table(image=pa.array(IMAGES)), **FORMS[form])
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x.parquet cannot be read: row group 0: .*"):
            all_images(opened(str(path), tmp_path))


@pytest.mark.parametrize("form", ["plain", "snappy"])
def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, form: str) -> None:
    path = tmp_path / "x.parquet"
    source = opened(write(path, table(), **FORMS[form]), tmp_path)
    source.read(0)
    write(tmp_path / "other.parquet", table(), **FORMS[form])
    (tmp_path / "other.parquet").replace(path)
    with pytest.raises(DataError, match="changed while it was read"):
        source.read(N - 1)
    path.unlink()
    with pytest.raises(DataError, match=r"x.parquet cannot be read: .*No such file"):
        source.read(20)


def test_a_copy_that_cannot_be_kept_is_a_fault_of_the_storage(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    source = opened(write(tmp_path / "x.parquet", table(), **FORMS["snappy"]), tmp_path)
    with pytest.raises(StorageError, match="cannot be written"):
        source.read(0)


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = tmp_path / "d" / "x.parquet"
    write(path, table())
    first = opened(str(path.parent), tmp_path).fingerprint
    assert opened(str(path.parent), tmp_path / "elsewhere").fingerprint == first
    os.utime(path, ns=(1, 1))
    second = opened(str(path.parent), tmp_path).fingerprint
    path.rename(path.with_name("y.parquet"))
    assert len({first, second, opened(str(path.parent), tmp_path).fingerprint}) == 3


def test_no_row_group_is_decoded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, lock = list[int](), threading.Lock()
    real = column.ImageColumn._read_group

    def counted(self: Any, group: int) -> Any:
        with lock:
            decoded.append(group)
        return real(self, group)

    monkeypatch.setattr(column.ImageColumn, "_read_group", counted)
    source = opened(write(tmp_path / "x.parquet", table()), tmp_path)
    assert all_images(source) == IMAGES
    assert sorted(decoded) == list(range(6))


def test_parquet_in_s3_is_fetched_and_read(s3_bucket: Any, tmp_path: Path) -> None:
    for name in ("train-0", "test-0"):
        write(tmp_path / "up" / f"{name}.parquet", table(metadata=hugging_face()))
        key = f"set/data/{name}.parquet"
        s3_bucket.client.upload_file(str(tmp_path / "up" / f"{name}.parquet"), s3_bucket.name, key)
    source = opened(f"{s3_bucket.uri}/set", tmp_path)
    assert all_images(source) == IMAGES * 2
    assert source.splits == ["test"] * N + ["train"] * N
    assert opened(f"{s3_bucket.uri}/set/", tmp_path / "other").fingerprint == source.fingerprint
    alone = opened(f"{s3_bucket.uri}/set/data/test-0.parquet", tmp_path)
    assert alone.keys == [f"{i}.jpg" for i in range(N)]
    file = io.BytesIO()
    pq.write_table(table(image=structs([None] * N, ["../0.jpg"] * N)), file)
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="a/x.parquet", Body=file.getvalue())
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="0.jpg", Body=IMAGES[0])
    assert opened(f"{s3_bucket.uri}/a", tmp_path).read(5) == IMAGES[0]
