"""Which stages train, and when: freeze strategy and epoch -> a level for each stage.

Pure functions of numbers, which `classifier.py` makes a model follow, and an audit that says what
became of them.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from torch import nn

from tlrunner.config import FreezeConfig
from tlrunner.errors import ConfigError
from tlrunner.model.stages import Stages, is_norm, module_spans

# -- Levels --------------------------------------------------------------------------------------


class Level(IntEnum):
    """How much of a stage trains. The head always trains."""

    FROZEN = 0
    """Nothing: no gradients, and its BatchNorm statistics and dropout stay as for inference."""
    NORM = 1
    """Norm layers alone: their parameters and their statistics."""
    TRAINED = 2
    """Everything."""


def levels(freeze: FreezeConfig, num_stages: int, epoch: int) -> tuple[Level, ...]:
    """The level of each stage, from the stem up, during an epoch counted from 0.

    `lp_ft` follows Kumar et al., 2022 (https://arxiv.org/abs/2202.10054), `gradual` Howard and
    Ruder, 2018 (https://arxiv.org/abs/1801.06146), `norm_and_head` Frankle et al., 2020
    (https://arxiv.org/abs/2003.00152), `first_stages` Lee et al., 2022
    (https://arxiv.org/abs/2210.11466).
    """
    if freeze.strategy == "norm_and_head":
        return (Level.NORM,) * num_stages
    first, last = _trained_range(freeze, num_stages, epoch)
    return tuple(
        Level.TRAINED if first <= stage < last else Level.FROZEN for stage in range(num_stages)
    )


def _trained_range(freeze: FreezeConfig, num_stages: int, epoch: int) -> tuple[int, int]:
    """First trained stage, and the one after the last."""
    if freeze.strategy in ("last_stages", "first_stages"):
        assert freeze.num_stages is not None, "the config fills in num_stages"
        if freeze.strategy == "last_stages":
            return max(0, num_stages - freeze.num_stages), num_stages
        return 0, freeze.num_stages
    if freeze.strategy == "full":
        return 0, num_stages
    if freeze.strategy == "lp_ft":
        assert freeze.head_epochs is not None, "the config fills in head_epochs"
        return 0, num_stages if epoch >= freeze.head_epochs else 0
    if freeze.strategy == "gradual":
        assert freeze.epochs_per_stage is not None, "the config fills in epochs_per_stage"
        return max(0, num_stages - epoch // freeze.epochs_per_stage), num_stages
    assert freeze.strategy == "head", f"no such strategy: {freeze.strategy}"
    return 0, 0


def phase_starts(freeze: FreezeConfig, num_stages: int, epochs: int) -> tuple[int, ...]:
    """Epochs that begin with other levels than the epoch before had; the first is always 0."""
    by_epoch = [levels(freeze, num_stages, epoch) for epoch in range(epochs)]
    changes = (epoch for epoch in range(1, epochs) if by_epoch[epoch] != by_epoch[epoch - 1])
    return (0, *changes)


def check(freeze: FreezeConfig, num_stages: int, backbone_name: str) -> None:
    """Check a strategy against the number of stages that a backbone has.

    Raises:
        ConfigError: it asks for more stages than there are.
    """
    if freeze.num_stages is not None and freeze.num_stages > num_stages:
        raise ConfigError(
            f"freeze.num_stages is {freeze.num_stages}, {backbone_name} has {num_stages} stages",
            f"1..{num_stages}",
            f"`tlrunner freeze {backbone_name} {freeze.strategy}` lists them",
        )


# -- Audit ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageAudit:
    """Counts for one stage, or the head.

    Pinned norm layers are in eval mode: they normalise by the statistics they were loaded with.
    """

    stage: str
    num_params: int
    num_trainable: int
    num_norm_layers: int
    num_pinned: int


class Staged(Protocol):
    """What the audit looks at; a `Classifier` is one."""

    backbone: nn.Module
    head: nn.Module
    stages: Stages


def audit(classifier: Staged) -> list[StageAudit]:
    """Counts for each stage from the stem up, then the head, as they are in the modules now.

    A classifier in eval mode has all of its norm layers pinned.
    """
    spans = module_spans(classifier.backbone, classifier.stages)
    of_parameter = classifier.stages.of_parameter
    rows = []
    for stage, name in enumerate(classifier.stages.names):
        named = classifier.backbone.named_parameters()
        parameters = [p for path, p in named if of_parameter[path] == stage]
        modules = classifier.backbone.named_modules()
        norms = [m for path, m in modules if is_norm(m) and spans[path] == (stage,)]
        rows.append(_row(name, parameters, norms))
    return [*rows, _row("head", list(classifier.head.parameters()), [])]


def _row(stage: str, parameters: list[nn.Parameter], norms: list[nn.Module]) -> StageAudit:
    return StageAudit(
        stage=stage,
        num_params=sum(p.numel() for p in parameters),
        num_trainable=sum(p.numel() for p in parameters if p.requires_grad),
        num_norm_layers=len(norms),
        num_pinned=sum(not norm.training for norm in norms),
    )
