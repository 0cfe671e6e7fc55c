"""How promising a pretrained backbone is, from its frozen features alone, before anything trains.

Three scores of features of N images, (N, D), and their labels, integers from 0 to `num_classes` - 1.
Each is higher for a more promising backbone. They rank backbones on the same images; scores of
different images do not compare. None draws anything at random.

- `log_me`: evidence for a linear model of the labels. Not bounded.
- `h_score`: how much of the features' variance lies between classes, summed over directions. From 0
  to the number of classes less 1.
- `ridge_accuracy`: what a linear probe gets right of other images. From 0 to 1.

Features may be of any float type and are computed with as float64. Those of any backbone will do:
N < D, N = 1 and features that do not vary, too. Classes without images change no score. Where
nothing can be told apart, as all images are of one class or no feature varies, `h_score` is 0 and
the probe predicts the most frequent class. All three come from one decomposition, of N x N or D x D,
whichever is smaller; in memory it takes N x min(N, D) beside the features.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tlrunner.errors import DataError

Array = NDArray[np.float64]
Features = NDArray[np.floating[Any]]
Labels = NDArray[np.integer[Any]]

LARGEST = float(np.finfo(np.float32).max)  # of a feature: its fourth power is a float64
FLOAT32_ROUNDING = 1e-6  # relative; a feature that varies by less is constant
LEAST_NOISE = 1e-4  # variance of labels' noise, as a share of their mean square
TOLERANCE, MOST_STEPS = 1e-10, 1000  # of the evidence's iteration; the first per image
PENALTIES = np.logspace(-4, 4, 17)  # of the probe, in mean eigenvalues


class Spectrum(NamedTuple):
    """Of x_ND = axes_NR sqrt(eigenvalues_R) V', with orthonormal axes and R the rank of x."""

    eigenvalues_R: Array  # of x x', not 0, ascending
    axes_NR: Array


def log_me(features_ND: Features, labels_N: Labels, num_classes: int) -> float:
    """Log of the maximum evidence of the labels, given features: per image, mean over classes.

    LogME (You et al., 2021; https://arxiv.org/abs/2102.11005): a class's one-hot labels are a linear
    function of the features plus noise, with a normal prior of the weights, and the evidence is
    maximised over both variances. It stays the same if features are rotated or scaled; they are not
    centred. The noise is at least `LEAST_NOISE`: otherwise the evidence is infinite for labels that
    fewer than N directions fit exactly, which happens if some images are there twice.

    Returns:
        The mean over classes that have images; 0 if that is only one.

    Raises:
        DataError: features that are not finite.
    """
    x_ND = _numbers(features_ND)
    targets_NK = _one_hot(labels_N, num_classes, len(x_ND))
    targets_NK = targets_NK[:, targets_NK.any(axis=0)]
    if targets_NK.shape[1] == 1:
        return 0.0
    eigenvalues_R, axes_NR = spectrum(x_ND)
    squares_RK = (axes_NR.T @ targets_NK) ** 2
    evidences = [
        _most_evidence(eigenvalues_R, squares_R, target_N @ target_N, len(x_ND))
        for squares_R, target_N in zip(squares_RK.T, targets_NK.T, strict=True)
    ]
    return float(np.mean(evidences))


def h_score(features_ND: Features, labels_N: Labels, num_classes: int) -> float:
    """Trace of the features' inverse covariance times that of their class means.

    H-score (Bao et al., 2019, "An information-theoretic approach to transferability in task transfer
    learning"), with covariances shrunk as Ibrahim et al. do (2021; https://arxiv.org/abs/2110.06893),
    so that it is stable where N is not much larger than D. It stays the same if features are
    shifted, rotated or scaled. Features whose covariance cannot be told from a multiple of the
    identity, such as whitened ones, are shrunk altogether and score 0.

    Raises:
        DataError: features that are not finite.
    """
    x_ND = _centred(_numbers(features_ND))
    targets_NK = _one_hot(labels_N, num_classes, len(x_ND))
    counts_K = np.maximum(targets_NK.sum(axis=0), 1.0)
    eigenvalues_R, axes_NR = spectrum(x_ND)
    if not len(eigenvalues_R):
        return 0.0
    shrinkage = _shrinkage(x_ND, eigenvalues_R)
    # Along right singular vectors, a class's mean is sqrt(eigenvalues) coordinates / count.
    coordinates_RK = axes_NR.T @ (targets_NK - targets_NK.mean(axis=0))
    between_R = eigenvalues_R * (coordinates_RK**2 / counts_K).sum(axis=1)
    mean_eigenvalue = eigenvalues_R.sum() / x_ND.shape[1]
    total_R = (1 - shrinkage) * eigenvalues_R + shrinkage * mean_eigenvalue
    return float((1 - shrinkage) * (between_R / total_R).sum())


def ridge_accuracy(
    train_ND: Features,
    train_labels: Labels,
    val_MD: Features,
    val_labels: Labels,
    num_classes: int,
) -> float:
    """Share of validation images that a linear probe, fitted to the training part, gets right.

    The probe is ridge regression on one-hot labels with an intercept that is not penalised, of
    features standardised by the training part. Its penalty is the one of `PENALTIES` with the least
    squared error on training images that are left out one at a time.

    Raises:
        DataError: features that are not finite.
    """
    train_ND, val_MD = _numbers(train_ND), _numbers(val_MD)
    assert train_ND.shape[1] == val_MD.shape[1], "training and validation have the same features"
    assert len(val_labels) == len(val_MD), "each image has a label"
    targets_NK = _one_hot(train_labels, num_classes, len(train_ND))
    x_ND = _centred(train_ND)
    spread_D = np.sqrt((x_ND**2).mean(axis=0))
    scale_D = np.where(spread_D > 0, spread_D, np.inf)  # what does not vary has no weight
    x_ND /= scale_D
    weights_DK = _probe(x_ND, targets_NK)
    scores_MK = (val_MD - train_ND.mean(axis=0)) / scale_D @ weights_DK + targets_NK.mean(axis=0)
    return float((scores_MK.argmax(axis=1) == val_labels).mean())


def spectrum(x_ND: Array) -> Spectrum:
    """Squared singular values and left singular vectors, by the smaller of x x' and x' x."""
    is_wide = x_ND.shape[0] <= x_ND.shape[1]
    eigenvalues, vectors = np.linalg.eigh(x_ND @ x_ND.T if is_wide else x_ND.T @ x_ND)
    rounding = eigenvalues[-1] * max(x_ND.shape) * np.finfo(np.float64).eps
    is_kept = eigenvalues > max(rounding, 0.0)
    eigenvalues_R, vectors = eigenvalues[is_kept], vectors[:, is_kept]
    axes_NR = vectors if is_wide else x_ND @ (vectors / np.sqrt(eigenvalues_R))
    return Spectrum(eigenvalues_R, axes_NR)


def leave_one_out_errors(
    x_spectrum: Spectrum, targets_NK: Array, penalties_P: Array
) -> list[float]:
    """Mean squared error of ridge regression on images left out one at a time, of each penalty.

    In closed form: the residuals of one fit to all images, over 1 - leverage (Allen, 1974, "The
    relationship between variable selection and data augmentation and a method for prediction").

    Args:
        x_spectrum: of centred features, not all of them 0. Each fit has an intercept of its own.
    """
    eigenvalues_R, axes_NR = x_spectrum
    centred_NK = targets_NK - targets_NK.mean(axis=0)
    coordinates_RK, squares_NR = axes_NR.T @ centred_NK, axes_NR**2
    errors = []
    for penalty in penalties_P:
        kept_R = eigenvalues_R / (eigenvalues_R + penalty)
        residuals_NK = centred_NK - axes_NR @ (kept_R[:, None] * coordinates_RK)
        leverages_N = 1 / len(axes_NR) + squares_NR @ kept_R
        errors.append(float(((residuals_NK / (1 - leverages_N)[:, None]) ** 2).mean()))
    return errors


def _probe(x_ND: Array, targets_NK: Array) -> Array:
    """Weights of the ridge regression with the best penalty; x is standardised."""
    x_spectrum = eigenvalues_R, axes_NR = spectrum(x_ND)
    if not len(eigenvalues_R):
        return np.zeros((x_ND.shape[1], targets_NK.shape[1]))
    penalties_P = PENALTIES * eigenvalues_R.mean()
    penalty = penalties_P[np.argmin(leave_one_out_errors(x_spectrum, targets_NK, penalties_P))]
    coordinates_RK = axes_NR.T @ (targets_NK - targets_NK.mean(axis=0))
    weights_DK: Array = x_ND.T @ (axes_NR @ (coordinates_RK / (eigenvalues_R + penalty)[:, None]))
    return weights_DK


def _most_evidence(
    eigenvalues_R: Array, squares_R: Array, target_square: float, num_images: int
) -> float:
    """Log evidence per image of one class's labels, maximised by fixed point iteration.

    Along the axes a step is a sum over R numbers, as in the fast version (You et al., 2022, "Ranking
    and tuning pre-trained models"); directions beyond the rank leave the evidence as it is. As in
    the paper, alpha and beta are the precisions of the weights and of the noise, and gamma is the
    effective number of weights.

    Args:
        squares_R: of the labels' coordinates along the axes.
        target_square: of the labels' norm, not 0.
    """
    if squares_R.sum() <= np.finfo(np.float64).eps * target_square:  # best without any weights
        return _evidence(np.inf, num_images / target_square, eigenvalues_R, target_square)
    unfitted = max(target_square - squares_R.sum(), 0.0)
    most_beta = num_images / (LEAST_NOISE * target_square)
    scaled_R = eigenvalues_R / eigenvalues_R.mean()
    ratio, evidence = 1.0, -np.inf  # of alpha to beta
    for _ in range(MOST_STEPS):
        ...
    return evidence
