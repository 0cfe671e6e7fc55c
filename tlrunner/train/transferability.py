"""How promising a pretrained backbone is, from its frozen features alone, before anything trains.

Three scores of features of N images, (N, D) of any float type, and their labels, integers below
`num_classes`. Each is higher for a more promising backbone. They rank backbones on the same images;
scores of different images do not compare. None draws anything at random.

- `log_me`: evidence for a linear model of the labels. Not bounded.
- `h_score`: share of the features' variance that lies between classes, summed over directions.
  From 0 to the number of classes less 1.
- `ridge_accuracy`: what a linear probe gets right of other images. From 0 to 1.

Each comes from one decomposition, of N x N or D x D, whichever is smaller, and a fixed grid of
penalties; so any N and D will do.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Features = NDArray[np.floating[Any]]
Labels = NDArray[np.integer[Any]]

# In mean eigenvalues. Between two ratios the evidence of an image changes by less than 1e-4.
RATIOS = np.logspace(-6, 6, 1201)
PENALTIES = np.logspace(-4, 4, 17)


class Spectrum(NamedTuple):
    """Of x_ND = axes_NR sqrt(eigenvalues_R) V', with orthonormal axes and R the rank of x."""

    eigenvalues_R: Array  # of x x', ascending
    axes_NR: Array


def log_me(features_ND: Features, labels_N: Labels, num_classes: int) -> float:
    """Log of the maximum evidence of the labels, given features: per image, mean over classes.

    LogME (You et al., 2021; https://arxiv.org/abs/2102.11005): one-hot labels of a class are a
    linear function of the features plus noise, with a normal prior of the weights, and the evidence
    is maximised over both variances. Given their ratio, the best noise is known in closed form; the
    ratio is looked up on a grid, which unlike the paper's iteration cannot stop short. Features are
    not centred. Classes without images do not count.
    """
    targets_NK = _one_hot(labels_N, num_classes)
    targets_NK = targets_NK[:, targets_NK.any(axis=0)]
    eigenvalues_R, axes_NR = spectrum(features_ND.astype(np.float64))
    if not len(eigenvalues_R):
        eigenvalues_R, axes_NR = np.ones(1), np.zeros((len(targets_NK), 1))
    squares_RK = (axes_NR.T @ targets_NK) ** 2
    unfitted_K = (targets_NK.sum(axis=0) - squares_RK.sum(axis=0)).clip(min=0)
    ratios_P1 = RATIOS[:, None] * eigenvalues_R.mean()
    kept_PR = ratios_P1 / (ratios_P1 + eigenvalues_R)
    noise_PK = (kept_PR @ squares_RK + unfitted_K) / len(targets_NK)
    evidence_PK = np.log(kept_PR).sum(axis=1)[:, None] / len(targets_NK) - np.log(noise_PK)
    return float((evidence_PK.max(axis=0) - 1 - np.log(2 * np.pi)).mean() / 2)


def h_score(features_ND: Features, labels_N: Labels, num_classes: int) -> float:
    """Trace of the features' inverse covariance times the covariance of their class means.

    H-score (Bao et al., 2019, "An information-theoretic approach to transferability in task
    transfer learning"), with covariances shrunk as Ibrahim et al. do (2021;
    https://arxiv.org/abs/2110.06893). It stays the same if features are shifted, rotated or scaled.
    Where there are far fewer images than features, it tells little.
    """
    x_ND = _centred(features_ND.astype(np.float64))
    eigenvalues_R, axes_NR = spectrum(x_ND)
    if not len(eigenvalues_R):
        return 0.0
    targets_NK = _one_hot(labels_N, num_classes)
    counts_K = targets_NK.sum(axis=0).clip(min=1)
    between_R = eigenvalues_R * ((axes_NR.T @ targets_NK) ** 2 / counts_K).sum(axis=1)
    shrinkage = _shrinkage(x_ND, eigenvalues_R)
    mean = eigenvalues_R.sum() / x_ND.shape[1]
    total_R = (1 - shrinkage) * eigenvalues_R + shrinkage * mean
    return float((1 - shrinkage) * (between_R / total_R).sum())


def ridge_accuracy(
    train_ND: Features,
    train_labels: Labels,
    val_MD: Features,
    val_labels: Labels,
    num_classes: int,
) -> float:
    """Share of validation images that a linear probe, fitted to the training part, gets right.

    The probe is ridge regression on one-hot labels with an intercept, of features standardised by
    the training part. Its penalty is the one of `PENALTIES` with the least squared error on
    training images that are left out one at a time.
    """
    mean_D = train_ND.astype(np.float64).mean(axis=0)
    x_ND = _centred(train_ND.astype(np.float64))
    spread_D = x_ND.std(axis=0)
    scale_D = np.where(spread_D > 0, spread_D, np.inf)  # what does not vary has no weight
    targets_NK = _one_hot(train_labels, num_classes)
    weights_DK = _probe(x_ND / scale_D, _centred(targets_NK))
    scores_MK = (val_MD.astype(np.float64) - mean_D) / scale_D @ weights_DK
    scores_MK += targets_NK.mean(axis=0)
    return float((scores_MK.argmax(axis=1) == val_labels).mean())


def spectrum(x_ND: Array) -> Spectrum:
    """Squared singular values and left singular vectors, by the smaller of x x' and x' x."""
    is_wide = x_ND.shape[0] <= x_ND.shape[1]
    eigenvalues, vectors = np.linalg.eigh(x_ND @ x_ND.T if is_wide else x_ND.T @ x_ND)
    is_kept = eigenvalues > eigenvalues[-1] * max(x_ND.shape) * np.finfo(np.float64).eps
    eigenvalues_R, vectors = eigenvalues[is_kept], vectors[:, is_kept]
    axes_NR = vectors if is_wide else x_ND @ (vectors / np.sqrt(eigenvalues_R))
    return Spectrum(eigenvalues_R, axes_NR)


def leave_one_out_error(x_spectrum: Spectrum, targets_NK: Array, penalty: float) -> float:
    """Mean squared error of ridge regression on images left out one at a time.

    In closed form: the residuals of one fit to all images, over 1 - leverage (Allen, 1974, "The
    relationship between variable selection and data augmentation and a method for prediction").

    Args:
        x_spectrum: of centred features; the intercept is fitted with each image's absence, too.
        targets_NK: centred.
    """
    eigenvalues_R, axes_NR = x_spectrum
    kept_R = eigenvalues_R / (eigenvalues_R + penalty)
    residuals_NK = targets_NK - axes_NR @ (kept_R[:, None] * (axes_NR.T @ targets_NK))
    leverages_N = 1 / len(axes_NR) + axes_NR**2 @ kept_R
    return float(((residuals_NK / (1 - leverages_N)[:, None]) ** 2).mean())


def _probe(x_ND: Array, targets_NK: Array) -> Array:
    """Weights of the ridge regression with the best penalty; both are centred."""
    x_spectrum = eigenvalues_R, axes_NR = spectrum(x_ND)
    if not len(eigenvalues_R):
        return np.zeros((x_ND.shape[1], targets_NK.shape[1]))
    penalties = PENALTIES * eigenvalues_R.mean()
    errors = [leave_one_out_error(x_spectrum, targets_NK, penalty) for penalty in penalties]
    scale_R = eigenvalues_R + penalties[np.argmin(errors)]
    weights_DK: Array = x_ND.T @ (axes_NR @ (axes_NR.T @ targets_NK / scale_R[:, None]))
    return weights_DK


def _shrinkage(x_ND: Array, eigenvalues_R: Array) -> float:
    """Share of the identity in the covariance's best estimate; x is centred.

    Ledoit and Wolf, 2004, "A well-conditioned estimator for large-dimensional covariance matrices".
    """
    num_images, num_features = x_ND.shape
    variances_R = eigenvalues_R / num_images
    square = (variances_R**2).sum()
    distance = square - variances_R.sum() ** 2 / num_features
    error = (((x_ND**2).sum(axis=1) ** 2).mean() - square) / num_images
    return float(min(1.0, error / distance)) if distance > 0 else 1.0


def _one_hot(labels_N: Labels, num_classes: int) -> Array:
    targets_NK = np.zeros((len(labels_N), num_classes))
    targets_NK[np.arange(len(labels_N)), labels_N] = 1
    return targets_NK


def _centred(x: Array) -> Array:
    return np.asarray(x - x.mean(axis=0))
