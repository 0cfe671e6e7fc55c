"""What Ray runs in a worker: one trial after another, each from its point to its end."""

import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune

from tlrunner.errors import StorageError, TlrunnerError
from tlrunner.files import write_text
from tlrunner.jobconfig import JobConfig
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import EpochReport, TrialDir
from tlrunner.tune.space import PlannedTrial, trial_at


def planned_trial(job: JobConfig, values: dict[str, Any]) -> PlannedTrial:
    """The trial that Ray's values for it stand for."""
    return trial_at(job, values["trial"]["index"], values["trial"]["point"])


def build_trainable(
    job: JobConfig, trials_dir: Path, shards: Path
) -> Callable[[dict[str, Any]], None]:
    """The function Ray Tune calls with the values of one trial."""

    def trainable(values: dict[str, Any]) -> None:
        planned = planned_trial(job, values)
        directory = trials_dir / planned.trial_id

        def report(finished: EpochReport) -> None:
            tune.report(asdict(finished))

        if directory.exists():  # a continued run: what ended is told again, not computed again
            for finished in TrialDir(directory).read().epochs:
                report(finished)
            return
        try:
            run_trial(planned.config, report, trial_dir=directory, shards=shards)
        except Exception as err:  # the border: whatever it is, the trial's directory says so
            record_failure(directory, err)
            raise

    return trainable


def record_failure(directory: Path, error: BaseException) -> None:
    """Leave one line for the leaderboard and the traceback for whoever mends it."""
    line = str(error) if isinstance(error, TlrunnerError) else f"{type(error).__name__}: {error}"
    try:
        write_text(directory / "error.txt", "".join(traceback.format_exception(error)))
        TrialDir(directory).end("failed", " ".join(line.split())[:500])
    except StorageError as err:
        raise error from err  # the disk that fails is often what failed the trial
