"""Equal heads trained side by side as one computation, each as it would be alone.

Weights of G heads are stacked, and one product computes a layer of all of them. Losses are added
up, so that the gradient of a head's weights is that of its own loss. The optimizers are torch's
(`torch.optim.AdamW`, `Adam`, `SGD`), with numbers of each head's own. Fusing equal trials follows
HFTA (Wang et al., 2021; https://arxiv.org/abs/2102.02344).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlrunner.config import OptimConfig, TrainConfig
from tlrunner.train.optim import schedule_factor

BETAS, EPSILON = (0.9, 0.999), 1e-8  # as torch has them
CLIP_EPSILON = 1e-6


@dataclass(frozen=True)
class HeadState:
    """A head and its optimizer, as they would be if it were trained alone.

    Attributes:
        moments: name of a weight -> names and values of torch's optimizer.
        num_steps: that are behind.
    """

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    num_steps: int


class HeadSweep:
    """G heads of the same shapes, which have dropout nowhere.

    Args:
        heads: freshly initialised, as `build_head` makes them.
        optims, trains: each head's; they share the kind of optimizer.
    """

    def __init__(
        self,
        heads: Sequence[nn.Module],
        optims: Sequence[OptimConfig],
        trains: Sequence[TrainConfig],
        device: torch.device,
    ) -> None:
        assert len({optim.optimizer for optim in optims}) == 1, "one kind of optimizer"
        assert not any(m.p for m in heads[0].modules() if isinstance(m, nn.Dropout)), "no dropout"
        self.optims, self.trains, self.device = optims, trains, device
        self.weights: dict[str, Tensor] = {
            name: torch.stack([head.state_dict()[name] for head in heads])
            .to(device)
            .requires_grad_()
            for name in heads[0].state_dict()
        }
        self.is_flattened = any(isinstance(module, nn.Flatten) for module in heads[0].modules())
        self.num_steps = 0
        self.moments = [
            {name: torch.zeros_like(w) for name, w in self.weights.items()} for _ in range(2)
        ]
        self.weight_decay_G = self._numbers([optim.weight_decay for optim in optims])
        self.momentum_G = self._numbers([optim.momentum or 0.0 for optim in optims])
        self.smoothing_G = self._numbers([train.label_smoothing for train in trains])
        norms = [optim.max_grad_norm for optim in optims]
        self.max_norm_G = self._numbers([torch.inf if n is None else n for n in norms])
        self.is_clipped = any(norm is not None for norm in norms)
        decays = [train.ema_decay for train in trains]
        self.ema_G = self._numbers([decay or 0.0 for decay in decays])
        has_ema = any(decay is not None for decay in decays)
        self.average = {n: w.detach().clone() for n, w in self.weights.items()} if has_ema else None

    def step(
        self, features: Tensor, labels_GB: Tensor, moment: float, *, is_own: bool
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step of every head, at a moment counted in epochs from 0.

        Args:
            features: (G, B, ...) if each head has its own, else (B, ...).

        Returns:
            Each head's summed loss and number correct, (G,).
        """
        logits_GBK = self._logits(self.weights, features, is_own)
        loss_GB = self._losses(logits_GBK, labels_GB)
        (loss_GB.sum() / labels_GB.shape[1]).backward()  # type: ignore[no-untyped-call]
        factors = [
            optim.lr * schedule_factor(optim, moment, train.epochs)
            for optim, train in zip(self.optims, self.trains, strict=True)
        ]
        self._update(self._numbers(factors))
        correct_GB = logits_GBK.detach().argmax(2) == labels_GB
        return loss_GB.detach().sum(1), correct_GB.sum(1)

    @torch.no_grad()
    def evaluate(self, features: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross entropy without smoothing, and number correct, of each head, (G,)."""
        logits_GBK = self._logits(self.average or self.weights, features, is_own=False)
        labels_GB = labels_B.expand(len(logits_GBK), -1)
        loss_GB = F.cross_entropy(
            logits_GBK.flatten(0, 1), labels_GB.flatten(), reduction="none"
        ).view_as(labels_GB)
        return loss_GB.sum(1), (logits_GBK.argmax(2) == labels_GB).sum(1)

    def state(self, place: int) -> dict[str, Tensor]:
        """A copy of one head's state dict, averaged if its config averages."""
        weights = self.average or self.weights
        return {name: tensor[place].detach().clone() for name, tensor in weights.items()}

    def whole(self, place: int) -> HeadState:
        """A copy of all that one head goes on from."""
        names = {"sgd": ("momentum_buffer",)}.get(
            self.optims[0].optimizer, ("exp_avg", "exp_avg_sq")
        )
        has_moments = self.optims[0].optimizer != "sgd" or self.optims[place].momentum
        moments: dict[str, dict[str, Tensor]] = {}
        for weight in self.weights if has_moments else ():
            kept = zip(names, self.moments, strict=False)
            moments[weight] = {name: of[weight][place].clone() for name, of in kept}
            if len(names) > 1:
                moments[weight]["step"] = torch.tensor(float(self.num_steps))
        weights = {name: tensor[place].detach().clone() for name, tensor in self.weights.items()}
        return HeadState(weights, moments, self.num_steps)

    # -- Forward ---------------------------------------------------------------------------------

    def _logits(self, weights: dict[str, Tensor], features: Tensor, is_own: bool) -> Tensor:
        names = [name for name in weights if name.endswith(".weight")]
        hidden = features.flatten(2 if is_own else 1) if self.is_flattened else features
        for number, name in enumerate(names):
            weight, bias = weights[name], weights[name.replace(".weight", ".bias")]
            if number:
                hidden = hidden.relu()
            if number or is_own:
                hidden = torch.baddbmm(bias[:, None], hidden, weight.transpose(1, 2))
            else:  # all heads in one product
                rows = F.linear(hidden, weight.flatten(0, 1), bias.flatten())
                hidden = rows.view(len(rows), *bias.shape).transpose(0, 1)
        return hidden

    def _losses(self, logits_GBK: Tensor, labels_GB: Tensor) -> Tensor:
        log_GBK = logits_GBK.float().log_softmax(2)
        own_GB = -log_GBK.gather(2, labels_GB[..., None])[..., 0]
        smoothing_G1 = self.smoothing_G[:, None]
        return (1 - smoothing_G1) * own_GB - smoothing_G1 * log_GBK.mean(2)

    # -- Backward --------------------------------------------------------------------------------

    def _numbers(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def _update(self, lr_G: Tensor) -> None:
        self.num_steps += 1
        gradients: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            assert weight.grad is not None
            gradients[name], weight.grad = weight.grad, None
        if self.is_clipped:
            self._clip(gradients)
        for name, weight in self.weights.items():
            # Vectors of one head are not decayed.
            decay_G = self.weight_decay_G if weight.ndim > 2 else torch.zeros_like(lr_G)
            decay, lr, momentum = (_beside(n, weight) for n in (decay_G, lr_G, self.momentum_G))
            kind, gradient = self.optims[0].optimizer, gradients[name]
            first, second = (moment[name] for moment in self.moments)
            if kind == "adamw":
                weight.mul_(1 - lr * decay)
            else:
                gradient = gradient + decay * weight
            if kind == "sgd":
                first.mul_(momentum).add_(gradient)
                weight.sub_(lr * first)
            else:
                self._adam(weight, gradient, first, second, lr)
        if self.average is not None:
            warm = (self.num_steps) / (9 + self.num_steps)  # as in ema.py
            share_G = 1 - self.ema_G.clamp(max=warm)
            for name, weight in self.weights.items():
                self.average[name].lerp_(weight, _beside(share_G, weight))

    def _adam(
        self, weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, lr: Tensor
    ) -> None:
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        corrections = [1 - beta**self.num_steps for beta in BETAS]
        root = (second.sqrt() / corrections[1] ** 0.5).add_(EPSILON)
        weight.sub_(lr / corrections[0] * (first / root))

    def _clip(self, gradients: dict[str, Tensor]) -> None:
        squares = [gradient.flatten(1).square().sum(1) for gradient in gradients.values()]
        norm_G = torch.stack(squares).sum(0).sqrt()
        scale_G = (self.max_norm_G / (norm_G + CLIP_EPSILON)).clamp(max=1.0)
        for gradient in gradients.values():
            gradient.mul_(_beside(scale_G, gradient))


def _beside(numbers_G: Tensor, like: Tensor) -> Tensor:
    """One number for each head, shaped to go with its weights."""
    return numbers_G.view(-1, *(1 for _ in like.shape[1:]))
