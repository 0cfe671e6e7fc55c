"""Values of frozen stages, read instead of computed again, change no result."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.data.activations import ActivationFile
from tlrunner.errors import StorageError
from tlrunner.train.beside import Beside, Uses
from tlrunner.train.demand import CutPlan, demands, plan_cut, sharing_key, within
from tlrunner.train.entries import layout_of
from tlrunner.train.images import Images
from tlrunner.train.reuse import Reuse
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import EpochReport, TrialDir

STRATEGIES: dict[str, dict[str, Any]] = {
    "head": {"strategy": "head"},
    "last_stages": {"strategy": "last_stages", "num_stages": 2},
    "lp_ft": {"strategy": "lp_ft", "head_epochs": 2},
    "gradual": {"strategy": "gradual", "epochs_per_stage": 1},
}
Values = dict[str, Any]


@pytest.fixture
def config(tiny_trial: TrialConfig, tmp_path: Path) -> TrialConfig:
    """A head-only trial of three epochs on pretrained weights, and an empty cache.

    Convolutions of few images round in another way than those of a chunk, and what trains from
    random weights multiplies such differences: neither would do.
    """
    return with_values(
        tiny_trial,
        {
            "data.cache_dir": str(tmp_path / "cache"),
            "backbone": {"name": "efficientnet_lite0"},
            "freeze": {"strategy": "head"},
            "train.epochs": 3,
            "train.batch_size": 16,
            "data.image_size": 64,
            "reuse.mode": "on",
        },
    )


@pytest.fixture
def run(colour_images: Images) -> Callable[..., list[EpochReport]]:
    def running(config: TrialConfig, **others: Any) -> list[EpochReport]:
        reports: list[EpochReport] = []
        run_trial(config, reports.append, images=colour_images, **others)
        return reports

    return running


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each group that was rendered to be kept."""
    counts: list[int] = []
    render = Reuse._rendered

    def counting(self: Reuse, *arguments: Any) -> Iterator[torch.Tensor]:
        for images_BHWC in render(self, *arguments):
            counts.append(len(images_BHWC))
            yield images_BHWC

    monkeypatch.setattr(Reuse, "_rendered", counting)
    return counts


def losses(reports: list[EpochReport]) -> list[tuple[float, float, float]]:
    return [(r.train_loss, r.val_loss, r.val_acc) for r in reports]


def close(ours: list[EpochReport], theirs: list[EpochReport], tolerance: float) -> bool:
    return bool(np.allclose(losses(ours), losses(theirs), rtol=0, atol=tolerance))


@pytest.mark.parametrize("num_views", [1, 3, None])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_trial_is_the_same_with_and_without(
    run: Callable[..., list[EpochReport]],
    config: TrialConfig,
    rendered: list[int],
    strategy: str,
    num_views: int | None,
) -> None:
    values = {"freeze": STRATEGIES[strategy], "augment.num_views": num_views}
    config = with_values(config, values)
    ours, theirs = run(config), run(with_values(config, {"reuse.mode": "off"}))
    assert close(ours, theirs, 1e-4)
    assert theirs[-1].saved_seconds == 0 < ours[-1].saved_seconds
    assert rendered


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_first_step_is_the_same_to_the_last_digits(
    run: Callable[..., list[EpochReport]], config: TrialConfig, strategy: str
) -> None:
    # In one batch, the loss of an epoch is that of a step.
    in_one = with_values(config, {"freeze": STRATEGIES[strategy], "train.batch_size": 27})
    ours, theirs = run(in_one), run(with_values(in_one, {"reuse.mode": "off"}))
    assert abs(ours[0].train_loss - theirs[0].train_loss) <= 1e-6


def test_an_optimizer_with_everything_on_is_the_same_too(
    run: Callable[..., list[EpochReport]], config: TrialConfig
) -> None:
    everything = {
        "freeze": STRATEGIES["gradual"],
        "head": {"kind": "mlp", "hidden_sizes": [8]},
        "head.dropout": 0.3,
        "train.ema_decay": 0.8,
        "train.gradient_accumulation_steps": 2,
        "optim.max_grad_norm": 1.0,
        "train.channels_last": False,
    }
    config = with_values(config, everything)
    assert close(run(config), run(with_values(config, {"reuse.mode": "off"})), 1e-4)


def test_a_view_is_computed_once_for_all_trials_of_a_search(
    run: Callable[..., list[EpochReport]], config: TrialConfig, rendered: list[int]
) -> None:
    trials = [with_values(config, {"optim.lr": lr, "head.dropout": 0.1}) for lr in (0.1, 0.01)]
    beside = Beside(trials, demands(trials))
    first = run(trials[0], beside=beside)
    assert sum(rendered) == 3 * 27 + 9, "three views of the training images, and validation"
    second = run(trials[1], beside=beside)
    again = run(trials[0])  # another process, as it were
    assert sum(rendered) == 3 * 27 + 9
    assert losses(again) == losses(first) != losses(second)


def test_fixed_views_are_the_same_for_all_seeds(
    run: Callable[..., list[EpochReport]], config: TrialConfig, rendered: list[int]
) -> None:
    config = with_values(config, {"augment.num_views": 2})
    run(config)
    run(with_values(config, {"train.seed": 5}))
    assert sum(rendered) == 2 * 27 + 9


def test_a_deeper_cut_is_computed_from_a_shallower_one(
    run: Callable[..., list[EpochReport]], config: TrialConfig, rendered: list[int]
) -> None:
    shallow = with_values(config, {"freeze": STRATEGIES["last_stages"]})
    trials = [shallow, config]
    beside = Beside(trials, demands(trials))
    run(shallow, beside=beside)
    count = sum(rendered)
    deep = run(config, beside=beside)
    assert sum(rendered) == count, "no image was rendered for the deeper cut"
    assert close(deep, run(with_values(config, {"reuse.mode": "off"})), 1e-6)


def test_a_deeper_cut_leaves_a_shallower_one_behind_that_others_will_read(
    run: Callable[..., list[EpochReport]], config: TrialConfig, rendered: list[int]
) -> None:
    shallow = with_values(config, {"freeze": STRATEGIES["last_stages"]})
    beside = Beside([config, shallow], demands([config, shallow]))
    run(config, beside=beside)
    count = sum(rendered)
    run(shallow, beside=beside)
    assert sum(rendered) == count


def test_mixed_images_are_never_kept_but_validation_is(
    run: Callable[..., list[EpochReport]], config: TrialConfig, rendered: list[int]
) -> None:
    config = with_values(config, {"augment.mixup": 0.5})
    ours = run(config)
    assert sum(rendered) == 9
    assert close(ours, run(with_values(config, {"reuse.mode": "off"})), 1e-4)


@pytest.mark.parametrize("failing", ["__init__", "commit"])
def test_a_full_disk_costs_the_reuse_and_not_the_trial(
    run: Callable[..., list[EpochReport]],
    config: TrialConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    def full(*_: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(ActivationFile, failing, full)
    ours = run(config, trial_dir=tmp_path / "trial")
    monkeypatch.undo()
    assert close(ours, run(with_values(config, {"reuse.mode": "off"})), 1e-4)
    (note,) = TrialDir(tmp_path / "trial").read().notes
    assert note == "nothing frozen is reused any more: the disk is full"


def test_a_trial_leaves_nothing_to_the_next_but_what_was_loaded(
    run: Callable[..., list[EpochReport]], config: TrialConfig
) -> None:
    full = with_values(config, {"freeze": {"strategy": "full"}})
    beside = Beside([full, config])
    run(full, beside=beside)
    assert losses(run(config, beside=beside)) == losses(run(config))


# -- Heads trained together ------------------------------------------------------------------------


def test_trials_that_are_trained_together_end_as_they_do_alone(
    run: Callable[..., list[EpochReport]], config: TrialConfig, tmp_path: Path
) -> None:
    changes: list[Values] = [
        {"optim.lr": 0.1},
        {"optim.lr": 0.01, "optim.weight_decay": 0.3, "optim.warmup_epochs": 1},
        {"train.label_smoothing": 0.2, "optim.max_grad_norm": 0.5, "optim.schedule": "constant"},
        {"train.ema_decay": 0.7, "train.gradient_accumulation_steps": 2},
    ]
    trials = [with_values(config, change) for change in changes]
    beside = Beside(trials, demands(trials))
    for number, trial in enumerate(trials):
        together, alone = tmp_path / f"together{number}", tmp_path / f"alone{number}"
        ours = run(trial, beside=beside, trial_dir=together)
        theirs = run(trial, trial_dir=alone)
        assert close(ours, theirs, 1e-4)
        best = [TrialDir(d).read().best for d in (together, alone)]
        assert best[0] and best[1]
        assert best[0].checkpoint == best[1].checkpoint


def test_seeds_of_fixed_views_are_trained_together(
    run: Callable[..., list[EpochReport]], config: TrialConfig
) -> None:
    config = with_values(config, {"augment.num_views": 2})
    trials = [with_values(config, {"train.seed": seed}) for seed in (3, 4)]
    assert sharing_key(trials[0]) == sharing_key(trials[1])
    beside = Beside(trials, demands(trials))
    for trial in trials:
        assert close(run(trial, beside=beside), run(trial), 1e-4)


def test_one_that_diverges_leaves_the_others_their_results(
    run: Callable[..., list[EpochReport]], config: TrialConfig, tmp_path: Path
) -> None:
    wild = {"optim.optimizer": "sgd", "optim.lr": 100.0, "head": {"kind": "mlp"}}
    wild |= {"optim.weight_decay": 10.0, "train.epochs": 12, "optim.schedule": "constant"}
    trials = [with_values(config, {**wild, "optim.lr": lr}) for lr in (100.0, 1e-3)]
    beside = Beside(trials, demands(trials))
    run(trials[0], beside=beside, trial_dir=tmp_path / "wild")
    assert TrialDir(tmp_path / "wild").read().state == "diverged"
    assert close(run(trials[1], beside=beside), run(trials[1]), 1e-4)


# -- Deciding --------------------------------------------------------------------------------------


def test_one_pass_over_each_view_does_not_pay_and_two_do() -> None:
    once, twice = Uses({0: 1, 1: 1}, 2), Uses({0: 2, 1: 2}, 4)
    assert not plan_cut("auto", once, (1000, 100), 5000, 0.01).train
    assert plan_cut("auto", once, (1000, 100), 5000, 0.01).val
    plan = plan_cut("auto", twice, (1000, 100), 5000, 0.01)
    assert plan.train
    assert plan.saved_seconds == pytest.approx((1000 * 4 + 100 * 4) * 0.01)
    assert plan.num_bytes == (1000 * 2 + 100) * 5000


def test_what_is_sooner_computed_than_read_is_not_kept() -> None:
    uses = Uses({0: 3}, 3)
    assert not plan_cut("auto", uses, (1000, 100), 10**7, 1e-3).train
    assert plan_cut("on", uses, (1000, 100), 10**7, 1e-3).train
    assert not plan_cut("off", uses, (1000, 100), 100, 1.0).train


def test_what_saves_most_for_its_bytes_gets_the_room() -> None:
    plans = {
        1: CutPlan(True, True, 100, 1.0, 11.0),
        2: CutPlan(True, True, 100, 1.0, 21.0),
        3: CutPlan(True, True, 50, 1.0, 3.0),
        4: CutPlan(False, False, 0, 0.0, 0.0),
    }
    assert within(plans, 150).keys() == {2, 3}


@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16", "fp16"])
def test_values_come_back_as_they_were_stored(dtype: str) -> None:
    maps = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    tokens, flags = torch.randn(4, 7, 3), torch.tensor([[True], [False], [True], [True]])
    values = (maps, tokens, flags)
    layout = layout_of(values, dtype)
    found = layout.unpack(layout.pack(values))
    assert layout.is_exact == (dtype in ("auto", "fp32"))
    for value, back in zip(values, found, strict=True):
        assert back.dtype == value.dtype
        assert back.stride() == value.stride()
        torch.testing.assert_close(
            back, value, atol=0 if layout.is_exact else 0.02, rtol=0 if layout.is_exact else 0.01
        )
