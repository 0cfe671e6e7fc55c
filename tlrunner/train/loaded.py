"""A classifier as a trial begins with it: a pretrained backbone, loaded once a process, and a head.

Whatever is not pretrained depends on the seed alone, so it is the same whenever a config is loaded:
for its training, beside other trials, and for its export.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tlrunner.config import Preprocess, TrialConfig
from tlrunner.data.fetch import fetch
from tlrunner.errors import StorageError
from tlrunner.model.backbones import Backbone, build_backbone
from tlrunner.model.classifier import Classifier, with_head
from tlrunner.model.weights import fingerprint_state
from tlrunner.train.staged import local_copy
from tlrunner.train.warm import Warm
from tlrunner.uris import is_weights_file


@dataclass(frozen=True)
class Loaded:
    """A backbone that the trials of a process train one after another.

    Attributes:
        pristine: its tensors as they were loaded; none if it serves a single trial.
        weights_sha256: of those that were pretrained; None if none were, or it serves a single one.
        warm: what was found out about it, and holds as long as it is kept.
    """

    backbone: Backbone
    pristine: dict[str, Tensor]
    weights_sha256: str | None
    warm: Warm

    @torch.no_grad()
    def restore(self) -> None:
        """Forget what a trial before did to it."""
        self.backbone.module.requires_grad_(True).train()
        for name, tensor in self.backbone.module.state_dict().items():
            if name in self.pristine:
                tensor.copy_(self.pristine[name])


def load_classifier(
    config: TrialConfig, num_classes: int, weights_sha256: str | None = None
) -> tuple[Classifier, Preprocess]:
    """The backbone with its weights and a fresh head, in the memory layout of the config.

    Seeds torch's generator; dropout goes on from there.

    Args:
        weights_sha256: what the pretrained tensors must be, where that is known.

    Raises:
        StorageError: they are others.
    """
    loaded = _load(config, is_kept=False)
    if weights_sha256 is not None:
        found = fingerprint_state(loaded.backbone.module.state_dict())
        check_weights(config.backbone.name, found, weights_sha256)
    return new_classifier(config, loaded, num_classes), loaded.backbone.preprocess


def check_weights(backbone: str, found: str | None, expected: str | None) -> None:
    """Check that the pretrained tensors of a backbone are those that a trial was begun with.

    Raises:
        StorageError: they are not.
    """
    if found != expected:
        raise StorageError(
            f"the weights of backbone {backbone} changed since the trial was begun (SHA-256 of "
            f"their tensors {found})",
            str(expected),
            "restore the file they come from, or choose another --name",
        )


def load_backbone(config: TrialConfig, warm: Warm) -> Loaded:
    """The backbone of a config as it was pretrained, from an earlier trial if one had it."""
    head, train = config.head, config.train
    seed = train.seed if config.backbone.weights == "none" else None
    pooling = None if head.kind == "flatten_mlp" else head.pooling
    key = repr([config.backbone, pooling, config.data.image_size, train.channels_last, seed])
    loaded = warm.once("backbone", key, lambda: _load(config, is_kept=True))
    loaded.restore()
    return loaded


def new_classifier(config: TrialConfig, loaded: Loaded, num_classes: int) -> Classifier:
    """The backbone with a fresh head."""
    torch.manual_seed(config.train.seed)
    classifier = with_head(loaded.backbone, config.head, num_classes)
    if config.train.channels_last:
        classifier.to(memory_format=torch.channels_last)
    if config.train.compile:
        classifier.compile()
    return classifier


def _load(config: TrialConfig, *, is_kept: bool) -> Loaded:
    torch.manual_seed(config.train.seed)
    weights, sha256 = config.backbone.weights, config.backbone.weights_sha256
    if is_weights_file(weights):
        file: Path | None = fetch(weights, config.data.cache_dir, sha256)
    else:
        file = local_copy(config.backbone, config.data.cache_dir)
    backbone = build_backbone(config.backbone, config.head, config.data.image_size, file)
    state = backbone.module.state_dict() if is_kept else {}
    pristine = {name: tensor.clone() for name, tensor in state.items()}
    is_pretrained = is_kept and weights != "none"
    return Loaded(
        backbone, pristine, fingerprint_state(pristine) if is_pretrained else None, Warm()
    )
