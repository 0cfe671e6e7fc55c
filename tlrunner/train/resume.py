"""What one epoch hands to the next beside the weights, as tensors and plain numbers.

The order of images, their augmentation and the learning rate are functions of seed, epoch and step,
so nothing of them is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from tlrunner.errors import DataError, StorageError
from tlrunner.stored import FINITE, read_stored
from tlrunner.train.checkpoint import COMMIT, STATE, read_checkpoint, read_training_state
from tlrunner.train.loaded import check_weights
from tlrunner.train.loop import Loop
from tlrunner.train.metrics import NOT_BEGUN, Begun
from tlrunner.train.place import Place


@dataclass(frozen=True)
class Stood:
    """Where training stood: `state.json`, as far as it is gone on from."""

    __pydantic_config__ = FINITE

    step: Annotated[int, Field(ge=0)]  # optimizer steps that are behind
    epoch: Annotated[int, Field(ge=0)]  # likewise epochs
    seconds: Annotated[float, Field(ge=0)]  # which they took
    begun: Begun = NOT_BEGUN  # of the epoch that comes then
    ema_steps: Annotated[int, Field(ge=0)] = 0
    scaler: dict[str, int | float] | None = None
    data_sha256: str = ""  # of the manifest of the images
    weights_sha256: str | None = None  # of the tensors that were pretrained, if any were


NOT_STARTED = Stood(step=0, epoch=0, seconds=0.0)


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from."""

    trained: dict[str, Tensor]  # averaged, if the config averages
    training: dict[str, Tensor]
    stood: Stood

    def check_origin(self, origin: Mapping[str, str | None], backbone: str) -> None:
        """Check that what the trial has from elsewhere is what it was begun with.

        Raises:
            DataError: the images are others.
            StorageError: the pretrained weights are.
        """
        if self.stood.data_sha256 != origin["data_sha256"]:
            raise DataError(
                "the images changed since the trial was begun",
                f"those with SHA-256 {self.stood.data_sha256} of their manifest",
                "choose another --name",
            )
        check_weights(backbone, origin["weights_sha256"], self.stood.weights_sha256)


def read_resumable(checkpoint: Place) -> Resumed:
    """Read a checkpoint that holds a training state; from S3 through a directory of its own.

    Raises:
        StorageError: it is not whole, or cannot be fetched.
    """
    if checkpoint.uri is None:
        tensors, _ = read_checkpoint(checkpoint.path)
        stood = read_stored(Stood, checkpoint.path / STATE)
        return Resumed(tensors, read_training_state(checkpoint.path), stood)
    with TemporaryDirectory() as directory:
        copy = Place(Path(directory), checkpoint.uri)
        copy.fetch(last=COMMIT)
        return read_resumable(Place(copy.path))


def epoch_of(checkpoint: Place | None) -> int:
    """Epochs that are behind a checkpoint of this machine; 0 without one."""
    return read_stored(Stood, checkpoint.path / STATE).epoch if checkpoint else 0


def training_state(loop: Loop) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of the optimizer's moments, of the random state, and of the weights behind an average.

    Tensors are named `optimizer/<moment>/<parameter>`, `live/<tensor>` and `rng/<device>`.
    """
    assert loop.optimizer is not None, "no phase entered"
    state: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
    numbers: dict[str, Any] = {}
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
    """Put a loop, in the phase of the checkpoint's last epoch, where it stood at its end.

    Raises:
        StorageError: the checkpoint is of another model, optimizer or device.
    """
    assert loop.optimizer is not None, "no phase entered"
    _check_fits(loop, resumed)
    loop.classifier.load_trainable_state(resumed.trained)
    if loop.ema:
        loop.ema.num_steps = resumed.stood.ema_steps
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
    if loop.accelerator.scaler is not None and resumed.stood.scaler:
        loop.accelerator.scaler.load_state_dict(resumed.stood.scaler)
    if loop.accelerator.is_main_process:  # the others go on from a seed of their own
        torch.set_rng_state(resumed.training["rng/cpu"])
        if loop.accelerator.device.type == "cuda" and "rng/cuda" in resumed.training:
            torch.cuda.set_rng_state(resumed.training["rng/cuda"], loop.accelerator.device)


def _check_fits(loop: Loop, resumed: Resumed) -> None:
    """Check what `load_trainable_state` does not: all but the weights."""
    shapes = {name: p.shape for name, p in loop.classifier.trainable_parameters().items()}
    unfit = [
        f"optimizer/{key}"
        for key, value in _below(resumed.training, "optimizer/").items()
        if value.shape not in (torch.Size(), shapes.get(key.partition("/")[2]))
        or key.partition("/")[2] not in shapes
    ]
    devices = {"rng/cpu": torch.device("cpu")}
    if loop.accelerator.device.type == "cuda" and "rng/cuda" in resumed.training:
        devices["rng/cuda"] = loop.accelerator.device
    unfit += [
        name
        for name, device in devices.items()
        if not _is_random_state(resumed.training.get(name), device)
    ]
    scaler, former = loop.accelerator.scaler, resumed.stood.scaler
    if scaler is not None and former and former.keys() != scaler.state_dict().keys():
        unfit.append("scaler")
    if resumed.stood.epoch > loop.train.epochs:
        unfit.append(f"epoch {resumed.stood.epoch}")
    if unfit:
        raise StorageError(
            f"a checkpoint does not fit the trial: {', '.join(unfit[:3])} ({len(unfit)} in all)",
            "a checkpoint of the same trial and versions",
            "start the run under another name",
        )


def _is_random_state(state: Tensor | None, device: torch.device) -> bool:
    try:
        torch.Generator(device).set_state(state)  # type: ignore[arg-type]  # None is a TypeError
    except (RuntimeError, TypeError):
        return False
    return True


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
