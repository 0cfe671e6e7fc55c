"""Which parameters move, and how fast: groups, the optimizer, the schedule.

Frozen parameters are in no group: they get no optimizer state, no decay and no part in clipping.
"""

import math
from typing import Any

import torch
from torch import nn

from tlrunner.config import OptimConfig
from tlrunner.model.classifier import Classifier


def parameter_groups(classifier: Classifier, optim: OptimConfig) -> list[dict[str, Any]]:
    """One group for each (stage, decayed or not) that trains, with its peak learning rate.

    The head has `lr`, and each stage below it `layer_decay` times the rate of the one above
    (Howard and Ruder, 2018; https://arxiv.org/abs/1801.06146). Vectors, that is biases and norm
    parameters, are not decayed.
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in classifier.trainable_parameters().items():
        key = classifier.distance_from_head(name), parameter.ndim > 1
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.lr * optim.layer_decay**distance,
            "peak_lr": optim.lr * optim.layer_decay**distance,
            "weight_decay": optim.weight_decay if decays else 0.0,
        }
        for (distance, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD over parameter groups."""
    if optim.optimizer == "sgd":
        assert optim.momentum is not None, "the config fills in momentum for sgd"
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    kind = torch.optim.AdamW if optim.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=optim.lr)


def carry_state(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Parameters that train in both phases keep their moments across the phase boundary."""
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]


def schedule_factor(optim: OptimConfig, epoch: float, num_epochs: int) -> float:
    """Learning rate as a share of its peak, at a moment counted in epochs from 0.

    Linear warm-up, then half a cosine to zero, steps, or constant.
    """
    if epoch < optim.warmup_epochs:
        return epoch / optim.warmup_epochs
    if optim.schedule == "cosine":
        progress = (epoch - optim.warmup_epochs) / (num_epochs - optim.warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if optim.schedule == "step":
        assert optim.step_epochs is not None and optim.step_gamma is not None
        return float(optim.step_gamma ** (epoch // optim.step_epochs))
    return 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate becomes `factor` of its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
