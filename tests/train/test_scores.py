"""A backbone's scores, from features that its search keeps or from images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.errors import DataError
from tlrunner.train import scores
from tlrunner.train.beside import Beside
from tlrunner.train.demand import demands
from tlrunner.train.images import Images
from tlrunner.train.reuse import Reuse
from tlrunner.train.scores import Scores, score_backbone
from tlrunner.train.trial import run_trial

Score = Callable[..., Scores]


@pytest.fixture
def config(tiny_trial: TrialConfig, tmp_path: Path) -> TrialConfig:
    return with_values(
        tiny_trial,
        {
            "data.cache_dir": str(tmp_path / "cache"),
            "backbone": {"name": "efficientnet_lite0"},
            "freeze.strategy": "head",
            "data.image_size": 64,
            "augment.num_views": 1,
            "reuse.mode": "on",
        },
    )


@pytest.fixture
def score(colour_images: Images) -> Score:
    def scoring(config: TrialConfig, trials: list[TrialConfig], num_images: int = 1000) -> Scores:
        return score_backbone(config, colour_images, Beside(trials, demands(trials)), num_images)

    return scoring


def figures(scores: Scores) -> tuple[float, float, float]:
    return scores.log_me, scores.h_score, scores.ridge_accuracy


def test_trials_read_what_their_backbone_was_scored_on(
    score: Score, config: TrialConfig, colour_images: Images, rendered: list[int]
) -> None:
    first = score(config, [config])
    assert sum(rendered) == 27 + 9
    again = score(config, [config])
    run_trial(config, lambda report: None, images=colour_images)
    assert sum(rendered) == 27 + 9
    assert figures(again) == figures(first)
    assert first.ridge_accuracy == 1.0, "a colour a class"


def test_as_much_is_computed_as_is_scored(
    score: Score, config: TrialConfig, monkeypatch: pytest.MonkeyPatch, rendered: list[int]
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(scores, "log_me", lambda x_ND, labels_N, num: seen.append(len(x_ND)) or 0.0)
    score(config, [config], num_images=12)
    assert seen == [12]
    assert sum(rendered) == 27 + 9, "in whole chunks, which trials can go on with"
    score(with_values(config, {"reuse.mode": "off"}), [config], num_images=12)
    assert seen == [12, 12]
    assert rendered[2:] == [12, 9], "no more than is scored, where nothing is kept"


@pytest.mark.parametrize("freeze", [{"strategy": "full"}, {"strategy": "head"}])
def test_a_backbone_scores_the_same_whether_or_not_anything_is_kept(
    score: Score, config: TrialConfig, freeze: dict[str, Any]
) -> None:
    trial = with_values(config, {"freeze": freeze})
    others = score(with_values(trial, {"reuse.mode": "off"}), [trial])
    assert figures(score(trial, [trial])) == pytest.approx(figures(others), abs=1e-4)


def test_several_workers_and_flat_heads_do_not_matter(score: Score, config: TrialConfig) -> None:
    plain = figures(score(config, [config]))
    for change in ({"resources.workers_per_trial": 2}, {"head": {"kind": "flatten_mlp"}}):
        other = with_values(config, change)
        assert figures(score(other, [other])) == pytest.approx(plain, abs=1e-4)


def test_nothing_is_kept_that_no_trial_reads(
    score: Score, config: TrialConfig, tmp_path: Path
) -> None:
    full = with_values(config, {"freeze": {"strategy": "full"}})
    score(full, [full])
    assert not list(tmp_path.rglob("*.activations"))
    score(config, [full, config])
    assert len(list(tmp_path.rglob("*.activations"))) == 2


def test_streamed_images_are_scored_as_an_evaluation_sees_them(
    score: Score, config: TrialConfig
) -> None:
    plain = with_values(config, {"augment": {"crop_scale": None, "horizontal_flip": 0}})
    streamed = with_values(config, {"data.streaming": "on", "data.decoded_cache": "off"})
    expected = figures(score(plain, [plain]))
    assert figures(score(streamed, [streamed])) == pytest.approx(expected, abs=1e-4)


def test_weights_that_give_no_numbers_are_refused(
    score: Score, config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = torch.full((4, 8), torch.nan)
    monkeypatch.setattr(Reuse, "features", lambda self, images: nothing[: len(images)])
    with pytest.raises(DataError, match="features of efficientnet_lite0 are not finite"):
        score(with_values(config, {"reuse.mode": "off"}), [config], num_images=4)
