"""Backbone + head, with the freeze levels in force. What the trainer trains.

Freezing is total: a frozen parameter has no gradient and is in no optimizer, and a frozen stage
stays in eval mode through every `train()`, so BatchNorm statistics, dropout and stochastic depth
stand still as well.
"""

import math
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BATCH_NORM

from tlrunner.config import BackboneConfig, HeadConfig, Preprocess
from tlrunner.errors import StorageError
from tlrunner.model.backbones import Backbone, BackboneInfo, build_backbone, describe
from tlrunner.model.freeze import Level
from tlrunner.model.heads import build_head
from tlrunner.model.split import Split
from tlrunner.model.stages import Stages, is_norm, module_spans, norm_parameters

__all__ = ["BackboneInfo", "Classifier", "build_classifier", "describe"]


class Classifier(nn.Module):
    """A backbone and a head: images (batch, 3, side, side) -> logits (batch, classes).

    All stages train until `set_levels` says otherwise.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, stages: Stages) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.stages = stages
        self.levels = (Level.TRAINED,) * len(stages.names)
        self.split: Split | None = None  # its parts are the backbone's own modules
        self._pinned: frozenset[str] = frozenset()  # backbone modules that stay in eval mode

    def forward(
        self, images_BCHW: Tensor | None = None, *, values: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """Logits of images, or of what the prefix of `split` computed from them."""
        if images_BCHW is None:
            assert self.split is not None, "values come from a cut"
            features = self.split.suffix(*values)
        else:
            features = self.backbone(images_BCHW)
        logits: Tensor = self.head(features)
        return logits

    def set_levels(self, levels: tuple[Level, ...]) -> None:
        """Freeze and unfreeze stages, one level for each, from the stem up."""
        assert len(levels) == len(self.stages.names), "one level for each stage"
        self.levels = levels
        norms = norm_parameters(self.backbone)
        for name, parameter in self.backbone.named_parameters():
            level = levels[self.stages.of_parameter[name]]
            parameter.requires_grad_(level > (Level.FROZEN if name in norms else Level.NORM))
            if not parameter.requires_grad:
                parameter.grad = None
        self._pinned = self._find_pinned()
        self.train(self.training)

    def _find_pinned(self) -> frozenset[str]:
        """A module that reaches into several stages is in train mode only if all of them are."""
        spans = module_spans(self.backbone, self.stages)
        modules = self.backbone.named_modules(remove_duplicate=False)
        return frozenset(
            name
            for name, module in modules
            if min(self.levels[stage] for stage in spans[name])
            < (Level.NORM if is_norm(module) else Level.TRAINED)
        )

    def train(self, mode: bool = True) -> "Classifier":
        """Train mode for what trains; frozen modules stay in eval mode."""
        super().train(mode)
        for name, module in self.backbone.named_modules(remove_duplicate=False):
            if name in self._pinned:
                module.training = False
        return self

    @property
    def num_moving_norms(self) -> int:
        """BatchNorm layers whose statistics follow the batches, at the present levels."""
        was_training = self.training
        self.train()
        moving = sum(isinstance(m, BATCH_NORM) and m.training for m in self.modules())
        self.train(was_training)
        return moving

    def synchronise_norms(self) -> None:
        """Have BatchNorm layers that train take their statistics over all workers; needs GPUs."""
        from timm.layers import convert_sync_batchnorm  # by several workers on GPUs alone

        self.backbone = convert_sync_batchnorm(self.backbone)
        self.set_levels(self.levels)

    def distance_from_head(self, name: str) -> int:
        """Stages between a parameter and the head: 0 in the head, 1 in the last stage."""
        part, _, inner = name.partition(".")
        if part == "head":
            return 0
        return len(self.stages.names) - self.stages.of_parameter[inner]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that train, the head's among them."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def trainable_state(self) -> dict[str, Tensor]:
        """All that training changes: trained parameters, statistics of the modules that train.

        The tensors are the model's own, not copies.
        """
        names = set(self.trainable_parameters())
        for name, _ in self.named_buffers():
            part, _, inner = name.partition(".")
            if part == "head" or inner.rpartition(".")[0] not in self._pinned:
                names.add(name)
        return {name: tensor for name, tensor in self.state_dict().items() if name in names}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Put back a `trainable_state` that was taken at the same levels.

        Raises:
            StorageError: it is of another model or of other levels.
        """
        own = {name: tensor.shape for name, tensor in self.trainable_state().items()}
        found = {name: tensor.shape for name, tensor in state.items()}
        if differing := sorted(
            name for name in own.keys() | found.keys() if own.get(name) != found.get(name)
        ):
            raise StorageError(
                f"a checkpoint does not fit the model: {', '.join(differing[:3])} differ "
                f"({len(differing)} tensors)",
                "a checkpoint of the same trial and versions",
                "start the run under another name",
            )
        self.load_state_dict(state, strict=False)


def build_classifier(
    backbone: BackboneConfig,
    head: HeadConfig,
    num_classes: int,
    image_size: int | None = None,
    weights_file: Path | None = None,
) -> tuple[Classifier, Preprocess]:
    """Build a classifier with pretrained backbone and fresh head, in train mode.

    The caller seeds torch's global generator, which alone initialises what is not loaded.

    Args:
        image_size: side of the images in pixels. None: as the weights were trained.
        weights_file: the local copy of `backbone.weights`, where that is a URI.

    Raises:
        ConfigError: an unknown name, weights that do not fit, an image size or pooling it has not.
        StorageError: weights that cannot be fetched or read.
    """
    built = build_backbone(backbone, head, image_size, weights_file)
    return with_head(built, head, num_classes), built.preprocess


def with_head(built: Backbone, head: HeadConfig, num_classes: int) -> Classifier:
    """A classifier of a backbone and a fresh head."""
    num_features = math.prod(built.feature_shape)
    return Classifier(built.module, build_head(head, num_features, num_classes), built.stages)
