"""Head-only trials of a search trained together, each told and stored as its own trial.

The first trial of a kind that a process gets has all later ones of that kind trained beside it, one
epoch at a time; when their turn comes, their epochs are there. A trial that is stopped earlier just
does not ask for more.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tlrunner.config import TrialConfig
from tlrunner.configfile import config_hash
from tlrunner.data.loader import Batch
from tlrunner.files import sha256_json
from tlrunner.model.heads import build_head
from tlrunner.train.beside import Beside
from tlrunner.train.demand import sharing_key
from tlrunner.train.loop import DivergedError, Loop
from tlrunner.train.metrics import Metrics
from tlrunner.train.reuse import Reuse
from tlrunner.train.sweep import HeadSweep

MOST_MEMBERS = 64
MOST_BYTES = 1 << 28  # of the members' weights, moments and copies of some epochs
COPIES = 8


@dataclass(frozen=True)
class Epoch:
    """What one epoch of all members came to, each entry of a list a member's."""

    trained: list[Metrics]
    validated: list[Metrics]
    heads: list[dict[str, Tensor]]
    diverged_at: list[int]  # step of the epoch, from 1; 0 if all was well
    seconds: float  # of training


class Swept:
    """Trials that differ in numbers of the optimizer, in label smoothing or in the seed alone."""

    def __init__(self, members: Sequence[TrialConfig], loop: Loop) -> None:
        self.members = members
        self.heads = HeadSweep(
            [_fresh_head(config, loop.classifier.head) for config in members],
            [config.optim for config in members],
            [config.train for config in members],
            loop.accelerator.device,
        )
        self.seeds = sorted({config.train.seed for config in members})
        self.place_of_seed = [self.seeds.index(config.train.seed) for config in members]
        self.epochs: list[Epoch] = []

    def train_epoch(self, reuse: Reuse) -> None:
        """One more epoch of all members, and their validation."""
        epoch, started = len(self.epochs), time.monotonic()
        of_seed = (next(c for c in self.members if c.train.seed == seed) for seed in self.seeds)
        feeds = [replace(reuse.feed, config=config) for config in of_seed]
        num_steps, num_members = feeds[0].num_steps, len(self.members)
        device = reuse.loop.accelerator.device
        totals_2G = torch.zeros(2, num_members, dtype=torch.float64, device=device)
        losses, seen = [], 0
        of_feeds = zip(*(reuse.train(epoch, feed) for feed in feeds), strict=True)
        for step, batches in enumerate(reuse.loop.watchdog.over(of_feeds)):
            features, is_own = [_features(batch, reuse) for batch in batches], len(batches) > 1
            labels = [batch.labels_B.to(device) for batch in batches]
            loss_G, correct_G = self.heads.step(
                self._of_members(features) if is_own else features[0],
                self._of_members(labels),
                epoch + (step + 0.5) / num_steps,
                is_own=is_own,
            )
            totals_2G += torch.stack([correct_G, loss_G])
            losses.append(loss_G)
            seen += batches[0].num_global
        diverged_at = _first_nonfinite(torch.stack(losses))
        trained = _metrics(totals_2G, seen)
        seconds = time.monotonic() - started
        heads = [self.heads.state(place) for place in range(num_members)]
        self.epochs.append(Epoch(trained, self._validated(reuse), heads, diverged_at, seconds))

    def _of_members(self, of_seeds: list[Tensor]) -> Tensor:
        """What each member has of what each seed has."""
        return torch.stack([of_seeds[place] for place in self.place_of_seed])

    @torch.no_grad()
    def _validated(self, reuse: Reuse) -> list[Metrics]:
        device = reuse.loop.accelerator.device
        totals_2G = torch.zeros(2, len(self.members), dtype=torch.float64, device=device)
        seen = 0
        for batch in reuse.val():
            loss_G, correct_G = self.heads.evaluate(
                _features(batch, reuse), batch.labels_B.to(device)
            )
            totals_2G += torch.stack([correct_G, loss_G])
            seen += batch.num_global
        return _metrics(totals_2G, seen)


@dataclass(frozen=True)
class Member:
    """One of the trials that are trained together."""

    swept: Swept
    place: int

    def epoch(self, epoch: int, reuse: Reuse) -> tuple[Metrics, Metrics, float]:
        """Training and validation of an epoch, and the seconds of training.

        The trial's own loop then has the head; and the optimizer, too, if no later epoch was
        trained yet.

        Raises:
            DivergedError: a loss was not finite.
        """
        while len(self.swept.epochs) <= epoch:
            self.swept.train_epoch(reuse)
        found, place = self.swept.epochs[epoch], self.place
        if step := found.diverged_at[place]:
            raise DivergedError(epoch * reuse.feed.num_steps + step)
        is_newest = epoch + 1 == len(self.swept.epochs)
        whole = self.swept.heads.whole(place) if is_newest else None
        reuse.loop.adopt(found.heads[place], whole)
        return found.trained[place], found.validated[place], found.seconds


def sweep_of(config: TrialConfig, loop: Loop, reuse: Reuse, beside: Beside) -> Member | None:
    """The trial as one of those trained together; None if it is alone in its kind."""
    kind, name = _kind(config), config_hash(config)
    if not kind or not reuse.keeps_training(len(loop.classifier.stages.names)):
        return None
    known: dict[str, Member] = beside.warm.once("swept", kind, dict, most=4)
    if name not in known:
        likes = beside.warm.once("kinds", "all", lambda: _by_kind(beside.configs)).get(kind, {})
        if name not in likes:
            return None
        names = list(likes)[list(likes).index(name) :]
        most = max(1, min(MOST_MEMBERS, MOST_BYTES // _bytes(loop.classifier.head)))
        names = [other for other in names if other not in known][:most]
        if len(names) == 1:
            return None
        swept = Swept([likes[other] for other in names], loop)
        known.update({other: Member(swept, place) for place, other in enumerate(names)})
    return known[name]


def _by_kind(configs: Sequence[TrialConfig]) -> dict[str, dict[str, TrialConfig]]:
    kinds: dict[str, dict[str, TrialConfig]] = {}
    for config in configs:
        if kind := _kind(config):
            kinds.setdefault(kind, {})[config_hash(config)] = config
    return kinds


def _kind(config: TrialConfig) -> str:
    """Equal for trials that can be trained together; empty for those that cannot."""
    train, head = config.train, config.head
    is_fit = config.freeze.strategy == "head" and train.mixed_precision == "no"
    if not is_fit or head.dropout > 0 or config.resources.workers_per_trial > 1:
        return ""
    shape = [sharing_key(config), head.model_dump(), config.optim.optimizer]
    return sha256_json([*shape, train.epochs, train.batch_size])


def _fresh_head(config: TrialConfig, like: nn.Module) -> nn.Module:
    """The head that a trial begins with when it is alone."""
    linear = [module for module in like.modules() if isinstance(module, nn.Linear)]
    torch.manual_seed(config.train.seed)
    return build_head(config.head, linear[0].in_features, linear[-1].out_features)


def _bytes(head: nn.Module) -> int:
    return COPIES * sum(p.numel() * p.element_size() for p in head.parameters())


def _features(batch: Batch, reuse: Reuse) -> Tensor:
    if batch.values:
        return batch.values[0].to(reuse.loop.accelerator.device, non_blocking=True)
    return reuse.features(batch.images_BHWC)  # nothing could be kept


def _metrics(totals_2G: Tensor, seen: int) -> list[Metrics]:
    per_member = (totals_2G / seen).T.tolist()
    return [Metrics(acc, loss, seen) for acc, loss in per_member]


def _first_nonfinite(losses_SG: Tensor) -> list[int]:
    """The first step, from 1, at which each member's loss was not finite; 0 if none."""
    rows = torch.isfinite(losses_SG).T.tolist()
    return [0 if all(finite) else finite.index(False) + 1 for finite in rows]
