import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.errors import StorageError
from tlrunner.train.checkpoint import (
    others,
    read_checkpoint,
    save_tensors,
    verify_commit,
    write_checkpoint,
    write_commit,
)
from tlrunner.train.trial_dir import TrialDir

TENSORS = {
    "conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2),
    "norm.num_batches_tracked": torch.tensor(7),
    "head.bias": torch.tensor([0.1, float("inf")], dtype=torch.bfloat16),
}
FILES = ("trainable.safetensors", "state.json")


def test_a_checkpoint_reads_back_bit_for_bit(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, 12, TENSORS, {"epoch": 3})
    tensors, state = read_checkpoint(directory)
    assert state == {"step": 12, "epoch": 3}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_the_memory_layout_of_a_tensor_does_not_change_what_is_stored(tmp_path: Path) -> None:
    weight = TENSORS["conv.weight"]
    save_tensors(tmp_path / "one", {"w": weight})
    save_tensors(tmp_path / "other", {"w": weight.to(memory_format=torch.channels_last)})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_the_commit_names_every_file_with_its_size_and_hash(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, 1, TENSORS, {})
    commit = json.loads((directory / "COMMIT.json").read_text())
    assert set(commit) == set(FILES)
    for name, facts in commit.items():
        assert facts["num_bytes"] == (directory / name).stat().st_size
        assert len(facts["sha256"]) == 64
    assert {file.name for file in directory.iterdir()} == {*FILES, "COMMIT.json"}


def test_an_attempt_is_never_used_twice(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, 8, TENSORS, {})
    torn = tmp_path / "00000008-1"
    torn.mkdir()  # as a kill leaves it: no commit
    third = write_checkpoint(tmp_path, 8, TENSORS, {})
    assert [first.name, third.name] == ["00000008-0", "00000008-2"]
    assert not list(torn.iterdir())
    assert others(tmp_path, third) == [first, torn]
    assert others(tmp_path, third, num_newest=4) == []
    shutil.rmtree(first)
    shutil.rmtree(torn)
    assert write_checkpoint(tmp_path, 8, TENSORS, {}).name == "00000008-3"


def test_the_tenth_attempt_comes_after_the_ninth(tmp_path: Path) -> None:
    names = [write_checkpoint(tmp_path, 8, {}, {}).name for _ in range(12)]
    assert names == [f"00000008-{attempt}" for attempt in range(12)]
    assert [path.name for path in others(tmp_path, None)] == names, "in the order of their numbers"


def test_no_two_turns_use_a_name(tmp_path: Path) -> None:
    here = [write_checkpoint(tmp_path / "here", 8, {}, {}, turn=1).name for _ in range(2)]
    elsewhere = write_checkpoint(tmp_path / "elsewhere", 8, {}, {}, turn=2).name
    assert [*here, elsewhere] == ["00000008-100", "00000008-101", "00000008-200"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path, 1, TENSORS, {})
    (directory / name).unlink()
    with pytest.raises(StorageError, match=f"{name} is missing"):
        read_checkpoint(directory)


def test_without_its_commit_a_checkpoint_does_not_exist(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, 1, TENSORS, {})
    (directory / "COMMIT.json").unlink()
    with pytest.raises(StorageError, match=r"holds no COMMIT\.json"):
        read_checkpoint(directory)


@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_any_flipped_bit_is_found_and_its_file_named(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: float, bit: int
) -> None:
    root = tmp_path_factory.mktemp("rot")
    directory = write_checkpoint(root, 1, TENSORS, {})
    content = bytearray((directory / name).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    (directory / name).write_bytes(content)
    with pytest.raises(StorageError, match=f"{name} differs from what was committed"):
        read_checkpoint(directory)
    shutil.rmtree(root)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, 1, TENSORS, {})
    path = directory / FILES[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=f"{FILES[0]} differs"):
        verify_commit(directory)


def test_a_commit_cannot_vouch_for_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "file").write_text("x")
    write_commit(inner)
    commit = json.loads((inner / "COMMIT.json").read_text())
    (inner / "COMMIT.json").write_text(json.dumps({"../outside": commit["file"]}))
    with pytest.raises(StorageError, match=r"COMMIT\.json cannot be read: '\.\./outside'"):
        verify_commit(inner)


def test_nothing_but_the_other_checkpoints_goes_for_one(tmp_path: Path) -> None:
    trial = TrialDir(tmp_path)
    for step in (4, 8):
        write_checkpoint(trial.checkpoints, step, {}, {})
    kept = write_checkpoint(trial.checkpoints, 12, {}, {})
    (trial.checkpoints / "notes").mkdir()
    trial.keep_only(kept)
    assert {path.name for path in trial.checkpoints.iterdir()} == {kept.name, "notes"}
    verify_commit(kept)


def test_nothing_is_dropped_for_a_checkpoint_that_is_not_committed(tmp_path: Path) -> None:
    trial = TrialDir(tmp_path)
    good = write_checkpoint(trial.checkpoints, 4, {}, {})
    (trial.checkpoints / "00000008-0").mkdir()
    with pytest.raises(AssertionError, match="not committed"):
        trial.keep_only(trial.checkpoints / "00000008-0")
    verify_commit(good)


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        write_checkpoint(tmp_path / "file", 1, TENSORS, {})
