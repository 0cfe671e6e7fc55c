import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encoded, picture

from tlrunner.data.listing import open_list
from tlrunner.data.source import Source
from tlrunner.errors import DataError

PICTURES = {f"{i}.jpg": encoded(picture(i)) for i in range(4)}
ROWS = [("0.jpg", "bee"), ("sub/1.jpg", "ant"), ("2.jpg", "bee"), ("3.jpg", "cat")]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for path, _ in ROWS:
        (tmp_path / path).write_bytes(PICTURES[Path(path).name])
    return tmp_path


def csv_text(rows: list[tuple[str, ...]], header: str = "path,label") -> str:
    return "\n".join([header, *(",".join(row) for row in rows)]) + "\n"


def listed(directory: Path, text: str | bytes, name: str = "list.csv") -> str:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def json_lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(directory: Path, text: str | bytes, name: str = "list.csv") -> str:
    with pytest.raises(DataError) as caught:
        open_list(listed(directory, text, name))
    assert "\n" not in str(caught.value)
    assert str(directory / name) in str(caught.value)
    return str(caught.value)


def check_rows(source: Source) -> None:
    assert source.keys == [path for path, _ in ROWS]
    assert source.class_names == ("ant", "bee", "cat")
    assert [source.class_names[label] for label in source.labels] == [label for _, label in ROWS]
    assert [source.read(i) for i in range(4)] == [PICTURES[Path(key).name] for key in source.keys]
    assert source.num_bytes == sum(map(len, PICTURES.values()))


def test_csv_and_jsonl_say_the_same(images: Path) -> None:
    check_rows(open_list(listed(images, csv_text(ROWS))))
    lines = json_lines(*({"path": path, "label": label} for path, label in ROWS))
    check_rows(open_list(listed(images, lines, "list.jsonl")))
    check_rows(open_list(f"file://{listed(images, csv_text(ROWS))}"))


@pytest.mark.parametrize("change", [lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n")])
def test_a_byte_order_mark_and_line_ends_of_windows_are_fine(images: Path, change: object) -> None:
    check_rows(open_list(listed(images, change(csv_text(ROWS)))))
    lines = json_lines(*({"path": path, "label": label} for path, label in ROWS))
    check_rows(open_list(listed(images, change(lines), "list.jsonl")))


def test_order_of_columns_further_columns_and_empty_lines_do_not_matter(images: Path) -> None:
    rows = [(label, "7", path) for path, label in ROWS]
    text = csv_text(rows, "label,width,path").replace("\n", "\n\n")
    check_rows(open_list(listed(images, text)))


def test_paths_are_absolute_relative_or_uris(images: Path) -> None:
    rows = [(str(images / "0.jpg"), "a"), (f"file://{images}/2.jpg", "b"), ("sub/../3.jpg", "b")]
    source = open_list(listed(images, csv_text(rows)))
    assert source.keys == [path for path, _ in rows]
    assert [source.read(i) for i in range(3)] == [PICTURES[f"{n}.jpg"] for n in (0, 2, 3)]


def test_an_image_that_is_absent_or_no_file_is_an_os_error_when_it_is_read(images: Path) -> None:
    os.mkfifo(images / "pipe.jpg")
    rows = [("gone.jpg", "a"), ("sub", "b"), ("pipe.jpg", "b")]
    source = open_list(listed(images, csv_text(rows)))
    for i in range(3):
        with pytest.raises(OSError, match=r"No such file|regular|directory"):
            source.read(i)


def test_splits_are_known_by_all_their_spellings(images: Path) -> None:
    rows = [("0.jpg", "a", "Training"), ("2.jpg", "b", "valid"), ("3.jpg", "b", "testing")]
    text = csv_text([*rows, ("sub/1.jpg", "a", "")], "path,label,split")
    assert open_list(listed(images, text)).splits == ["train", "val", "test", ""]
    assert open_list(listed(images, csv_text(ROWS))).splits == ()
    assert "line 3 has split 'dev'; valid: train, training, val" in refused(
        images, text.replace("valid", "dev")
    )


def test_numbers_as_labels_are_ordered_as_numbers(images: Path) -> None:
    rows = [("0.jpg", "10"), ("2.jpg", "9"), ("3.jpg", "-1")]
    assert open_list(listed(images, csv_text(rows))).class_names == ("-1", "9", "10")
    lines = json_lines(*({"path": path, "label": int(label)} for path, label in rows))
    assert open_list(listed(images, lines, "list.jsonl")).labels == [2, 1, 0]
    rows.append(("x.jpg", "nine"))
    assert open_list(listed(images, csv_text(rows))).class_names == ("-1", "10", "9", "nine")


def test_unlabelled_lists_are_taken_where_they_are_of_use(images: Path) -> None:
    for text in ("path\n0.jpg\n2.jpg\n", csv_text([("0.jpg", "a"), ("2.jpg", "")])):
        uri = listed(images, text)
        source = open_list(uri, labelled=False)
        assert (source.class_names, source.labels) == ((), [-1, -1])
        with pytest.raises(DataError, match=r"no column 'label'|empty label"):
            open_list(uri)
    assert open_list(listed(images, csv_text(ROWS)), labelled=False).class_names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty; valid: a header"),
        ("path,label\n", "lists no images"),
        ("file,label\na,b\n", "has no column 'path'; its columns: file, label"),
        ("path;label\na;b\n", "has no column 'path'; its columns: path;label"),
        ("path,class\na,b\n", "line 2 has no column 'label'; its columns: path, class"),
        ("path,path,label\na,b,c\n", "two columns 'path'"),
        ("path,label\na,b,c\n", "line 2 has 3 fields, the header 2"),
        ("path,label\na,b\n\nc\n", "line 4 has 1 fields, the header 2"),
        ("path,label\na,b\n ,c\n", "line 3 has an empty path"),
        ("path,label\na,b\nc, \n", "line 3 has an empty label: c"),
        ('path,label\n"a,b\n', "is not CSV"),
        ("path,label\na,b\nb,b\n", "one class: b"),
        ("path,label\na,b\nc,d\na,b\n", "lines 2 and 4 both list a"),
        ("path,label\na,b\n./a,d\n", "lines 2 and 3 give ./a two labels: 'b' and 'd'"),
        ("path,label\nhttp://x/a,b\n", "line 2: 'http://x/a' has a scheme that is neither"),
        ("path,label\ns3://a,b\n", "line 2: 's3://a' names no object"),
        (b"path,label\na,b\n\xe9,c\n", "line 3 is not UTF-8: byte 0xe9"),
        ("path,label\na\0b,c\n", "line 2"),
    ],
)
def test_what_is_wrong_with_a_csv_is_said_with_its_line(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    assert said in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "lists no images"),
        ('{"path": "a", "label": "b"}\n{"path": "c"\n', "line 2 is not JSON: Expecting"),
        ('["a", "b"]\n', "line 1 is a JSON list; valid: an object"),
        ("\n\n3\n", "line 3 is a JSON int"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"label": "b"}', "line 1 has no column 'path'; its columns: label"),
        ('{"path": "a"}', "line 1 has no column 'label'"),
        ('{"path": 3, "label": "b"}', "line 1 has path 3; valid: text"),
        ('{"path": "a", "label": 0.5}', "line 1 has label 0.5; valid: text or a whole number"),
        ('{"path": "a", "label": true}', "line 1 has label True"),
        ('{"path": "a", "label": null}', "line 1 has an empty label"),
        ('{"path": "\\ud800", "label": "b"}', "half a character"),
        ('{"path": "a\\u0000", "label": "b"}', "characters that no path has"),
    ],
)
def test_what_is_wrong_with_jsonl_is_said_with_its_line(
    tmp_path: Path, text: str, said: str
) -> None:
    assert said in refused(tmp_path, text, "list.jsonl")


def test_the_fingerprint_follows_the_list_and_its_local_images(images: Path) -> None:
    uri = listed(images, csv_text(ROWS))
    seen = [open_list(uri).fingerprint]
    assert open_list(uri).fingerprint == seen[0]
    os.utime(images / "0.jpg", ns=(1, 1))
    seen.append(open_list(uri).fingerprint)
    (images / "2.jpg").unlink()
    seen.append(open_list(uri).fingerprint)
    listed(images, csv_text(ROWS[:3]))
    seen.append(open_list(uri).fingerprint)
    assert len(set(seen)) == 4


@given(
    st.lists(
        st.tuples(
            st.text(
                st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1
            ).filter(lambda text: text.strip() and text not in (".", "..")),
            st.sampled_from(["ant", "bee, the", 'say "cat"', "ünï\u2028x"]),
        ),
        min_size=2,
        max_size=6,
        unique_by=lambda row: row[0],
    )
)
def test_any_path_and_label_survives_jsonl(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    lines = json_lines(*({"path": path, "label": label} for path, label in rows))
    uri = listed(tmp_path_factory.getbasetemp(), lines, "any.jsonl")
    source = open_list(uri, labelled=False)
    assert source.keys == [path for path, _ in rows]
    if source.class_names:
        assert [source.class_names[i] for i in source.labels] == [label for _, label in rows]


@given(
    st.binary(max_size=60) | st.text('path,label\n"{}:[]', max_size=60).map(str.encode),
    st.sampled_from(["csv", "jsonl"]),
    st.booleans(),
)
def test_any_bytes_are_a_list_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, kind: str, labelled: bool
) -> None:
    header = b"path,label\n" if kind == "csv" else b""
    uri = listed(tmp_path_factory.getbasetemp(), header + content, f"bytes.{kind}")
    try:
        source = open_list(uri, labelled=labelled)
    except DataError as err:
        assert "\n" not in str(err)
    else:
        assert len(source.keys) == len(source.labels) > 0
