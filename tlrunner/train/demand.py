"""How often the trials of a search read what a frozen prefix computes, and whether keeping it pays.

Pure functions of configs and of what was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tlrunner.config import AugmentConfig, TrialConfig
from tlrunner.data.augment import view_of
from tlrunner.files import sha256_json
from tlrunner.model.classifier import describe
from tlrunner.model.freeze import Level, levels
from tlrunner.train.beside import Beside, Demand, Uses


def num_frozen(of_stages: Sequence[Level]) -> int:
    """Stages from the stem up that nothing trains in, before the first that something does."""
    return next((n for n, level in enumerate(of_stages) if level), len(of_stages))


def is_plain(augment: AugmentConfig) -> bool:
    """Whether every view of an image is what an evaluation sees."""
    off = AugmentConfig(crop_scale=None, horizontal_flip=0)
    free = {"num_views": augment.num_views}
    return augment == off.model_copy(update=free)


def is_mixed(augment: AugmentConfig) -> bool:
    """Whether what an image looks like depends on its neighbour in the batch."""
    return bool(augment.mixup or augment.cutmix)


def seed_of_views(config: TrialConfig) -> int:
    """Fixed views are the same for all seeds of a search; new ones in each epoch are not."""
    return config.train.seed if config.augment.num_views is None else 0


def view_at(config: TrialConfig, epoch: int) -> int:
    return 0 if is_plain(config.augment) else view_of(epoch, config.augment.num_views)


def sharing_key(config: TrialConfig) -> str:
    """Equal for trials whose frozen stages see the same images and compute the same numbers."""
    seed = None if is_plain(config.augment) else seed_of_views(config)
    sections = (config.data, config.backbone, config.augment, config.resources, config.reuse)
    numbers = [config.head.pooling, config.train.mixed_precision, config.train.channels_last, seed]
    if config.backbone.weights == "none":  # whose random weights are the seed's
        numbers.append(config.train.seed)
    return sha256_json([*(section.model_dump(mode="json") for section in sections), numbers])


def demands(configs: Sequence[TrialConfig]) -> dict[str, Demand]:
    """The demand of trials by their sharing key."""
    found: dict[str, dict[int, Uses]] = {}
    for config in configs:
        num_stages = len(describe(config.backbone, config.data.image_size).stage_names)
        uses = found.setdefault(sharing_key(config), {})
        for epoch in range(config.train.epochs):
            depth = num_frozen(levels(config.freeze, num_stages, epoch))
            if depth:
                train, val = uses.get(depth, Uses({}, 0))
                if not is_mixed(config.augment):
                    view = view_at(config, epoch)
                    train = {**train, view: train.get(view, 0) + 1}
                uses[depth] = Uses(train, val + 1)
    return dict(found)


def demand_of(beside: Beside, config: TrialConfig) -> Demand:
    """What trials like this one read; its own reading if it is not among those known."""
    key = sharing_key(config)
    known = beside.demands.get(key)
    return demands([config])[key] if known is None else known


# -- Whether it pays -----------------------------------------------------------------------------

# Bytes a second, with their CRC-32, into a file and out of it again; one core of 2020 or later does
# twice as well. What is misjudged by a factor of two hardly matters: prefixes that are worth
# keeping are ten times slower than reading, or more.
WRITE_BYTES_PER_SECOND, READ_BYTES_PER_SECOND = 500e6, 1500e6


@dataclass(frozen=True)
class CutPlan:
    """What keeping the values of a cut will take and save, over all trials of a search.

    Attributes:
        train, val: whether those of training and of validation images are kept.
        spent_seconds: of computing and writing them, and of reading them each time. What a kept
            cut below has computed is counted there.
        saved_seconds: of the prefix, wherever it need not be computed.
    """

    train: bool
    val: bool
    num_bytes: int
    spent_seconds: float
    saved_seconds: float


class Price(NamedTuple):
    """Of one image at a cut: seconds of the prefix, and bytes of its values."""

    seconds: float
    num_bytes: int


def plan_chain(
    mode: str,
    demand: Demand,
    prices: Mapping[int, Price],
    images: tuple[int, int],
    *,
    is_exact: bool,
) -> dict[int, CutPlan]:
    """Decide what to keep at which cut, for all cuts that are read at once.

    The values of a cut are computed from those of the next one below that is kept. So several cuts
    cost hardly more than the deepest of them, and one that is read once pays if others have to come
    through it anyway.

    Args:
        mode: `reuse.mode`.
        images: number of training and of validation images.
        is_exact: whether values are kept as they were computed; else none are computed from others.
    """
    reads = (
        {depth: uses.train for depth, uses in demand.items() if uses.train},
        {depth: {0: uses.val} for depth, uses in demand.items() if uses.val},
    )
    train, val = (_chain(mode, of_part, prices, is_exact) for of_part in reads)
    plans = {}
    for depth in sorted(train.keys() | val.keys()):
        kept = [
            (count, chain[depth])
            for count, chain in zip(images, (train, val), strict=True)
            if depth in chain
        ]
        plans[depth] = CutPlan(
            depth in train,
            depth in val,
            sum(count * one.num_views for count, one in kept) * prices[depth].num_bytes,
            sum(count * one.spent for count, one in kept),
            sum(count * one.saved for count, one in kept),
        )
    return plans


class _Kept(NamedTuple):
    """Of one image at a cut: how many views are kept, and the seconds that takes and saves."""

    num_views: int
    spent: float
    saved: float


def _chain(
    mode: str, reads: Mapping[int, Mapping[int, int]], prices: Mapping[int, Price], is_exact: bool
) -> dict[int, _Kept]:
    """The cuts to keep: those that save most together, or all of them with mode `on`.

    What a cut takes depends on the next one below alone, so the best chain that ends at a cut
    extends the best that ends at one below.

    Args:
        reads: depth -> view -> how often it is read.
    """

    def kept(depth: int, below: int) -> _Kept:
        price, of_views = prices[depth], reads[depth]
        filled_below = reads[below].keys() if below and is_exact else ()
        filling = sum(
            max(0.0, price.seconds - prices[below].seconds) if v in filled_below else price.seconds
            for v in of_views
        )
        num_views, num_reads = len(of_views), sum(of_views.values())
        io = price.num_bytes * (
            num_views / WRITE_BYTES_PER_SECOND + num_reads / READ_BYTES_PER_SECOND
        )
        return _Kept(num_views, filling + io, num_reads * price.seconds)

    def gain(chain: Mapping[int, _Kept]) -> float:
        return sum(one.saved - one.spent for one in chain.values())

    chains: list[dict[int, _Kept]] = [{}]
    if mode == "off":
        return {}
    for depth in sorted(reads):
        longer = [{**chain, depth: kept(depth, max(chain, default=0))} for chain in chains]
        chains = longer if mode == "on" else [*chains, max(longer, key=gain)]
    return max(chains, key=gain)


def within(plans: Mapping[int, CutPlan], room_bytes: int) -> dict[int, CutPlan]:
    """The plans that fit into a cache together: those first that save most for their bytes."""
    chosen: dict[int, CutPlan] = {}

    def worth(item: tuple[int, CutPlan]) -> float:
        return -(item[1].saved_seconds - item[1].spent_seconds) / max(1, item[1].num_bytes)

    for depth, plan in sorted(plans.items(), key=worth):
        if plan.num_bytes <= room_bytes:
            chosen[depth] = plan
            room_bytes -= plan.num_bytes
    return chosen
