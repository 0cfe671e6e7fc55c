import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.config import AugmentConfig
from tlrunner.data.mix import mix_pairs, symmetric_beta
from tlrunner.data.order import sample_ids, uniforms


def mixed(number: int, seed: int = 0, **on: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat grey images of levels 0, 200, 0, 200, ... before, after, and their weights."""
    images = np.zeros((number, 20, 20, 3), np.uint8)
    images[1::2] = 200
    before = images.copy()
    ids = sample_ids(map(str, range(number)))
    weights = mix_pairs(images, ids, AugmentConfig(**on), seed=seed, view=0, stream=2)
    return before, images, weights


def test_without_mixing_nothing_changes() -> None:
    before, after, weights = mixed(6)
    assert (before == after).all()
    assert (weights == 1).all()


@pytest.mark.parametrize("on", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_weights_are_the_shares_of_pixels(on: dict[str, float]) -> None:
    before, after, weights = mixed(40, **on)
    partner = before[np.arange(40) ^ 1]
    expected = weights[:, None] * before.mean((1, 2)) + (1 - weights)[:, None] * partner.mean(
        (1, 2)
    )
    assert np.abs(after.mean((1, 2)) - expected).max() <= 0.5
    assert (weights[::2] == weights[1::2]).all()
    assert weights.std() > 0.1


def test_an_odd_last_image_stays_as_it_is() -> None:
    before, after, weights = mixed(5, mixup=1.0)
    assert (after[4] == before[4]).all()
    assert weights[4] == 1
    assert (after[:4] != before[:4]).any()


def test_with_both_kinds_each_pair_gets_one() -> None:
    _, after, _ = mixed(400, mixup=1.0, cutmix=1.0)
    was_cut = [len(np.unique(image)) == 2 for image in after[::2]]
    assert 0.3 < np.mean(was_cut) < 0.7


def test_mixing_follows_seed_and_first_sample_alone() -> None:
    whole, again, other = mixed(40, mixup=1.0), mixed(40, mixup=1.0), mixed(40, 1, mixup=1.0)
    assert (whole[1] == again[1]).all()
    assert (whole[1] != other[1]).any()
    assert (mixed(10, mixup=1.0)[2] == whole[2][:10]).all()


def test_shares_follow_the_beta_distribution() -> None:
    _, _, weights = mixed(4000, mixup=2.0)
    assert abs(weights.mean() - 0.5) < 0.02
    assert abs(weights.var() - 1 / 20) < 0.005  # Beta(2, 2)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 4.0])
def test_two_uniform_numbers_make_a_symmetric_beta(alpha: float) -> None:
    number = 20_000
    pairs = uniforms(sample_ids(map(str, range(number))), seed=0, view=0, stream=0, count=2)
    drawn = np.array([symmetric_beta(alpha, *pair) for pair in pairs.tolist()])
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert abs(drawn.mean() - 0.5) < 0.01
    assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    reference = np.sort(np.random.default_rng(0).beta(alpha, alpha, number))
    below = np.searchsorted(reference, np.sort(drawn), side="right") / number
    assert np.abs(below - np.arange(1, number + 1) / number).max() < 0.02  # Kolmogorov-Smirnov


@given(st.floats(1e-3, 1e3), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_a_symmetric_beta_stays_in_its_bounds(alpha: float, first: float, second: float) -> None:
    assert 0 <= symmetric_beta(alpha, first, second) <= 1
    assert 0 <= symmetric_beta(alpha, 0.0, 0.25) <= 1
