"""Files of tensors that no tlrunner wrote, with commits that vouch for them: refused by name."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from crafted import Captured, Job, refused
from safetensors.torch import load_file, save_file

import tlrunner
from tlrunner.errors import StorageError
from tlrunner.train.checkpoint import load_tensors, write_commit

ONE: dict[str, Any] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def safetensors(header: Any, num_data: int = 4, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(num_data)


NO_TENSORS = {
    "nothing": b"",
    "a length alone": struct.pack("<Q", 8),
    "a pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "a header beyond the file": safetensors({"a": ONE}, length=10**6),
    "a header of 8 EiB": safetensors({"a": ONE}, length=2**63),
    "a header of all bits": safetensors({"a": ONE}, length=2**64 - 1),
    "a header that is no JSON": safetensors(b"these are no tensors"),
    "a header that is a list": safetensors([1, 2]),
    "a header in bytes": safetensors(b'{"\xff": 1}'),
    "a header nested deeply": safetensors(b'{"a":' + b"[" * 100_000),
    "tensors that overlap": safetensors({"a": ONE, "b": {**ONE, "data_offsets": [2, 6]}}, 6),
    "a tensor beyond the file": safetensors({"a": {**ONE, "data_offsets": [0, 4000]}}),
    "a hole": safetensors({"a": {**ONE, "data_offsets": [4, 8]}}, 8),
    "bytes of no tensor": safetensors({"a": ONE}, 400),
    "an unknown type": safetensors({"a": {**ONE, "dtype": "F99"}}),
    "a type that torch has not": safetensors(
        {"a": {"dtype": "F6_E2M3", "shape": [16], "data_offsets": [0, 12]}}, 12
    ),
    "a shape beyond all memory": safetensors({"a": {**ONE, "shape": [2**62, 2**62]}}),
    "a shape below zero": safetensors({"a": {**ONE, "shape": [-1]}}),
    "a shape of words": safetensors({"a": {**ONE, "shape": ["x"]}}),
}


@pytest.fixture
def checkpoint(broken_off: Path) -> Path:
    (path,) = broken_off.glob("trials/*/checkpoints/*")
    return path


@pytest.mark.parametrize("case", NO_TENSORS)
def test_no_memory_is_taken_for_what_are_no_tensors(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(NO_TENSORS[case])
    with pytest.raises(StorageError, match=r"x\.safetensors cannot be read"):
        load_tensors(path)


@pytest.mark.parametrize("name", ["trainable.safetensors", "state.safetensors"])
@pytest.mark.parametrize("case", ["a header of 8 EiB", "an unknown type", "tensors that overlap"])
def test_a_run_does_not_go_on_from_what_are_no_tensors(
    train_job: Job, checkpoint: Path, capsys: Captured, name: str, case: str
) -> None:
    (checkpoint / name).write_bytes(NO_TENSORS[case])
    write_commit(checkpoint)
    refused(train_job, capsys, str(checkpoint / name))


@pytest.mark.parametrize("name", ["trainable.safetensors", "state.safetensors"])
def test_a_run_does_not_go_on_from_tensors_of_another_model(
    train_job: Job, checkpoint: Path, capsys: Captured, name: str
) -> None:
    (checkpoint / name).write_bytes(safetensors({"a": ONE}))
    write_commit(checkpoint)
    refused(train_job, capsys, "does not fit")


def change(checkpoint: Path, **changes: Any) -> None:
    """Replace some tensors of the training state, by the first that begins so; None: leave out."""
    tensors = load_file(checkpoint / "state.safetensors")
    for key, value in changes.items():
        name = next((n for n in tensors if n.startswith(key)), key)
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, checkpoint / "state.safetensors")
    write_commit(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rng/cpu", None),
        ("rng/cpu", torch.zeros(8, dtype=torch.uint8)),
        ("rng/cpu", torch.zeros_like(torch.get_rng_state(), dtype=torch.float32)),
        ("rng/cpu", torch.zeros_like(torch.get_rng_state())),
        ("optimizer/exp_avg/", torch.zeros(3, 5, 7)),
        ("optimizer/exp_avg/no.such.parameter", torch.zeros(3)),
        ("optimizer/step/no.such.parameter", torch.tensor(1.0)),
        ("optimizer/", torch.zeros(3)),
        ("live/no.such.tensor", torch.zeros(3)),
    ],
)
def test_a_training_state_that_does_not_fit_is_refused(
    train_job: Job, checkpoint: Path, capsys: Captured, key: str, value: torch.Tensor | None
) -> None:
    change(checkpoint, **{key: value})
    refused(train_job, capsys, "does not fit")


@pytest.mark.parametrize("case", NO_TENSORS)
def test_a_model_of_no_tensors_is_refused(finished: Path, case: str) -> None:
    (finished / "best" / "model.safetensors").write_bytes(NO_TENSORS[case])
    write_commit(finished / "best")
    with pytest.raises(StorageError, match=r"model\.safetensors cannot be read"):
        tlrunner.load(finished / "best")


def test_a_model_of_other_tensors_is_refused(finished: Path) -> None:
    (finished / "best" / "model.safetensors").write_bytes(safetensors({"a": ONE}))
    write_commit(finished / "best")
    with pytest.raises(StorageError, match=r"model\.safetensors cannot be read: .*Missing key"):
        tlrunner.load(finished / "best")
