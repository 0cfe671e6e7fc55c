"""Values of frozen stages, read instead of computed again, change no result."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from curves import close, losses
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.data.activations import ActivationFile
from tlrunner.errors import StorageError
from tlrunner.train.beside import Beside, Uses
from tlrunner.train.demand import CutPlan, Price, demands, plan_chain, within
from tlrunner.train.entries import layout_of
from tlrunner.train.trial_dir import EpochReport, TrialDir

STRATEGIES: dict[str, dict[str, Any]] = {
    "head": {"strategy": "head"},
    "last_stages": {"strategy": "last_stages", "num_stages": 2},
    "lp_ft": {"strategy": "lp_ft", "head_epochs": 2},
    "gradual": {"strategy": "gradual", "epochs_per_stage": 1},
}
TRAIN, VAL = 54, 18
Values = dict[str, Any]


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
    in_one = with_values(config, {"freeze": STRATEGIES[strategy], "train.batch_size": TRAIN})
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
    assert sum(rendered) == 3 * TRAIN + VAL, "three views of the training images, and validation"
    second = run(trials[1], beside=beside)
    again = run(trials[0])  # another process, as it were
    assert sum(rendered) == 3 * TRAIN + VAL
    assert losses(again) == losses(first) != losses(second)


def test_trials_of_another_precision_in_the_same_process_have_values_of_their_own(
    run: Callable[..., list[EpochReport]], config: TrialConfig
) -> None:
    trials = [with_values(config, {"train.mixed_precision": name}) for name in ("bf16", "no")]
    beside = Beside(trials, demands(trials))
    together = [run(trial, beside=beside) for trial in trials]
    alone = [run(with_values(trial, {"reuse.mode": "off"})) for trial in trials]
    assert close(together[0], alone[0], 0.05)
    assert close(together[1], alone[1], 1e-4)


def test_fixed_views_are_the_same_for_all_seeds(
    run: Callable[..., list[EpochReport]], config: TrialConfig, rendered: list[int]
) -> None:
    config = with_values(config, {"augment.num_views": 2})
    run(config)
    run(with_values(config, {"train.seed": 5}))
    assert sum(rendered) == 2 * TRAIN + VAL


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


def test_another_node_computes_nothing_again(
    run: Callable[..., list[EpochReport]],
    config: TrialConfig,
    rendered: list[int],
    tmp_path: Path,
) -> None:
    one, other = (
        with_values(
            config,
            {"data.cache_dir": str(tmp_path / node), "reuse.uri": str(tmp_path / "shared")},
        )
        for node in ("one", "other")
    )
    first = run(one)
    count = sum(rendered)
    assert losses(run(other)) == losses(first)
    assert sum(rendered) == count == 3 * TRAIN + VAL


def test_a_place_that_cannot_be_written_costs_the_others_and_not_the_trial(
    run: Callable[..., list[EpochReport]], config: TrialConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    nowhere = with_values(config, {"reuse.uri": str(tmp_path / "file" / "shared")})
    ours = run(nowhere, trial_dir=tmp_path / "trial")
    assert losses(ours) == losses(run(config))
    (note,) = TrialDir(tmp_path / "trial").read().notes
    assert note.startswith("nothing frozen is shared through reuse.uri ")


def test_mixed_images_are_never_kept_but_validation_is(
    run: Callable[..., list[EpochReport]], config: TrialConfig, rendered: list[int]
) -> None:
    config = with_values(config, {"augment.mixup": 0.5})
    ours = run(config)
    assert sum(rendered) == VAL
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


# -- Deciding --------------------------------------------------------------------------------------


IMAGES = (1000, 100)


def planned(demand: dict[int, Uses], prices: dict[int, Price], mode: str = "auto") -> Values:
    return plan_chain(mode, demand, prices, IMAGES, is_exact=True)


def test_one_pass_over_each_view_does_not_pay_and_two_do() -> None:
    once, twice = Uses({0: 1, 1: 1}, 2), Uses({0: 2, 1: 2}, 4)
    price = {5: Price(0.01, 5000)}
    assert (planned({5: once}, price)[5].train, planned({5: once}, price)[5].val) == (False, True)
    plan = planned({5: twice}, price)[5]
    assert plan.train
    assert plan.saved_seconds == pytest.approx((1000 * 4 + 100 * 4) * 0.01)
    assert plan.num_bytes == (1000 * 2 + 100) * 5000


def test_what_is_sooner_computed_than_read_is_not_kept() -> None:
    demand, price = {5: Uses({0: 3}, 0)}, {5: Price(1e-3, 10**7)}
    assert not planned(demand, price)
    assert planned(demand, price, "on")[5].train
    assert not planned(demand, {5: Price(1.0, 100)}, "off")


def test_a_cut_that_is_read_once_is_kept_where_a_deeper_one_comes_through_it() -> None:
    prices = {3: Price(0.010, 5000), 5: Price(0.012, 5000)}
    demand = {3: Uses({0: 1, 1: 1}, 0), 5: Uses({0: 1, 1: 1}, 0)}
    plans = planned(demand, prices)
    assert plans.keys() == {3, 5}
    filling = sum(plan.spent_seconds for plan in plans.values())
    assert filling == pytest.approx(2 * 1000 * 0.012, rel=0.01), "each view once"
    # Not where the deeper one is of other views, nor from values that were rounded.
    assert not planned({**demand, 5: Uses({2: 1, 3: 1}, 0)}, prices)
    assert not plan_chain("auto", demand, prices, IMAGES, is_exact=False)


@given(
    st.dictionaries(
        st.integers(1, 9),
        st.tuples(st.dictionaries(st.integers(0, 2), st.integers(1, 3)), st.integers(0, 3)),
        max_size=5,
    ),
    st.lists(st.tuples(st.floats(1e-5, 1e-2), st.integers(10, 10**7)), min_size=9, max_size=9),
)
def test_no_other_choice_of_cuts_saves_more(
    reads: dict[int, tuple[dict[int, int], int]], drawn: list[tuple[float, int]]
) -> None:
    seconds = np.cumsum([one for one, _ in drawn])
    prices = {n + 1: Price(float(seconds[n]), num_bytes) for n, (_, num_bytes) in enumerate(drawn)}
    demand = {depth: Uses(*uses) for depth, uses in reads.items()}

    def gain(plans: dict[int, CutPlan]) -> float:
        return sum(plan.saved_seconds - plan.spent_seconds for plan in plans.values())

    best = gain(planned(demand, prices))
    for count in range(len(demand) + 1):
        for depths in itertools.combinations(demand, count):
            few = {depth: demand[depth] for depth in depths}
            assert gain(planned(few, prices, "on")) <= best + 1e-9


def test_what_saves_most_for_its_bytes_gets_the_room() -> None:
    plans = {
        1: CutPlan(True, True, 100, 1.0, 11.0),
        2: CutPlan(True, True, 100, 1.0, 21.0),
        3: CutPlan(True, True, 50, 1.0, 3.0),
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
