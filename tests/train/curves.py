"""Whether trials went the same way."""

import numpy as np

from tlrunner.train.trial_dir import EpochReport


def losses(reports: list[EpochReport]) -> list[tuple[float, float, float]]:
    return [(r.train_loss, r.val_loss, r.val_acc) for r in reports]


def close(ours: list[EpochReport], theirs: list[EpochReport], tolerance: float) -> bool:
    return bool(np.allclose(losses(ours), losses(theirs), rtol=0, atol=tolerance))
