"""Heads trained side by side have the weights and figures that each has alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlrunner.config import HeadConfig, OptimConfig, TrainConfig
from tlrunner.configfile import validate
from tlrunner.model.heads import build_head
from tlrunner.train.optim import build_optimizer, schedule_factor, set_learning_rate
from tlrunner.train.sweep import HeadSweep

CPU = torch.device("cpu")
NUM_STEPS, BATCH, CLASSES = 12, 6, 3

OPTIMS: dict[str, list[dict[str, Any]]] = {
    "adamw": [{"lr": 0.01}, {"lr": 0.1, "weight_decay": 0.3}, {"lr": 0.03, "max_grad_norm": 0.5}],
    "adam": [{"lr": 0.01}, {"lr": 0.1, "weight_decay": 0.3}, {"lr": 0.03, "warmup_epochs": 1}],
    "sgd": [{"lr": 0.1, "momentum": 0.0}, {"lr": 0.2, "momentum": 0.9}, {"lr": 0.3}],
}
TRAINS = [{"seed": 1}, {"seed": 2, "label_smoothing": 0.2}, {"seed": 3, "ema_decay": 0.8}]
HEADS = {
    "linear": ({"kind": "linear"}, (7,)),
    "mlp": ({"kind": "mlp", "hidden_sizes": (5, 4)}, (7,)),
    "flatten_mlp": ({"kind": "flatten_mlp", "hidden_sizes": (5,)}, (2, 3, 2)),
}


class Case:
    """Three members and what each of them sees."""

    def __init__(self, optimizer: str, head: str) -> None:
        settings, self.shape = HEADS[head]
        self.head = validate(HeadConfig, settings)
        self.optims = [
            validate(OptimConfig, {"optimizer": optimizer, **o}) for o in OPTIMS[optimizer]
        ]
        self.trains = [validate(TrainConfig, {"epochs": 2, **train}) for train in TRAINS]
        random = torch.Generator().manual_seed(0)
        self.features_SGB = torch.randn(NUM_STEPS, 3, BATCH, *self.shape, generator=random)
        self.labels_SGB = torch.randint(CLASSES, (NUM_STEPS, 3, BATCH), generator=random)

    def fresh(self, train: TrainConfig) -> nn.Module:
        torch.manual_seed(train.seed)
        return build_head(self.head, int(torch.tensor(self.shape).prod()), CLASSES)

    def sweep(self) -> HeadSweep:
        return HeadSweep([self.fresh(t) for t in self.trains], self.optims, self.trains, CPU)

    def moment(self, step: int) -> float:
        return (step + 0.5) / (NUM_STEPS / 2)

    def alone(self, place: int) -> tuple[dict[str, Tensor], list[float]]:
        """Weights and losses of a member that is trained by itself."""
        optim, train = self.optims[place], self.trains[place]
        head = self.fresh(train)
        named = list(head.named_parameters())
        groups = [
            {
                "params": [p],
                "peak_lr": optim.lr,
                "weight_decay": optim.weight_decay if p.ndim > 1 else 0.0,
            }
            for _, p in named
        ]
        optimizer, losses = build_optimizer(groups, optim), []
        average = {name: p.detach().clone() for name, p in named}
        for step in range(NUM_STEPS):
            set_learning_rate(optimizer, schedule_factor(optim, self.moment(step), train.epochs))
            logits = head(self.features_SGB[step, place])
            labels = self.labels_SGB[step, place]
            loss = F.cross_entropy(logits, labels, label_smoothing=train.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            if optim.max_grad_norm:
                nn.utils.clip_grad_norm_(head.parameters(), optim.max_grad_norm)
            optimizer.step()
            losses.append(BATCH * loss.item())
            decay = min(train.ema_decay or 0.0, (1 + step) / (10 + step))
            for name, p in named:
                average[name].lerp_(p.detach(), 1 - decay)
        return average, losses


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("optimizer", OPTIMS)
def test_each_head_ends_as_it_does_alone(optimizer: str, head: str) -> None:
    case = Case(optimizer, head)
    sweep = case.sweep()
    losses = [
        sweep.step(case.features_SGB[step], case.labels_SGB[step], case.moment(step), is_own=True)[
            0
        ]
        for step in range(NUM_STEPS)
    ]
    for place in range(3):
        weights, alone = case.alone(place)
        assert torch.stack(losses)[:, place].tolist() == pytest.approx(alone, abs=2e-5)
        for name, tensor in sweep.state(place).items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=1e-4)


def test_heads_that_see_the_same_images_are_given_them_once() -> None:
    case = Case("adamw", "mlp")
    shared, own = case.sweep(), case.sweep()
    for step in range(NUM_STEPS):
        features_BD, labels_GB = case.features_SGB[step, 0], case.labels_SGB[step]
        ours = shared.step(features_BD, labels_GB, case.moment(step), is_own=False)
        repeated_GBD = features_BD.repeat(3, 1, 1)
        theirs = own.step(repeated_GBD, labels_GB, case.moment(step), is_own=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_a_head_that_diverges_leaves_the_others_as_they_are() -> None:
    case = Case("sgd", "linear")
    sweep = case.sweep()
    for step in range(NUM_STEPS):
        features_GBD = case.features_SGB[step].clone()
        features_GBD[0] = torch.nan
        loss_G, _ = sweep.step(features_GBD, case.labels_SGB[step], case.moment(step), is_own=True)
        assert torch.isfinite(loss_G).tolist() == [False, True, True]
    for name, tensor in sweep.state(1).items():
        torch.testing.assert_close(tensor, case.alone(1)[0][name])


def test_an_evaluation_is_of_the_averaged_weights_without_smoothing() -> None:
    case = Case("adamw", "linear")
    sweep = case.sweep()
    for step in range(NUM_STEPS):
        sweep.step(case.features_SGB[step], case.labels_SGB[step], case.moment(step), is_own=True)
    features_BD, labels_B = case.features_SGB[0, 0], case.labels_SGB[0, 0]
    loss_G, correct_G = sweep.evaluate(features_BD, labels_B)
    for place in range(3):
        head = case.fresh(case.trains[place])
        head.load_state_dict(sweep.state(place))
        logits_BK = head(features_BD)
        torch.testing.assert_close(
            loss_G[place], F.cross_entropy(logits_BK, labels_B, reduction="sum")
        )
        assert correct_G[place] == (logits_BK.argmax(1) == labels_B).sum()
