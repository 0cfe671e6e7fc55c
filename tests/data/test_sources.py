import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures import encoded, image_folder, picture

from tlrunner.data.s3 import S3Store
from tlrunner.data.sources import open_source, shards_at
from tlrunner.errors import DataError, StorageError


def test_an_image_folder_is_listed_by_class_name(folder: Path) -> None:
    (folder / "ant" / "deep" / "er").mkdir(parents=True)
    (folder / "ant" / "deep" / "er" / "X.PNG").write_bytes(encoded(picture(), "PNG"))
    for ignored in ("notes.txt", ".hidden.jpg"):
        (folder / "bee" / ignored).write_bytes(b"no image")
    (folder / ".git").mkdir()
    source = open_source(str(folder))
    assert source.class_names == ("ant", "bee")
    assert len(source) == 25
    labels = dict(zip(source.keys, source.labels, strict=True))
    assert {key.split("/")[0]: label for key, label in labels.items()} == {"ant": 0, "bee": 1}
    assert "ant/deep/er/X.PNG" in source.keys
    for i, key in enumerate(source.keys):
        assert source.read(i) == (folder / key).read_bytes()


def test_the_fingerprint_changes_when_a_file_does(folder: Path) -> None:
    before = open_source(str(folder)).fingerprint
    assert open_source(f"file://{folder}").fingerprint == before
    os.utime(folder / "ant" / "0.jpg", ns=(1, 1))
    touched = open_source(str(folder)).fingerprint
    (folder / "ant" / "0.jpg").rename(folder / "ant" / "00.jpg")
    assert len({before, touched, open_source(str(folder)).fingerprint}) == 3


def test_a_name_that_is_not_utf8_still_has_a_key(folder: Path) -> None:
    name = os.fsencode(folder / "ant") + b"/\xff.jpg"
    Path(os.fsdecode(name)).write_bytes(encoded(picture()))
    assert "ant/\\xff.jpg" in open_source(str(folder)).keys


def test_unlabelled_images_are_taken_only_where_they_are_of_use(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jpg", "a.jpg", "sub/c.jpg"):
        (tmp_path / name).write_bytes(encoded(picture()))
    source = open_source(str(tmp_path), labelled=False)
    assert source.class_names == ()
    assert source.keys == ["a.jpg", "b.jpg", "sub/c.jpg"]
    assert source.labels == [-1, -1, -1]
    (tmp_path / "sub" / "c.jpg").unlink()
    with pytest.raises(DataError, match="no labels"):
        open_source(str(tmp_path))


def test_the_sample_is_five_classes_of_flowers() -> None:
    source = open_source("sample:flowers")
    assert source.class_names == ("daisy", "dandelion", "rose", "sunflower", "tulip")
    assert len(set(source.keys)) == len(source) == 600


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("sample:flower", "did you mean sample:flowers"),
        ("gopher://x", "unknown scheme gopher://; valid: sample:flowers, an ImageFolder"),
        ("/no/such/place", "does not exist; valid: sample:flowers, an ImageFolder"),
        ("", "data.uri is ''"),
        ("a\0b", "data.uri is"),
    ],
)
def test_a_uri_that_leads_nowhere_is_explained(uri: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_source(uri)


@pytest.mark.parametrize("look", [open_source, shards_at])
def test_a_path_that_the_system_refuses_is_a_data_error(
    look: Callable[[str], object], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        look(str(folder / ("x" * 300)))

    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    asked_of = ("exists", "is_file") if look is shards_at else ("exists", "is_dir", "is_file")
    for asked in asked_of:  # each a stat of its own; root may do them all
        with monkeypatch.context() as patched:
            patched.setattr(Path, asked, denied)
            with pytest.raises(DataError, match=r"images.* cannot be read: Permission denied"):
                look(str(folder))


def test_a_misspelt_path_is_corrected(folder: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean .*images"):
        open_source(str(folder.with_name("imagse")))


def test_folders_that_are_no_image_folder_are_explained(tmp_path: Path) -> None:
    def refused(name: str) -> str:
        with pytest.raises(DataError) as caught:
            open_source(str(tmp_path / name))
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "holds no images; valid: images (.jpg .jpeg" in refused("empty")
    image_folder(tmp_path / "one", ("ant",))
    assert "one class: ant" in refused("one")
    image_folder(tmp_path / "split", ("train", "val"))
    assert "splits (train, val), not classes" in refused("split")
    image_folder(tmp_path / "hollow")
    (tmp_path / "hollow" / "cat").mkdir()
    assert "without images: cat" in refused("hollow")
    image_folder(tmp_path / "loose")
    (tmp_path / "loose" / "x.jpg").write_bytes(encoded(picture()))
    assert "outside any class folder, e.g. x.jpg" in refused("loose")
    assert "is a file" in refused("loose/x.jpg")


def test_files_of_no_known_kind_are_refused_with_those_that_are(tmp_path: Path) -> None:
    for name in ("labels.tsv", "images.zip", "x.jpg", "notes.txt", "no_extension"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=r"is a file; valid: .*\.csv or \.jsonl.*\.parquet"):
            open_source(str(tmp_path / name))


def test_what_is_no_regular_file_is_a_bad_image_not_the_end(folder: Path) -> None:
    (folder / "ant" / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "ant" / "directory.jpg").mkdir()
    os.mkfifo(folder / "bee" / "pipe.jpg")
    (folder / "bee" / "linked.jpg").symlink_to("0.jpg")
    source = open_source(str(folder))
    assert len(source) == 24 + 3
    for key, said in (("ant/dangling.jpg", "No such file"), ("bee/pipe.jpg", "regular")):
        with pytest.raises(OSError, match=said):
            source.read(list(source.keys).index(key))
    linked = list(source.keys).index("bee/linked.jpg")
    assert source.read(linked) == (folder / "bee" / "0.jpg").read_bytes()


def test_a_list_in_s3_names_images_in_s3(s3_bucket: Any) -> None:
    def put(key: str, body: bytes) -> None:
        s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=key, Body=body)

    images = [encoded(picture(i)) for i in range(3)]
    for i, key in enumerate(("lists/near.jpg", "far/1.jpg", "far/2.jpg")):
        put(key, images[i])
    rows = f"near.jpg,a\n../far/1.jpg,b\n{s3_bucket.uri}/far/2.jpg,b\ngone.jpg,b\n"
    put("lists/x.csv", f"path,label\n{rows}".encode())
    source = open_source(f"{s3_bucket.uri}/lists/x.csv")
    assert [source.read(i) for i in range(3)] == images
    assert source.labels == [0, 1, 1, 1]
    with pytest.raises(FileNotFoundError, match="no such object"):
        source.read(3)
    with pytest.raises(DataError, match="does not exist"):
        open_source(f"{s3_bucket.uri}/lists/absent.csv")
    with pytest.raises(DataError, match=r"neither shards .* nor .parquet files.*path,label"):
        open_source(f"{s3_bucket.uri}/far")
    assert shards_at(f"{s3_bucket.uri}/far") is None
    put("shards/manifest.json", b"{}")
    assert shards_at(f"{s3_bucket.uri}/shards") == f"{s3_bucket.uri}/shards"


def test_a_store_that_is_down_is_not_taken_for_absent_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.csv").write_text("path,label\ns3://bucket/a.jpg,a\ns3://bucket/b.jpg,b\n")
    source = open_source(str(tmp_path / "x.csv"))

    def down(*_: object) -> bytes:
        raise StorageError("the endpoint does not answer")

    monkeypatch.setattr(S3Store, "read", down)
    with pytest.raises(StorageError):
        source.read(0)
