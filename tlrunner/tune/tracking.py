"""Who else is told of each epoch, through Ray's own callbacks."""

from collections.abc import Callable

from ray import tune
from ray.tune.experiment import Trial

from tlrunner.jobconfig import JobConfig
from tlrunner.train.place import Place


def trackers(
    job: JobConfig, run: Place, trial_id_of: Callable[[Trial], str]
) -> list[tune.Callback]:
    """Callbacks of a search."""
    return []
