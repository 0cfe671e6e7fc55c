import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tlrunner.train.ema import Ema


@given(st.floats(0.01, 0.999), st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=30))
def test_the_average_follows_its_recurrence_with_warm_up(
    decay: float, weights: list[float]
) -> None:
    live = torch.zeros(1)
    ema, expected = Ema(decay), 0.0
    ema.follow({"w": live})
    for step, weight in enumerate(weights):
        live.fill_(weight)
        ema.update()
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * weight
    assert ema.average["w"].item() == pytest.approx(expected, abs=1e-4)


def test_weights_that_stand_still_are_their_own_average() -> None:
    live = torch.randn(5)
    ema = Ema(0.9)
    ema.follow({"w": live})
    for _ in range(20):
        ema.update()
    assert torch.allclose(ema.average["w"], live)


def test_the_average_is_in_the_model_only_inside_the_block() -> None:
    layer = nn.Linear(2, 2)
    ema = Ema(0.9)
    ema.follow(dict(layer.state_dict()))
    with torch.no_grad():
        layer.weight.fill_(7)
    ema.update()
    average = ema.average["weight"].clone()
    with pytest.raises(KeyboardInterrupt), ema.swapped_in():
        assert torch.equal(layer.weight, average)
        raise KeyboardInterrupt
    assert torch.equal(layer.weight, torch.full((2, 2), 7.0))
    assert torch.equal(ema.average["weight"], average)
    assert torch.is_grad_enabled()


def test_counters_are_copied_not_averaged() -> None:
    norm = nn.BatchNorm1d(2)
    ema = Ema(0.99)
    ema.follow(dict(norm.state_dict()))
    norm.num_batches_tracked += 5
    ema.update()
    assert ema.average["num_batches_tracked"].item() == 5


def test_a_tensor_that_joins_later_begins_at_its_own_value_and_others_keep_their_average() -> None:
    first, second = torch.zeros(1), torch.full((1,), 3.0)
    ema = Ema(0.5)
    ema.follow({"first": first})
    first.fill_(1)
    ema.update()
    before = ema.average["first"].clone()
    ema.follow({"first": first, "second": second})
    assert torch.equal(ema.average["first"], before)
    assert torch.equal(ema.average["second"], second)
    assert 0 < before.item() < 1
