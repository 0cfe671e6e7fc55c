"""Checkpoints: directories `<step>-<attempt>` that exist once their COMMIT.json does.

A checkpoint holds `trainable.safetensors` (what training changed; frozen weights come from the
pretrained backbone), `state.json` (where training stood) and, where a trial is to go on from it,
`state.safetensors` (the optimizer's moments and the like). COMMIT.json is written last, with the
size and SHA-256 of each file, so a reader can tell a whole checkpoint from a torn or rotten one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tlrunner.errors import StorageError
from tlrunner.files import read_json, sha256_file, write_json, write_with

COMMIT = "COMMIT.json"
TENSORS = "trainable.safetensors"
STATE = "state.json"
TRAINING_STATE = "state.safetensors"


def write_checkpoint(
    parent: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    training_state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write and commit `parent/<step>-<attempt>/`; an attempt number is never used twice.

    Raises:
        StorageError: the disk is full or denies writing.
    """
    attempts = [int(path.name.split("-")[1]) for path in _directories(parent, step)]
    directory = parent / f"{step:08d}-{max(attempts, default=-1) + 1}"
    save_tensors(directory / TENSORS, tensors)
    if training_state is not None:
        save_tensors(directory / TRAINING_STATE, training_state)
    write_json(directory / STATE, {"step": step, **state})
    write_commit(directory)
    return directory


def read_checkpoint(
    directory: Path, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a committed checkpoint.

    Raises:
        StorageError: not committed, or a file is not what was committed (named).
    """
    verify_commit(directory)
    return load_file(directory / TENSORS, device=device), read_json(directory / STATE)


def read_training_state(directory: Path) -> dict[str, Tensor]:
    """The tensors, beside the trained ones, that training goes on from; `read_checkpoint` checks.

    Raises:
        StorageError: the checkpoint was not kept to go on from.
    """
    if not (directory / TRAINING_STATE).is_file():
        raise StorageError(f"{directory} holds no {TRAINING_STATE}", "a checkpoint to go on from")
    return load_file(directory / TRAINING_STATE)


def others(parent: Path, checkpoint: Path | None, num_last: int = 0) -> list[Path]:
    """The checkpoints beside this one, which must be committed first, but for the newest ones."""
    assert checkpoint is None or (checkpoint / COMMIT).exists(), (
        "the checkpoint to keep is not committed"
    )
    directories = _directories(parent)
    kept = {checkpoint, *directories[max(0, len(directories) - num_last) :]}
    return [directory for directory in directories if directory not in kept]


def resumable(parent: Path) -> Path | None:
    """The newest checkpoint that training can go on from, and that is as it was committed."""
    for directory in reversed(_directories(parent)):
        if (directory / TRAINING_STATE).exists() and is_whole(directory):
            return directory
    return None


def is_whole(checkpoint: Path) -> bool:
    try:
        verify_commit(checkpoint)
    except StorageError:
        return False
    return True


def without_training_state(directory: Path) -> None:
    """Commit a checkpoint once more, as one of the weights alone."""
    commit = read_json(directory / COMMIT)
    write_json(directory / COMMIT, {n: fact for n, fact in commit.items() if n != TRAINING_STATE})


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, whole or absent. Tensors are stored row-major, whatever their layout."""
    stored = {
        name: tensor.detach().to("cpu").contiguous(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }

    def write(temporary: Path) -> None:
        try:
            save_file(stored, temporary)
        except SafetensorError as err:  # a full or denying disk, in safetensors' words
            raise OSError(str(err)) from err

    write_with(path, write)


def write_commit(directory: Path) -> None:
    """Vouch for every other file in `directory`."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != COMMIT)
    write_json(directory / COMMIT, {path.name: describe_file(path) for path in files})


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256, as a commit states them."""
    return {"num_bytes": path.stat().st_size, "sha256": sha256_file(path)}


def verify_commit(directory: Path) -> None:
    """Check every file against COMMIT.json.

    Raises:
        StorageError: there is no commit, or a file is missing or differs.
    """
    if not (directory / COMMIT).is_file():
        raise StorageError(f"{directory} holds no {COMMIT}", "a committed directory")
    for name, expected in read_json(directory / COMMIT).items():
        path = directory / name
        if Path(name).name != name or not path.is_file():
            raise StorageError(f"{path} is missing", f"the files of {directory / COMMIT}")
        if describe_file(path) != expected:
            raise StorageError(
                f"{path} differs from what was committed",
                f"sha256 {expected['sha256']}",
                "restore the file from a copy or run again",
            )


def _directories(parent: Path, step: int | None = None) -> list[Path]:
    pattern = re.compile(r"\d{8,}-\d+" if step is None else rf"{step:08d}-\d+")
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if pattern.fullmatch(path.name))
