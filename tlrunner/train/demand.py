"""How often the trials of a search read what a frozen prefix computes, and whether keeping it pays.

Pure functions of configs and of what was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    return beside.demands.get(key) or demands([config])[key]


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
        spent_seconds: of computing and writing them, and of reading them each time.
        saved_seconds: of the prefix, wherever it need not be computed.
    """

    train: bool
    val: bool
    num_bytes: int
    spent_seconds: float
    saved_seconds: float


def plan_cut(
    mode: str, uses: Uses, images: tuple[int, int], entry_bytes: int, prefix_seconds: float
) -> CutPlan:
    """Decide what to keep at a cut.

    Args:
        mode: `reuse.mode`.
        images: number of training and of validation images.
        entry_bytes: of one image's values.
        prefix_seconds: that the prefix takes for an image.
    """
    keeps: list[bool] = []
    num_bytes, spent, saved = 0, 0.0, 0.0
    parts = ((len(uses.train), sum(uses.train.values())), (min(1, uses.val), uses.val))
    for count, (views, reads) in zip(images, parts, strict=True):
        io = entry_bytes * (views / WRITE_BYTES_PER_SECOND + reads / READ_BYTES_PER_SECOND)
        gain = (reads - views) * prefix_seconds
        keeps.append(mode != "off" and views > 0 and (mode == "on" or gain > io))
        if keeps[-1]:
            num_bytes += views * count * entry_bytes
            spent += count * (io + views * prefix_seconds)
            saved += count * reads * prefix_seconds
    return CutPlan(keeps[0], keeps[1], num_bytes, spent, saved)


def within(plans: Mapping[int, CutPlan], room_bytes: int) -> dict[int, CutPlan]:
    """The plans that fit into a cache together: those first that save most for their bytes."""
    chosen: dict[int, CutPlan] = {}

    def worth(item: tuple[int, CutPlan]) -> float:
        return -(item[1].saved_seconds - item[1].spent_seconds) / max(1, item[1].num_bytes)

    for depth, plan in sorted(plans.items(), key=worth):
        if (plan.train or plan.val) and plan.num_bytes <= room_bytes:
            chosen[depth] = plan
            room_bytes -= plan.num_bytes
    return chosen
