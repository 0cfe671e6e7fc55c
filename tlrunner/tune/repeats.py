"""The best configurations once more, with other seeds: whether a winner won by luck.

A repeat has the number of the trial that it repeats, and a seed of its own. The seed by which a
configuration was found is not counted: it was chosen for its luck.
"""

from collections.abc import Sequence

from tlrunner.jobconfig import JobConfig
from tlrunner.train.trial_dir import TrialRecord
from tlrunner.tune.space import Point, point_at


def candidates(job: JobConfig, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The best trials that the search found, the same whenever they are asked for."""
    found = [r for r in records if r.best and r.config.train.seed == job.train.seed]
    found.sort(key=lambda r: (-(r.best.val_acc if r.best else 0), r.trial_id))
    return found[: job.search.final_candidates]


def repeats_of(job: JobConfig, best: Sequence[TrialRecord]) -> list[tuple[int, Point]]:
    """Numbers and points of the repeats: each seed of all candidates before the next seed."""
    assert job.search.final_repeats is not None, "asked for"
    points = [(record.index, point_at(job, record)) for record in best]
    return [
        (index, {**point, "train.seed": job.train.seed + number})
        for number in range(1, job.search.final_repeats + 1)
        for index, point in points
    ]
