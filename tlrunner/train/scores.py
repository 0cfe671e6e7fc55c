"""Scores of a pretrained backbone on some of a search's images, without training it."""

import time
from dataclasses import dataclass

import numpy as np

from tlrunner.config import FreezeConfig, HeadConfig, TrialConfig
from tlrunner.data.world import World
from tlrunner.errors import DataError
from tlrunner.model.freeze import levels
from tlrunner.train.beside import Beside
from tlrunner.train.demand import sharing_key
from tlrunner.train.images import Images
from tlrunner.train.transferability import h_score, log_me, ridge_accuracy
from tlrunner.train.trial import build


@dataclass(frozen=True)
class Scores:
    """Higher is better; see `transferability`. `seconds`: from the start to the last score."""

    log_me: float
    h_score: float
    ridge_accuracy: float
    seconds: float


def score_backbone(config: TrialConfig, images: Images, beside: Beside, num_images: int) -> Scores:
    """Score the backbone of a trial, in one worker.

    Its pooled features are those that head-only trials of the search read; where there are such
    trials, they are read from what is kept for them, and what is computed here is kept.

    Args:
        beside: the trials of the search.
        num_images: most images of training, and of validation.

    Raises:
        DataError: a feature is not finite.
    """
    started = time.monotonic()
    is_pooled = config.head.pooling is not None
    alone = config.model_copy(
        update={
            "freeze": FreezeConfig(strategy="head"),
            "head": config.head if is_pooled else HeadConfig(),
            "resources": config.resources.model_copy(update={"workers_per_trial": 1}),
        }
    )
    demand = beside.demands.get(sharing_key(config), {}) if is_pooled else {}
    among = Beside([alone], {sharing_key(alone): demand}, beside.warm)
    loop, reuse, *_ = build(alone, images, World(), among)
    loop.classifier.eval()
    reuse.enter(levels(alone.freeze, len(loop.classifier.stages.names), 0))
    train_ND, labels_N = reuse.sample_train(num_images)
    val_MD, labels_M = reuse.sample_val(num_images)
    if not (np.isfinite(train_ND).all() and np.isfinite(val_MD).all()):
        raise DataError(
            f"features of {config.backbone.name} are not finite",
            "numbers",
            "choose other backbone.weights, or train.mixed_precision no or bf16",
        )
    num_classes = len(reuse.feed.dataset.class_names)
    return Scores(
        log_me(train_ND, labels_N, num_classes),
        h_score(train_ND, labels_N, num_classes),
        ridge_accuracy(train_ND, labels_N, val_MD, labels_M, num_classes),
        time.monotonic() - started,
    )
