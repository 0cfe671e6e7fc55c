"""torchvision's classification models without their classifiers.

All families but ViT are sequences of the model's own children from the stem up, then a pooling.
Tensors keep torchvision's names, so its checkpoints fit.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from tlrunner.config import Preprocess
from tlrunner.errors import ConfigError
from tlrunner.model.stages import Stages, stages_of
from tlrunner.model.weights import Weights, downloading, first_line, load_state, misfit, read_state

# -- Names, weights, preprocessing ---------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def names() -> list[str]:
    """Names of all classification models."""
    return list(models.list_models(module=models))


def preprocess(name: str, weights: Weights) -> Preprocess:
    """As the weights were evaluated; a file as if it were the model's default weights.

    Raises:
        ConfigError: no weights of that name.
    """
    if weights.kind == "none":
        return Preprocess(
            image_size=299 if name == "inception_v3" else 224,
            crop_fraction=0.875,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            interpolation="bilinear",
        )
    transform = _weights_set(name, weights).transforms()
    return Preprocess(
        image_size=transform.crop_size[0],
        crop_fraction=transform.crop_size[0] / transform.resize_size[0],
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
    )


def _weights_set(name: str, weights: Weights) -> Any:
    sets = models.get_model_weights(name)
    if weights.kind == "file" or weights.name == "default":
        return sets.DEFAULT
    if weights.name not in sets.__members__:
        raise ConfigError(
            f"backbone.weights is '{weights.name}', {name} has no such weights",
            ", ".join(["default", "none", *(found.name for found in sets), "or a file"]),
        )
    return sets[weights.name]


def published_name(name: str, weights: Weights) -> str:
    """Of named weights: the model and the set, as `resnet50.IMAGENET1K_V2`."""
    return f"{name}.{_weights_set(name, weights).name}"


def published_state(name: str, weights: Weights) -> tuple[str, dict[str, Tensor]]:
    """Where named weights are from, and their tensors, with those of their classifier.

    Raises:
        ConfigError: no weights of that name.
        StorageError: they cannot be fetched.
    """
    chosen = _weights_set(name, weights)
    with downloading(chosen.url):
        state = chosen.get_state_dict(progress=False, check_hash=True, weights_only=True)
    # The published DenseNets still have the names of torchvision 0.1.
    return chosen.url, {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key): value
        for key, value in state.items()
    }


# -- Backbones -----------------------------------------------------------------------------------


def build(
    name: str, weights: Weights, pooling: str | None, image_size: int
) -> tuple[nn.Module, Stages]:
    """A backbone with its weights: images (batch, 3, side, side) -> features.

    Args:
        pooling: `auto` and `avg`, `max` give (batch, channels), where `auto` is the class token for
            ViT; None gives the feature map or the tokens.

    Raises:
        ConfigError: an image size that the model cannot take, weights that do not fit.
        StorageError: weights that cannot be fetched or read.
    """
    model = _original(name, image_size)
    dropped = set(model.state_dict())
    backbone, stages = _vit(model, pooling) if name.startswith("vit_") else _cut(model, pooling)
    if weights.kind != "none":
        if weights.path:
            source, state = str(weights.path), read_state(weights.path, weights.sha256)
        else:
            source, state = published_state(name, weights)
        if name.startswith("vit_"):
            state = _resize_embeddings(state, image_size, model.patch_size, source)
        load_state(backbone, state, source, dropped - set(backbone.state_dict()))
    return backbone, stages


def _resize_embeddings(
    state: dict[str, Tensor], image_size: int, patch_size: int, source: str
) -> dict[str, Tensor]:
    """Interpolate a ViT's position embeddings where the images are of another size."""
    if "encoder.pos_embedding" not in state:
        return state  # which `load_state` will refuse
    try:
        return dict(interpolate_embeddings(image_size, patch_size, OrderedDict(state)))
    except ValueError as err:
        raise misfit(source, [first_line(err)]) from err


def _original(name: str, image_size: int) -> Any:
    sized: dict[str, Any] = {}
    if name.startswith("vit_"):
        sized["image_size"] = image_size
    if name == "maxvit_t":
        sized["input_size"] = (image_size, image_size)
    if name in ("googlenet", "inception_v3"):
        sized["init_weights"] = True  # it warns when the choice is left to it
    try:
        return models.get_model(name, weights=None, **sized)
    except (AssertionError, ValueError) as err:
        multiple = "multiples of 224" if name == "maxvit_t" else "multiples of the patch size"
        raise ConfigError(
            f"data.image_size is {image_size}, which {name} cannot take", multiple
        ) from err


CLASSIFIER_PARTS = {
    *("avgpool", "flatten", "dropout", "fc", "classifier", "head"),
    *("aux1", "aux2", "AuxLogits"),
}
CONTAINERS = {"features", "layers", "trunk_output", "blocks"}
FINAL_NORMS = {models.ConvNeXt: "classifier.0", models.MaxVit: "classifier.2"}


class ConvBackbone(nn.Module):
    """Children of a torchvision model in sequence, a pooling, and the norm some have after it."""

    def __init__(self, pooling: str | None) -> None:
        super().__init__()
        self.pooling = pooling
        self.paths: list[str] = []
        self.norm_path: str | None = None

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = images_BCHW
        for path in self.paths:
            x_BCHW = self.get_submodule(path)(x_BCHW)
        if self.pooling is None:
            features = x_BCHW.permute(0, 2, 3, 1) if self.norm_path else x_BCHW
        else:
            features = x_BCHW.amax((2, 3)) if self.pooling == "max" else x_BCHW.mean((2, 3))
        return self.get_submodule(self.norm_path)(features) if self.norm_path else features


class FromImagenetNorm(nn.Module):
    """ImageNet's normalisation -> pixels in [-1, 1], which the Inceptions were trained on."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        channels = zip(images_BCHW.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
        rescaled = [x_BHW * (std / 0.5) + (mean - 0.5) / 0.5 for x_BHW, mean, std in channels]
        return torch.stack(rescaled, dim=1)


def _cut(model: nn.Module, pooling: str | None) -> tuple[nn.Module, Stages]:
    """Everything of a convolutional model up to its classifier, grouped into stages."""
    backbone = ConvBackbone(pooling)
    if isinstance(model, models.GoogLeNet | models.Inception3):
        # Always, also for random weights: what a saved model computes must not depend on where
        # its first weights came from.
        backbone.add_module("from_imagenet_norm", FromImagenetNorm())
    for name, child in model.named_children():
        if name not in CLASSIFIER_PARTS:
            backbone.add_module(name, child)
    if isinstance(model, models.DenseNet):
        backbone.add_module("relu", nn.ReLU(inplace=True))  # a function in DenseNet.forward
    for name, child in backbone.named_children():
        inner = [f"{name}.{part}" for part, _ in child.named_children()]
        backbone.paths += inner if name in CONTAINERS else [name]
    stages = _grouped(backbone, type(model))
    if norm_path := FINAL_NORMS.get(type(model)):
        _keep_final_norm(backbone, model, norm_path)
        stages[list(stages)[-1]].append(norm_path)
    return backbone, stages_of(backbone, stages)


def _keep_final_norm(backbone: ConvBackbone, model: nn.Module, path: str) -> None:
    # ConvNeXt's LayerNorm2d takes (batch, channels, 1, 1); the plain one computes the same.
    found: Any = model.get_submodule(path)
    norm = nn.LayerNorm(found.normalized_shape, eps=found.eps)
    norm.weight, norm.bias = found.weight, found.bias
    parent, _, name = path.rpartition(".")
    backbone.add_module(parent, nn.Module())
    backbone.get_submodule(parent).add_module(name, norm)
    backbone.norm_path = path


# -- Stages: where a new one begins --------------------------------------------------------------

Begins = Callable[[str, nn.Module, nn.Module], bool]  # (path, module, module before it)


def _at(pattern: str) -> Begins:
    return lambda path, module, before: re.fullmatch(pattern, path) is not None


def _at_new_width(path: str, module: Any, before: Any) -> bool:
    """MobileNets list their blocks flat; those of one group have the same width."""
    return type(module) is not type(before) or module.out_channels != before.out_channels


STAGE_BEGINS: dict[type[nn.Module], Begins] = {
    models.AlexNet: lambda path, module, before: isinstance(module, nn.Conv2d),
    models.ConvNeXt: _at(r"features\.[1246]"),  # a downsampling belongs with what follows it
    models.DenseNet: _at(r"features\.denseblock\d"),
    models.EfficientNet: _at(r"features\.\d"),
    models.GoogLeNet: _at(r"inception\w+"),
    models.Inception3: _at(r"Mixed_\w+"),
    models.MaxVit: _at(r"blocks\.\d"),
    models.MNASNet: _at(r"layers\.(8|9|10|11|12|13|14)"),
    models.MobileNetV2: _at_new_width,
    models.MobileNetV3: _at_new_width,
    models.RegNet: _at(r"trunk_output\.\w+"),
    models.ResNet: _at(r"layer\d"),
    models.ShuffleNetV2: _at(r"stage\d|conv5"),
    models.SqueezeNet: lambda path, module, before: type(module).__name__ == "Fire",
    models.SwinTransformer: _at(r"features\.[1246]"),
    models.VGG: lambda path, module, before: isinstance(before, nn.MaxPool2d),
}


def _grouped(backbone: ConvBackbone, family: type[nn.Module]) -> dict[str, list[str]]:
    """Stage name -> paths. The first stage is the stem; the others have their first path's name."""
    begins = STAGE_BEGINS[family]
    stages: dict[str, list[str]] = {"stem": backbone.paths[:1]}
    for earlier, path in pairwise(backbone.paths):
        module, before = backbone.get_submodule(path), backbone.get_submodule(earlier)
        if begins(path, module, before):
            stages[path] = []
        stages[list(stages)[-1]].append(path)
    return stages


# -- ViT -----------------------------------------------------------------------------------------


class VitBackbone(nn.Module):
    """torchvision's ViT without its head (Dosovitskiy et al., 2021; https://arxiv.org/abs/2010.11929)."""

    def __init__(self, model: Any, pooling: str | None) -> None:
        super().__init__()
        self.pooling = pooling
        self.class_token = model.class_token
        self.conv_proj = model.conv_proj
        self.encoder = model.encoder

    def forward(self, images_BCHW: Tensor) -> Tensor:
        patches_BNC = self.conv_proj(images_BCHW).flatten(2).transpose(1, 2)
        class_B1C = self.class_token.expand(patches_BNC.shape[0], -1, -1)
        tokens_BNC: Tensor = self.encoder(torch.cat([class_B1C, patches_BNC], dim=1))
        if self.pooling is None:
            return tokens_BNC
        if self.pooling == "auto":
            return tokens_BNC[:, 0]
        patches_BNC = tokens_BNC[:, 1:]
        return patches_BNC.amax(1) if self.pooling == "max" else patches_BNC.mean(1)


def _vit(model: Any, pooling: str | None) -> tuple[nn.Module, Stages]:
    backbone = VitBackbone(model, pooling)
    stages = {"stem": ["class_token", "conv_proj", "encoder.pos_embedding"]}
    for layer, _ in model.encoder.layers.named_children():
        stages[f"encoder.layers.{layer}"] = [f"encoder.layers.{layer}"]
    stages[list(stages)[-1]].append("encoder.ln")
    return backbone, stages_of(backbone, stages)
