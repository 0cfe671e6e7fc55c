"""Scores of features, against their definitions written out."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tlrunner.train.transferability import (
    PENALTIES,
    h_score,
    leave_one_out_error,
    log_me,
    ridge_accuracy,
    spectrum,
)

Array = NDArray[np.float64]
Score = Callable[[Array, NDArray[np.int64], int], float]
CLASSES = 3
SHAPES = st.sampled_from([(40, 6), (30, 30), (20, 70)])


def drawn(seed: int, shape: tuple[int, int], signal: float) -> tuple[Array, NDArray[np.int64]]:
    """Noise of unequal variances, with class means apart by `signal`."""
    generator = np.random.default_rng(seed)
    labels_N = generator.permutation(np.arange(shape[0]) % CLASSES)
    means_KD = generator.normal(size=(CLASSES, shape[1]))
    scales_D = generator.uniform(0.3, 2, shape[1])
    return signal * means_KD[labels_N] + generator.normal(size=shape) * scales_D, labels_N


def one_hot(labels_N: NDArray[np.int64]) -> Array:
    return np.eye(CLASSES)[labels_N]


@given(seed=st.integers(0, 10**6), shape=SHAPES, signal=st.sampled_from([0.0, 0.5, 3.0]))
def test_log_me_is_the_greatest_density_that_a_normal_model_gives_the_labels(
    seed: int, shape: tuple[int, int], signal: float
) -> None:
    x_ND, labels_N = drawn(seed, shape, signal)

    def log_density(target_N: Array, weights: float, noise: float) -> float:
        covariance_NN = weights * x_ND @ x_ND.T + noise * np.eye(len(x_ND))
        _, log_determinant = np.linalg.slogdet(2 * np.pi * covariance_NN)
        return float(-(log_determinant + target_N @ np.linalg.solve(covariance_NN, target_N)) / 2)

    densities = []
    for target_N in one_hot(labels_N).T:
        of_ratios = []
        for ratio in np.logspace(-6, 6, 200) * spectrum(x_ND).eigenvalues_R.mean():
            covariance_NN = x_ND @ x_ND.T / ratio + np.eye(len(x_ND))
            noise = target_N @ np.linalg.solve(covariance_NN, target_N) / len(x_ND)
            of_ratios.append(log_density(target_N, noise / ratio, noise))
            assert of_ratios[-1] >= log_density(target_N, 1.1 * noise / ratio, 1.1 * noise)
            assert of_ratios[-1] >= log_density(target_N, 0.9 * noise / ratio, 0.9 * noise)
        densities.append(max(of_ratios) / len(x_ND))
    assert log_me(x_ND, labels_N, CLASSES) == pytest.approx(np.mean(densities), abs=2e-3)


@given(seed=st.integers(0, 10**6), shape=SHAPES)
def test_h_score_is_a_trace_of_covariances_with_a_shrunk_inverse(
    seed: int, shape: tuple[int, int]
) -> None:
    x_ND, labels_N = drawn(seed, shape, 1.0)
    centred_ND = x_ND - x_ND.mean(axis=0)
    means_ND = np.array([centred_ND[labels_N == label].mean(axis=0) for label in labels_N])
    covariance_DD, between_DD = (v.T @ v / len(v) for v in (centred_ND, means_ND))
    # Ledoit and Wolf, 2004, equations 14 to 17: distances by the Frobenius norm.
    identity_DD = np.eye(shape[1]) * np.trace(covariance_DD) / shape[1]
    distance = np.sum((covariance_DD - identity_DD) ** 2)
    errors = [np.sum((np.outer(row, row) - covariance_DD) ** 2) for row in centred_ND]
    share = min(1.0, np.mean(errors) / len(x_ND) / distance)
    shrunk_DD = (1 - share) * covariance_DD + share * identity_DD
    expected = (1 - share) * np.trace(np.linalg.solve(shrunk_DD, between_DD))
    assert h_score(x_ND, labels_N, CLASSES) == pytest.approx(expected, rel=1e-6)


@given(seed=st.integers(0, 10**6), shape=SHAPES, penalty=st.floats(0.1, 100))
def test_the_error_on_images_left_out_is_that_of_leaving_each_out(
    seed: int, shape: tuple[int, int], penalty: float
) -> None:
    x_ND, labels_N = drawn(seed, shape, 1.0)
    x_ND -= x_ND.mean(axis=0)
    targets_NK = one_hot(labels_N) - one_hot(labels_N).mean(axis=0)
    errors = []
    for left_out in range(len(x_ND)):
        rows = np.arange(len(x_ND)) != left_out
        mean_D, mean_K = x_ND[rows].mean(axis=0), targets_NK[rows].mean(axis=0)
        a_ND, b_NK = x_ND[rows] - mean_D, targets_NK[rows] - mean_K
        weights_DK = np.linalg.solve(a_ND.T @ a_ND + penalty * np.eye(shape[1]), a_ND.T @ b_NK)
        predicted_K = (x_ND[left_out] - mean_D) @ weights_DK + mean_K
        errors.append((targets_NK[left_out] - predicted_K) ** 2)
    found = leave_one_out_error(spectrum(x_ND), targets_NK, penalty)
    assert found == pytest.approx(np.mean(errors), rel=1e-6)


@pytest.mark.parametrize("shape", [(200, 20), (60, 100)])
def test_the_probe_tells_classes_that_features_tell_and_guesses_else(
    shape: tuple[int, int],
) -> None:
    def accuracy(signal: float) -> float:
        x_ND, labels_N = drawn(0, shape, signal)
        half = shape[0] // 2
        return ridge_accuracy(x_ND[:half], labels_N[:half], x_ND[half:], labels_N[half:], CLASSES)

    assert accuracy(5.0) == 1.0
    assert accuracy(0.0) < 0.6


@pytest.mark.parametrize("score", [log_me, h_score])
def test_better_features_score_higher(score: Score) -> None:
    scores = [score(*drawn(0, (300, 30), signal), CLASSES) for signal in (0.0, 0.3, 1.0, 4.0)]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1]


@pytest.mark.parametrize("score", [log_me, h_score])
@pytest.mark.parametrize("shape", [(40, 6), (20, 70)])
def test_turned_and_scaled_features_score_the_same(score: Score, shape: tuple[int, int]) -> None:
    x_ND, labels_N = drawn(1, shape, 1.0)
    turn_DD, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(shape[1], shape[1])))
    turned = score(7.0 * x_ND @ turn_DD, labels_N, CLASSES)
    assert turned == pytest.approx(score(x_ND, labels_N, CLASSES), abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 4), (6, 1), (6, 4)])
def test_features_that_tell_nothing_at_all_have_scores(shape: tuple[int, int]) -> None:
    labels_N = np.arange(shape[0]) % CLASSES
    for x_ND in (np.zeros(shape, np.float32), np.ones(shape, np.float32)):
        assert h_score(x_ND, labels_N, CLASSES) == 0.0
        assert np.isfinite(log_me(x_ND, labels_N, CLASSES))
        assert 0 <= ridge_accuracy(x_ND, labels_N, x_ND, labels_N, CLASSES) <= 1


def test_the_penalties_are_wide_enough_to_have_their_best_within() -> None:
    x_ND, labels_N = drawn(3, (60, 40), 1.0)
    x_ND -= x_ND.mean(axis=0)
    targets_NK = one_hot(labels_N) - one_hot(labels_N).mean(axis=0)
    found = spectrum(x_ND)
    errors = [
        leave_one_out_error(found, targets_NK, penalty * found.eigenvalues_R.mean())
        for penalty in PENALTIES
    ]
    assert 0 < int(np.argmin(errors)) < len(PENALTIES) - 1
