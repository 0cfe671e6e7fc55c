"""Checkpoints: directories `<step>-<attempt>` that exist once their COMMIT.json does.

A checkpoint holds `trainable.safetensors` (what training changed; frozen weights come from the
pretrained backbone), `state.json` (where training stood) and, where a trial is to go on from it,
`state.safetensors` (the optimizer's moments and the like). COMMIT.json is written last, with the
size and SHA-256 of each file, so a reader can tell a whole checkpoint from a torn or rotten one.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tlrunner.configfile import shown
from tlrunner.errors import StorageError
from tlrunner.files import sha256_file, write_json, write_with
from tlrunner.stored import not_as_written, read_stored

COMMIT = "COMMIT.json"
TENSORS = "trainable.safetensors"
STATE = "state.json"
TRAINING_STATE = "state.safetensors"
NAME_PATTERN = r"^[0-9]{8,}-[0-9]+$"
TURN_ATTEMPTS = 100  # the attempts at a step that one turn has


@dataclass(frozen=True)
class Fact:
    """What a commit says of a file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Behind:
    """What `state.json` says of the epochs that are behind a checkpoint.

    `report`: the figures of the latest, if the checkpoint is from its end.
    """

    epoch: int = 0
    report: dict[str, Any] | None = None


def write_checkpoint(
    parent: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    training_state: Mapping[str, Tensor] | None = None,
    may_commit: Callable[[], object] = lambda: None,
    turn: int = 0,
) -> Path:
    """Write and commit `parent/<step>-<attempt>/`; an attempt number is never used twice.

    `may_commit`: called once all is written, and raises if it is not to be committed. `turn`: of
    the one who writes, whose numbers are no others', as what an earlier one wrote on another node
    may not be seen here.

    Raises:
        StorageError: the disk is full or denies writing.
    """
    attempts = [int(path.name.split("-")[1]) for path in _directories(parent, step)]
    attempt = max([turn * TURN_ATTEMPTS, *(attempt + 1 for attempt in attempts)])
    directory = parent / f"{step:08d}-{attempt}"
    save_tensors(directory / TENSORS, tensors)
    if training_state is not None:
        save_tensors(directory / TRAINING_STATE, training_state)
    write_json(directory / STATE, {"step": step, **state})
    may_commit()
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
    state = read_stored(dict[str, Any], directory / STATE)
    return load_tensors(directory / TENSORS, device), state


def read_training_state(directory: Path) -> dict[str, Tensor]:
    """The tensors, beside the trained ones, that training goes on from; `read_checkpoint` checks.

    Raises:
        StorageError: the checkpoint was not kept to go on from.
    """
    if not (directory / TRAINING_STATE).is_file():
        raise StorageError(f"{directory} holds no {TRAINING_STATE}", "a checkpoint to go on from")
    return load_tensors(directory / TRAINING_STATE)


def others(
    parent: Path, checkpoint: Path | None, num_newest: int = 0, also: Iterable[Path] = ()
) -> list[Path]:
    """All but this checkpoint, which must be committed first, the newest ones, and those also."""
    assert checkpoint is None or (checkpoint / COMMIT).exists(), (
        "the checkpoint to keep is not committed"
    )
    directories = _directories(parent)
    kept = {checkpoint, *also, *directories[max(0, len(directories) - num_newest) :]}
    return [directory for directory in directories if directory not in kept]


def resumable(parent: Path, num_told: int) -> Path | None:
    """The newest checkpoint that training can go on from, and that is as it was committed.

    `num_told`: epochs whose figures are kept; behind a checkpoint are no others, or they were lost.
    """
    for directory in reversed(_directories(parent)):
        is_kept = (directory / TRAINING_STATE).exists() and is_whole(directory)
        if is_kept and read_behind(directory).epoch <= num_told:
            return directory
    return None


def read_behind(checkpoint: Path) -> Behind:
    return read_stored(Behind, checkpoint / STATE)


def later(parent: Path, step: int) -> list[Path]:
    """The checkpoints behind a step, committed or not."""
    return [path for path in _directories(parent) if int(path.name.partition("-")[0]) > step]


def is_whole(checkpoint: Path) -> bool:
    try:
        verify_commit(checkpoint)
    except StorageError:
        return False
    return True


def without_training_state(directory: Path) -> None:
    """Commit a checkpoint once more, as one of the weights alone."""
    facts = committed(directory)
    facts.pop(TRAINING_STATE, None)
    _write_facts(directory, facts)


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        StorageError: absent, or no such file.
    """
    try:
        return load_file(path, device=device)
    except (OSError, SafetensorError) as err:
        raise not_as_written(path, str(err), "a safetensors file") from err


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
    _write_facts(directory, {path.name: describe_file(path) for path in files})


def describe_file(path: Path) -> Fact:
    return Fact(path.stat().st_size, sha256_file(path))


def committed(directory: Path) -> dict[str, Fact]:
    """What COMMIT.json says of each file of a directory, by its name.

    Raises:
        StorageError: there is no commit, or it speaks of files elsewhere.
    """
    commit = directory / COMMIT
    if not commit.is_file():
        raise StorageError(f"{directory} holds no {COMMIT}", "a committed directory")
    facts = read_stored(dict[str, Fact], commit)
    for name in facts:
        if Path(name).name != name or name == "..":
            raise not_as_written(commit, shown(name), "the name of a file beside it")
    return facts


def verify_commit(directory: Path) -> None:
    """Check every file against COMMIT.json.

    Raises:
        StorageError: there is no commit, or a file is missing or differs.
    """
    for name, expected in committed(directory).items():
        path = directory / name
        if not path.is_file():
            raise StorageError(f"{path} is missing", f"the files of {directory / COMMIT}")
        if describe_file(path) != expected:
            raise StorageError(
                f"{path} differs from what was committed",
                f"sha256 {expected.sha256}",
                "restore the file from a copy or run again",
            )


def _write_facts(directory: Path, facts: Mapping[str, Fact]) -> None:
    write_json(directory / COMMIT, {name: asdict(fact) for name, fact in facts.items()})


def _directories(parent: Path, step: int | None = None) -> list[Path]:
    pattern = re.compile(NAME_PATTERN if step is None else rf"{step:08d}-[0-9]+")
    if not parent.is_dir():
        return []
    paths = [path for path in parent.iterdir() if pattern.fullmatch(path.name)]
    return sorted(paths, key=lambda path: tuple(map(int, path.name.split("-"))))
