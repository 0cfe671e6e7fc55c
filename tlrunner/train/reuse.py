"""What feeds a trial: images, or in phases with a frozen prefix what the prefix computed from them.

The prefix of a phase is the part of the backbone below its lowest stage that trains. Its outputs
for a view of all images are kept in the node's cache, under a name that says everything they depend
on; so they are computed once for all epochs that see the view, all trials and all workers.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, fx

from tlrunner.data.activations import CHUNK, ActivationFile
from tlrunner.data.loader import Batch, Share, Transform, labelled, rendered
from tlrunner.data.order import Rows
from tlrunner.data.threads import map_ahead
from tlrunner.errors import StorageError
from tlrunner.files import sha256_json, sha256_text
from tlrunner.model.freeze import Level
from tlrunner.model.split import Split, SplitError, between, fingerprint
from tlrunner.train.beside import Demand
from tlrunner.train.cut import Cut, Values, measure_cut, plan_cuts, probe_images
from tlrunner.train.demand import CutPlan, is_plain, num_frozen, view_at
from tlrunner.train.exchange import Exchange
from tlrunner.train.feed import Feed, in_reading_order, node_cache
from tlrunner.train.fill import Tier, fill
from tlrunner.train.loop import Loop
from tlrunner.train.warm import Warm

log = logging.getLogger("tlrunner")

MOST_CUTS, MOST_FILES = 256, 256  # kept in memory at a time, of a backbone and of a process
VERSIONS = [
    *(torch.__version__, torchvision.__version__, version("timm")),
    *(PIL.__version__, cv2.__version__, simplejpeg.__version__),
]


class Reuse:
    """Batches of a trial, of images or of values at the cut of the present phase.

    Attributes:
        notes: what a reader of the trial's figures should know.
        fill_seconds: spent so far on computing what is kept.
        saved_seconds: that the prefix would have taken for the images whose values were read.
        num_bytes: of the files in use.
    """

    def __init__(
        self, feed: Feed, loop: Loop, demand: Demand, files: Warm, of_backbone: Warm
    ) -> None:
        """`files` and `of_backbone` outlive the trial; the latter as long as its backbone."""
        self.feed, self.loop, self.demand = feed, loop, demand
        self.files, self.of_backbone = files, of_backbone
        self.notes: list[str] = []
        self.fill_seconds = self.saved_seconds = 0.0
        self.num_bytes = 0
        self.depth = 0  # stages whose values are read in this phase
        self.plans: dict[int, CutPlan] | None = None
        uri = feed.config.reuse.uri
        self.exchange = files.once("exchange", uri, lambda: Exchange(uri)) if uri else None

    # -- Deciding --------------------------------------------------------------------------------

    def enter(self, of_stages: Sequence[Level]) -> Split | None:
        """Begin a phase. Gives the split whose suffix reads what is kept, if anything is."""
        depth = num_frozen(of_stages)
        self.depth = depth if depth in self._plans(depth) else 0
        return self._cut(self.depth).split if self.depth else None

    def _plans(self, depth: int) -> dict[int, CutPlan]:
        """What is kept at which cut; decided once, when first there is a frozen stage."""
        reason = self._why_not()
        if depth == 0 or reason:
            return {}
        if self.plans is None:
            try:
                self.plans = self._decide()
            except SplitError as err:
                self.notes.append(f"nothing frozen is reused: {err}")
                self.plans = {}
        return self.plans

    def _why_not(self) -> str:
        if self.feed.config.reuse.mode == "off":
            return "reuse.mode is off"
        return "images are streamed" if self.feed.dataset.window is not None else ""

    def _decide(self) -> dict[int, CutPlan]:
        splits = self.feed.splits
        images = len(splits.train), len(splits.val)
        return plan_cuts(self.feed.config, self.demand, images, self._cut)

    def _cut(self, depth: int) -> Cut:
        key = depth, self.feed.config.train.mixed_precision
        return self.of_backbone.once("cut", key, lambda: self._measure(depth), MOST_CUTS)

    def _measure(self, depth: int) -> Cut:
        classifier, dtype = self.loop.classifier.eval(), self.feed.config.reuse.dtype
        return measure_cut(classifier, depth, self._example(), dtype, self._frozen)

    def _frozen(self, part: torch.nn.Module, values: Values) -> Values:
        with torch.no_grad(), self.loop.accelerator.autocast():
            computed: Values = part(*values)
        return computed

    # -- Reading ---------------------------------------------------------------------------------

    def train(self, epoch: int, feed: Feed | None = None, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch counted from 0, from one of them on.

        `feed`: another than the trial's, of the same views.
        """
        feed = feed or self.feed
        tier = self.train_tier(epoch)
        if tier is None:
            return feed.train(epoch, first_batch)
        return self._serve(tier, feed.splits.train, feed.train_shares(epoch)[first_batch:])

    def val(self) -> Iterator[Batch]:
        tier = self.val_tier()
        if tier is None:
            return self.feed.val()
        return self._serve(tier, self.feed.splits.val, self.feed.val_shares())

    def keeps_training(self, depth: int) -> bool:
        """Whether values of training images are kept at a cut."""
        plans = self._plans(depth)
        return depth in plans and plans[depth].train

    def features(self, images_BHWC: Tensor) -> Tensor:
        """What the whole backbone, frozen, computes from images."""
        with torch.no_grad(), self.loop.accelerator.autocast():
            features: Tensor = self.loop.classifier.backbone(self.loop.prepared(images_BHWC))
        return features

    def sample_train(self, most: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features of `most` random training images in the first view, (N, D), and their labels."""
        rows_N, transform = self.feed.splits.train, self.feed.train_transform
        return self._sample(self.train_tier(0, most), rows_N, transform, most)

    def sample_val(self, most: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Likewise of validation."""
        rows_N, transform = self.feed.splits.val, self.feed.eval_transform
        return self._sample(self.val_tier(most), rows_N, transform, most)

    def _sample(
        self, tier: Tier | None, rows_N: Rows, transform: Transform, most: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What the whole backbone makes of some images, read where it is kept."""
        # Rows of a split are in the order of a hash, and row groups are shuffled when written.
        rows_N = in_reading_order(self.feed.dataset, rows_N)[:most]
        starts = range(0, len(rows_N), CHUNK)
        if tier:
            parts = [tier.read(number)[0] for number in range(len(starts))]
        elif self.feed.dataset.window is not None:  # streamed: without augmentation
            batches = self.feed.plain(rows_N, CHUNK)
            parts = [self.features(batch.images_BHWC)[batch.mask_B] for batch in batches]
        else:
            groups = (rows_N[start : start + CHUNK] for start in starts)
            view = view_at(self.feed.config, 0)
            parts = [self.features(images) for images in self._rendered(groups, transform, view)]
        features_ND = torch.cat(parts)[: len(rows_N)].float().cpu().numpy()
        return features_ND, self.feed.dataset.labels_N[rows_N]

    def train_tier(self, epoch: int, most: int | None = None) -> Tier | None:
        """What is kept of an epoch's view; None if its batches are of images.

        All of it is there, or that of the first `most` images.
        """
        if not (self.depth and self.keeps_training(self.depth)):
            return None
        view = view_at(self.feed.config, epoch)
        transform = self.feed.train_transform
        look = transform.augment.model_dump(mode="json", exclude={"num_views", "mixup", "cutmix"})
        recipe = {"view": view, "seed": transform.seed, **look}
        recipe = {} if is_plain(transform.augment) else recipe
        kept = (depth for depth, plan in (self.plans or {}).items() if plan.train)
        depths = [depth for depth in kept if view in self.demand[depth].train]
        return self._filled(self.feed.splits.train, transform, view, recipe, depths, most)

    def val_tier(self, most: int | None = None) -> Tier | None:
        """Likewise for validation."""
        if not (self.depth and self._plans(self.depth)[self.depth].val):
            return None
        depths = [depth for depth, plan in (self.plans or {}).items() if plan.val]
        return self._filled(self.feed.splits.val, self.feed.eval_transform, 0, None, depths, most)

    def _filled(
        self,
        rows_N: Rows,
        transform: Transform,
        view: int,
        recipe: dict[str, Any] | None,
        depths: Sequence[int],
        most: int | None,
    ) -> Tier | None:
        """The file of a view at the present cut, filled through the cuts below it.

        `recipe`: what a training view depends on; None for validation. None is returned where the
        disk has no room.
        """
        started = time.monotonic()
        is_exact = all(self._cut(depth).layout.is_exact for depth in (*depths, self.depth))
        below = [depth for depth in sorted(depths) if depth < self.depth and is_exact]
        try:
            tiers = self._tiers([*below, self.depth], rows_N, recipe)
            num_chunks = -(-len(rows_N[:most]) // CHUNK)
            self._take(tiers, num_chunks)
            if not tiers[-1].has_first(num_chunks):
                self.loop.classifier.eval()
                watchdog = self.loop.watchdog
                with watchdog.watching():
                    fill(
                        tiers,
                        rows_N,
                        lambda groups: self._rendered(groups, transform, view),
                        num_chunks,
                        watchdog.beat,
                    )
            self._give(tiers)
        except StorageError as err:
            log.warning("nothing frozen is reused any more: %s", err)
            self.notes.append(f"nothing frozen is reused any more: {err}")
            self.depth = 0
            return None
        finally:
            self.fill_seconds += time.monotonic() - started
        return tiers[-1]

    def _take(self, tiers: Sequence[Tier], num_chunks: int) -> None:
        """What other nodes have computed: values of the last tier, or else of those below."""
        if self.exchange is None:
            return
        for tier in reversed(tiers):
            if not tier.has_first(num_chunks):
                self.exchange.take(tier.file, num_chunks)
            if tier.has_first(num_chunks):
                return

    def _give(self, tiers: Sequence[Tier]) -> None:
        """Give other nodes what is whole now."""
        if self.exchange is None:
            return
        for tier in tiers:
            if tier.has_first(tier.file.num_chunks):
                self.exchange.give(tier.file)
        if self.exchange.failure and self.exchange.failure not in self.notes:
            self.notes.append(self.exchange.failure)

    def _rendered(
        self, groups: Iterable[Rows], transform: Transform, view: int
    ) -> Iterator[Tensor]:
        return rendered(
            self.feed.dataset,
            groups,
            transform,
            view=view,
            largest=CHUNK,
            num_threads=self.feed.num_threads,
        )

    def _tiers(
        self, depths: Sequence[int], rows_N: Rows, recipe: dict[str, Any] | None
    ) -> list[Tier]:
        tiers: list[Tier] = []
        for below, depth in pairwise([0, *depths]):
            file = self._file(depth, rows_N, recipe)
            tiers.append(Tier(file, self._cut(depth).layout, self._step(below, depth)))
        return tiers

    def _step(self, below: int, depth: int) -> Callable[[Values], Values]:
        """Values at one cut -> values at another; at 0 are the images."""
        if below == 0:
            prefix = self._cut(depth).split.prefix
            return lambda images: self._frozen(prefix, (self.loop.prepared(images[0]),))
        ends = below, depth
        part = self.of_backbone.once("part", ends, lambda: self._between(*ends), MOST_CUTS)
        device = self.loop.accelerator.device
        return lambda values: self._frozen(part, tuple(value.to(device) for value in values))

    def _between(self, below: int, depth: int) -> fx.GraphModule:
        splits = self._cut(below).split, self._cut(depth).split
        return between(*splits, self._example()[:2])

    def _example(self) -> Tensor:
        return self.loop.prepared(probe_images(self.feed.preprocess.image_size))

    def _sha256(self, depth: int) -> str:
        """Of a prefix with its weights."""
        prefix = self._cut(depth).split.prefix
        return self.of_backbone.once("prefix", depth, lambda: fingerprint(prefix), MOST_CUTS)

    def _file(self, depth: int, rows_N: Rows, recipe: dict[str, Any] | None) -> ActivationFile:
        """The file of a cut, under the hash of everything that its content depends on.

        Raises:
            StorageError: the cache has no room for it.
        """
        config, dataset = self.feed.config, self.feed.dataset
        computed = [
            self.loop.accelerator.device.type,
            config.train.mixed_precision,
            config.train.channels_last,
            config.reuse.dtype,
        ]
        images = [
            dataset.manifest.sha256,
            sha256_text(str(rows_N.tolist())),
            dataset.decoded is not None,
            self.feed.preprocess.model_dump(),
            recipe,
        ]
        name = sha256_json([images, self._sha256(depth), computed, VERSIONS])
        cache, num_bytes = node_cache(config.data), self._cut(depth).layout.num_bytes

        def opened() -> ActivationFile:
            return ActivationFile(cache, name, len(rows_N), num_bytes)

        return self.files.once("file", name, opened, MOST_FILES)

    def _serve(self, tier: Tier, rows_N: Rows, shares: Sequence[Share]) -> Iterator[Batch]:
        """The batches of shares, of what is kept; read by a thread ahead of time."""
        entry_of = np.zeros(len(self.feed.dataset.labels_N), np.int64)
        entry_of[rows_N] = np.arange(len(rows_N))
        self.num_bytes = max(self.num_bytes, tier.file.num_bytes)
        self.saved_seconds += self._cut(self.depth).seconds * sum(len(s.rows_B) for s in shares)

        def read(share: Share) -> Batch:
            entries = np.zeros(
                (len(share.rows_B) + share.num_padding, tier.layout.num_bytes), np.uint8
            )
            np.take(tier.file.entries, entry_of[share.rows_B], 0, entries[: len(share.rows_B)])
            values = tier.layout.unpack(entries)
            if self.feed.pin_memory:
                values = tuple(value.pin_memory() for value in values)
            return labelled(self.feed.dataset, share, values)

        return map_ahead(read, shares, num_threads=1, ahead=3)
