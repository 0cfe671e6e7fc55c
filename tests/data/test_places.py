import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.data.places import file_facts, place_of, read_file


@pytest.mark.parametrize(
    ("written", "base", "place"),
    [
        ("a.jpg", "/lists", "/lists/a.jpg"),
        ("./sub/../a.jpg", "/lists", "/lists/a.jpg"),
        ("../a.jpg", "/lists/x", "/lists/a.jpg"),
        ("/a.jpg", "/lists", "/a.jpg"),
        ("//a.jpg", "/lists", "/a.jpg"),
        ("file:///a b.jpg", "s3://bucket", "/a b.jpg"),
        ("s3://b/k//x", "/lists", "s3://b/k//x"),
        ("S3://b/k", "/lists", "s3://b/k"),
        ("a.jpg", "s3://bucket", "s3://bucket/a.jpg"),
        ("../images/a.jpg", "s3://bucket/lists/x", "s3://bucket/lists/images/a.jpg"),
        ("../../../a.jpg", "s3://bucket/lists", "s3://bucket/a.jpg"),
        ("/a.jpg", "s3://bucket/lists", "/a.jpg"),
        ("C:a.jpg", "/lists", "/lists/C:a.jpg"),
    ],
)
def test_a_path_means_one_place(written: str, base: str, place: str) -> None:
    assert place_of(written, base) == place


@pytest.mark.parametrize("written", ["http://x/a.jpg", "s3://bucket", "s3:///k", "a\0b", "\ud800"])
def test_what_means_no_place_says_why(written: str) -> None:
    with pytest.raises(ValueError, match=r"scheme|names no object|characters"):
        place_of(written, "/lists")


def test_the_prefix_itself_is_no_object() -> None:
    with pytest.raises(ValueError, match="names no object"):
        place_of(".", "s3://bucket")


@given(st.text(), st.sampled_from(["/lists", "s3://bucket/lists"]))
def test_a_place_is_its_own_place(written: str, base: str) -> None:
    try:
        place = place_of(written, base)
    except ValueError:
        return
    assert place.startswith(("/", "s3://"))
    assert place_of(place, "/elsewhere") == place


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"content")
    assert read_file(tmp_path / "x") == b"content"
    assert file_facts(tmp_path / "x")[0] == 7
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "absent"):
        with pytest.raises(OSError, match=r"regular|directory|No such"):
            read_file(path)
    assert file_facts(tmp_path / "absent") == file_facts("s3://bucket/key") == (0, 0)
