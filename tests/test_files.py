import copy
import hashlib
import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlrunner import errors
from tlrunner.errors import StorageError, TlrunnerError, nearest
from tlrunner.files import (
    canonical_json,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
    write_with,
)
from tlrunner.stored import read_stored

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
).filter(lambda value: "inf" not in repr(value))


@given(json_values)
def test_what_is_written_as_json_reads_back(value: object) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "deep" / "value.json"
        write_json(path, value)
        assert json.loads(path.read_text()) == value
        assert [path.name] == [file.name for file in path.parent.iterdir()]


@given(st.dictionaries(st.text(), json_values, max_size=6), st.randoms())
def test_the_hash_of_a_map_does_not_depend_on_its_order(
    mapping: dict[str, object], random: object
) -> None:
    items = list(mapping.items())
    random.shuffle(items)
    assert sha256_json(dict(items)) == sha256_json(mapping)
    assert json.loads(canonical_json(mapping)) == mapping


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}])
def test_numbers_that_json_does_not_have_are_refused_and_nothing_is_written(
    value: object, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "value.json", value)
    with pytest.raises(ValueError, match="JSON"):
        sha256_json(value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "value.txt"
    write_text(path, "old")

    def write_half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise error

    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_with(path, write_half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/value\.json cannot be written: .*directory"):
        write_json(tmp_path / "file" / "value.json", {})


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"a": ')
    for name in ("torn.json", "absent.json"):
        with pytest.raises(StorageError, match=name):
            read_stored(dict, tmp_path / name)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_file_is_hashed_to_its_last_byte(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# -- Errors ----------------------------------------------------------------------------------------

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, TlrunnerError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_whole_after_its_way_between_processes(kind: type[TlrunnerError]) -> None:
    again = copy.copy(kind("found", "valid", "remedy"))  # copied as it is pickled
    assert type(again) is kind
    assert (again.found, again.valid, again.remedy) == ("found", "valid", "remedy")


def test_each_kind_of_error_has_its_own_exit_code() -> None:
    codes = [kind.exit_code for kind in KINDS if kind.__base__ in (Exception, TlrunnerError)]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 2, 3} & set(codes)


def test_an_error_says_only_the_parts_it_has() -> None:
    assert (
        str(TlrunnerError("lr is -1", "above 0", "use 0.1")) == "lr is -1; valid: above 0; use 0.1"
    )
    assert str(TlrunnerError("lr is -1", "", "use 0.1")) == "lr is -1; use 0.1"
    assert str(TlrunnerError("lr is -1")) == "lr is -1"


def test_only_close_names_are_suggested() -> None:
    assert nearest("resnet5", ["resnet50", "vgg11"]) == "did you mean resnet50?"
    assert nearest("zzz", ["resnet50", "vgg11"]) == ""
