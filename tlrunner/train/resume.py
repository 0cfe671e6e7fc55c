"""What one epoch hands to the next beside the weights, as tensors and plain numbers.

The order of images, their augmentation and the learning rate are functions of seed, epoch and step,
so nothing of them is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from tlrunner.errors import DataError, StorageError
from tlrunner.files import read_json
from tlrunner.train.checkpoint import COMMIT, STATE, read_checkpoint, read_training_state
from tlrunner.train.loop import Loop
from tlrunner.train.metrics import Begun
from tlrunner.train.place import Place

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from: `epoch` epochs are behind it, which took `seconds`."""

    trained: dict[str, Tensor]  # averaged, if the config averages
    training: dict[str, Tensor]
    numbers: Numbers

    @property
    def epoch(self) -> int:
        return int(self.numbers["epoch"])

    @property
    def begun(self) -> Begun:
        """Of the epoch that comes then."""
        begun = self.numbers.get("begun", {})
        return Begun(int(begun.get("num_batches", 0)), tuple(begun.get("totals", ())))

    @property
    def seconds(self) -> float:
        return float(self.numbers["seconds"])

    @property
    def step(self) -> int:
        return int(self.numbers["step"])

    def check_origin(self, origin: Mapping[str, str | None], backbone: str) -> None:
        """Check that what the trial has from elsewhere is what it was begun with.

        Raises:
            DataError: the images are others.
            StorageError: the pretrained weights are.
        """
        if self.numbers["data_sha256"] != origin["data_sha256"]:
            raise DataError(
                "the images changed since the trial was begun",
                f"those with SHA-256 {self.numbers['data_sha256']} of their manifest",
                "choose another --name",
            )
        if self.numbers["weights_sha256"] != origin["weights_sha256"]:
            raise StorageError(
                f"the weights of backbone {backbone} changed since the trial was begun (SHA-256 of "
                f"their tensors {origin['weights_sha256']})",
                str(self.numbers["weights_sha256"]),
                "restore the file they come from, or choose another --name",
            )


def read_resumable(checkpoint: Place) -> Resumed:
    """Read a checkpoint that holds a training state; from S3 through a directory of its own.

    Raises:
        StorageError: it is not whole, or cannot be fetched.
    """
    if checkpoint.uri is None:
        tensors, numbers = read_checkpoint(checkpoint.path)
        return Resumed(tensors, read_training_state(checkpoint.path), numbers)
    with TemporaryDirectory() as directory:
        copy = Place(Path(directory), checkpoint.uri)
        copy.fetch(last=COMMIT)
        return read_resumable(Place(copy.path))


def epoch_of(checkpoint: Place | None) -> int:
    """Epochs that are behind a checkpoint of this machine; 0 without one."""
    return int(read_json(checkpoint.path / STATE)["epoch"]) if checkpoint else 0


def training_state(loop: Loop) -> tuple[dict[str, Tensor], Numbers]:
    """Copies of the optimizer's moments, of the random state, and of the weights behind an average.

    Tensors are named `optimizer/<moment>/<parameter>`, `live/<tensor>` and `rng/<device>`.
    """
    assert loop.optimizer is not None, "no phase entered"
    state: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
    numbers: Numbers = {}
    if loop.accelerator.device.type == "cuda":
        state["rng/cuda"] = torch.cuda.get_rng_state(loop.accelerator.device)
    for name, parameter in loop.classifier.trainable_parameters().items():
        for moment, value in loop.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"optimizer/{moment}/{name}"] = value.detach().clone()
    if loop.ema:
        numbers["ema_steps"] = loop.ema.num_steps
        state |= {f"live/{name}": t.detach().clone() for name, t in loop.ema.live.items()}
    if loop.accelerator.scaler is not None:
        numbers["scaler"] = loop.accelerator.scaler.state_dict()
    return state, numbers


def load_training_state(loop: Loop, resumed: Resumed) -> None:
    """Put a loop, in the phase of the checkpoint's last epoch, where it stood at its end."""
    assert loop.optimizer is not None, "no phase entered"
    loop.classifier.load_trainable_state(resumed.trained)
    if loop.ema:
        loop.ema.num_steps = resumed.numbers.get("ema_steps", 0)
        loop.ema.average = {}
        loop.ema.follow(loop.classifier.trainable_state())
    live = _below(resumed.training, "live/")
    if live:
        loop.classifier.load_trainable_state(live)
    parameters = loop.classifier.trainable_parameters()
    for key, value in _below(resumed.training, "optimizer/").items():
        moment, _, name = key.partition("/")
        parameter = parameters[name]
        # Adam counts its steps on the CPU, unless it is fused.
        device = value.device if value.ndim == 0 else parameter.device
        loop.optimizer.state[parameter][moment] = value.to(device, copy=True)
    if loop.accelerator.scaler is not None and "scaler" in resumed.numbers:
        loop.accelerator.scaler.load_state_dict(resumed.numbers["scaler"])
    if loop.accelerator.is_main_process:  # the others go on from a seed of their own
        torch.set_rng_state(resumed.training["rng/cpu"])
        if loop.accelerator.device.type == "cuda" and "rng/cuda" in resumed.training:
            torch.cuda.set_rng_state(resumed.training["rng/cuda"], loop.accelerator.device)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
