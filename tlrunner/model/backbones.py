"""Backbones by name: a torchvision classification model, `timm/NAME`, or `efficientnet_lite0|1|2`.

A backbone is a module without classifier, images (batch, 3, side, side) -> features, with its
stages and the preprocessing its weights expect.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tlrunner.config import BackboneConfig, HeadConfig, Preprocess
from tlrunner.errors import ConfigError, nearest
from tlrunner.model import from_torchvision
from tlrunner.model.stages import Stages
from tlrunner.model.weights import LITE, NO_WEIGHTS, Weights, choose_weights, first_line


@dataclass(frozen=True)
class Backbone:
    """`feature_shape` is that of one image's features: (channels,) if pooled."""

    module: nn.Module
    stages: Stages
    preprocess: Preprocess
    feature_shape: tuple[int, ...]


@dataclass(frozen=True)
class BackboneInfo:
    """What can be said of a backbone without its weights."""

    name: str
    stage_names: tuple[str, ...]
    num_params: int
    preprocess: Preprocess


def backbone_names() -> list[str]:
    """Every name that `backbone.name` takes; timm's also with a tag, `timm/NAME.TAG`."""
    timm_names = [f"timm/{name}" for name in _from_timm().names()]
    return [*LITE, *from_torchvision.names(), *timm_names]


def _from_timm() -> ModuleType:
    """Imported only where a model is timm's: it takes a fifth of what a trial's process imports."""
    from tlrunner.model import from_timm

    return from_timm


def _library(name: str) -> tuple[ModuleType, str]:
    """The module that builds a backbone, and its name there."""
    if name in LITE:
        return _from_timm(), name
    if name in from_torchvision.names():
        return from_torchvision, name
    if name.startswith("timm/") and name[5:].partition(".")[0] in _from_timm().names():
        return _from_timm(), name[5:]
    known = backbone_names()
    bare = name.removeprefix("timm/").partition(".")[0]
    raise ConfigError(
        f"backbone.name is '{name}', there is no such backbone",
        "efficientnet_lite0..2, a torchvision model, or timm/NAME",
        f"timm/{bare} exists" if f"timm/{bare}" in known else nearest(name, known),
    )


def published_name(config: BackboneConfig) -> str | None:
    """What the weights of a config are called where they are published: model and set.

    None where nobody is asked for them: a file, none, or installed with tlrunner.

    Raises:
        ConfigError: an unknown name or weights.
    """
    weights = choose_weights(config)
    if weights.kind != "named" or config.name in LITE:
        return None
    library, inner = _library(config.name)
    name: str = library.published_name(inner, weights)
    return name


def published_state(config: BackboneConfig) -> tuple[str, dict[str, Tensor]]:
    """Where weights that have a `published_name` are from, and all of their tensors.

    Raises:
        StorageError: they cannot be fetched.
    """
    library, inner = _library(config.name)
    found: tuple[str, dict[str, Tensor]] = library.published_state(inner, choose_weights(config))
    return found


def _preprocess(name: str, weights: Weights, image_size: int | None) -> Preprocess:
    library, inner = _library(name)
    found: Preprocess = library.preprocess(inner, weights)
    return found.model_copy(update={"image_size": image_size}) if image_size else found


def build_backbone(
    config: BackboneConfig,
    head: HeadConfig,
    image_size: int | None = None,
    weights_file: Path | None = None,
) -> Backbone:
    """Build a backbone, load its weights and measure its features.

    Raises:
        ConfigError: an unknown name, weights that do not fit, an image size or pooling it has not.
        StorageError: weights that cannot be fetched or read.
    """
    weights = choose_weights(config, weights_file)
    preprocess = _preprocess(config.name, weights, image_size)
    library, inner = _library(config.name)
    pooling = None if head.kind == "flatten_mlp" else head.pooling
    module, stages = library.build(inner, weights, pooling, preprocess.image_size)
    feature_shape = _feature_shape(module, config.name, preprocess.image_size, torch.device("cpu"))
    if (pooling is None) == (len(feature_shape) == 1):  # some of timm's ignore what is asked
        asked = f"head.pooling '{pooling}'" if pooling else "head.kind 'flatten_mlp'"
        raise ConfigError(f"{config.name} cannot do {asked}", "head.pooling: auto")
    return Backbone(module, stages, preprocess, feature_shape)


def _feature_shape(
    module: nn.Module, name: str, image_size: int, device: torch.device
) -> tuple[int, ...]:
    """Shape of the features of one image. In eval mode, so no statistics or generators move."""
    module.eval()
    try:
        with torch.no_grad():
            features = module(torch.zeros(1, 3, image_size, image_size, device=device))
    except (RuntimeError, AssertionError, ValueError, IndexError) as err:
        raise ConfigError(
            f"data.image_size is {image_size}, which {name} cannot take: {first_line(err)}",
            "the size its weights were trained at",
            "leave data.image_size out",
        ) from err
    module.train()
    if not isinstance(features, Tensor):  # a few of timm's give a list of maps if not pooled
        raise ConfigError(f"{name} cannot do head.kind 'flatten_mlp'", "linear, mlp")
    return tuple(features.shape[1:])


# -- Without weights -----------------------------------------------------------------------------


class EmptyParameters(TorchFunctionMode):
    """Parameters are created without memory; what a constructor computes with stays real.

    The meta device alone would not do: RegNet and Swin read numbers back from tensors.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def describe(config: BackboneConfig, image_size: int | None = None) -> BackboneInfo:
    """What a backbone is, in about a tenth of a second: nothing is fetched, no memory filled.

    Raises:
        ConfigError: an unknown name or weights, an image size that it cannot take.
        StorageError: a local file of weights is not there.
    """
    is_remote = "://" in config.weights and not config.weights_uri
    weights = Weights("file") if is_remote else choose_weights(config)
    preprocess = _preprocess(config.name, weights, image_size)
    stage_names, num_params = _outline(config.name, preprocess.image_size)
    return BackboneInfo(config.name, stage_names, num_params, preprocess)


@lru_cache(maxsize=64)  # a search asks about the same few backbones for each of its trials
def _outline(name: str, image_size: int) -> tuple[tuple[str, ...], int]:
    library, inner = _library(name)
    try:
        with EmptyParameters():
            module, stages = library.build(inner, NO_WEIGHTS, "auto", image_size)
    except (RuntimeError, ConfigError):  # timm's hybrids run their stem to learn its shape
        module, stages = library.build(inner, NO_WEIGHTS, "auto", image_size)
    meta = torch.device("meta")
    _feature_shape(module.to(meta), name, image_size, meta)
    return stages.names, sum(parameter.numel() for parameter in module.parameters())
