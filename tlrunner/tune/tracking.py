"""Who else is told of each epoch: TensorBoard always, MLflow and Weights & Biases where wanted.

Ray's own callbacks do the telling. Before each of them stands a `Tracker`, which shows it our
trials in place of Ray's, and tells it of each epoch of them once. A tracker that fails costs its
own record of a trial, never the trial.
"""

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.air.constants import TRAINING_ITERATION
from ray.tune.experiment import Trial
from ray.tune.logger import LoggerCallback, TBXLoggerCallback

from tlrunner.errors import ConfigError
from tlrunner.jobconfig import JobConfig, TrackConfig
from tlrunner.secrets import redacted
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import EpochReport
from tlrunner.tune.space import Point

TENSORBOARD = "tensorboard"
WANDB = "wandb"  # W&B gives its directory this name itself
RUN_TAG = "tlrunner.run"  # of a trial in MLflow: where its run is, as experiments can share a name
UPLOAD_SECONDS = 120  # that W&B gets to send the rest after the last trial
# The search waits while MLflow is told, so a server that is down must be given up in seconds.
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}

log = logging.getLogger("tlrunner")


def check_trackers(track: TrackConfig) -> None:
    """Check that what is to be told of the epochs can be.

    Raises:
        ConfigError: a package is not installed, or W&B is to be online and nobody is logged in.
    """
    for key, package in {"mlflow_uri": "mlflow", "wandb_project": "wandb"}.items():
        value = getattr(track, key)
        if value is not None and not _is_installed(package):
            raise ConfigError(
                f"track.{key} is {value}, and the package {package} is not installed",
                "",
                f"pip install tlrunner[{package}]",
            )
    if track.wandb_mode == "online":
        _check_login()


def trackers(
    job: JobConfig,
    run: Place,
    trial_id_of: Callable[[Trial], str],
    has_failed: Callable[[Trial], bool],
    told_before: Set[str] = frozenset(),
) -> list[tune.Callback]:
    """Callbacks of a search, to follow those that `trial_id_of` depends on.

    Args:
        run: the run's directory.
        trial_id_of: our name of Ray's trial as it is now.
        told_before: trials that had ended before this start of the run. They may be told to the
            search again, and are not to the trackers.

    Raises:
        ConfigError: MLflow cannot be used.
    """
    _forget_cleared(run)
    kept = {trial_id for trial_id in told_before if (run.path / TENSORBOARD / trial_id).exists()}
    told: list[tuple[Told, Set[str]]] = [(_tensorboard(run), kept)]
    if job.track.mlflow_uri is not None:
        told.append((_mlflow(job.track.mlflow_uri, run), told_before))
    if job.track.wandb_project is not None:
        told.append((_wandb(job.track, run), told_before))
    return [Tracker(one, run, trial_id_of, has_failed, before) for one, before in told]


@dataclass(frozen=True)
class Shown:
    """One of our trials, as Ray's callbacks look at a trial."""

    name: str
    trial_id: str  # unique in a project of W&B, as long as its runs have names of their own
    local_path: str  # which W&B works in, too
    config: dict[str, Any] = field(compare=False)

    @property
    def evaluated_params(self) -> dict[str, Any]:
        return self.config

    def init_local_path(self) -> None:
        Path(self.local_path).mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Told:
    """Who is told, and what of an earlier start of a trial it forgets before a new one."""

    name: str
    logger: LoggerCallback
    forget: Callable[[str], None]  # by its id


class Tracker(tune.Callback):  # type: ignore[misc]  # ray is not typed
    """Tells one of Ray's callbacks of our trials.

    A trial that is paused and goes on stays the same to it. One that goes on as a copy of another
    is a new trial of ours, so the one before it ends.
    """

    def __init__(
        self,
        told: Told,
        run: Place,
        trial_id_of: Callable[[Trial], str],
        has_failed: Callable[[Trial], bool],
        told_before: Set[str],
    ) -> None:
        self.told, self.run, self.told_before = told, run, told_before
        self.trial_id_of, self.has_failed = trial_id_of, has_failed
        self.shown: dict[str, Shown] = {}  # Ray's id -> what that trial is now
        self.last_epoch: dict[Shown, int] = {}
        self.lost: set[Shown] = set()  # those that could not be told of

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray saves a copy of callbacks; open files and connections cannot be saved

    def on_trial_start(self, iteration: int, trials: Any, trial: Trial, **_: Any) -> None:
        """A trial starts, goes on, or goes on as a copy of another."""
        trial_id, before = self.trial_id_of(trial), self.shown.get(trial.trial_id)
        if before and before.name == trial_id:
            return
        self._end(trial, failed=False)
        if trial_id in self.told_before:
            return
        shown = self.shown[trial.trial_id] = _shown(self.run, trial_id, **trial.config["trial"])
        self._tell(shown, self.told.forget, trial_id)
        self._tell(shown, shown.init_local_path)
        self._tell(shown, self.told.logger.log_trial_start, shown)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        shown, epoch = self.shown.get(trial.trial_id), result["epoch"]
        if shown and epoch > self.last_epoch.get(shown, 0):
            self.last_epoch[shown] = epoch
            self._tell(shown, self.told.logger.log_trial_result, epoch, shown, _figures(result))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Trial, **_: Any) -> None:
        self._end(trial, failed=self.has_failed(trial))

    def on_trial_error(self, iteration: int, trials: Any, trial: Trial, **_: Any) -> None:
        self._end(trial, failed=True)

    def on_experiment_end(self, trials: Any, **_: Any) -> None:
        try:
            self.told.logger.on_experiment_end(trials)
        except Exception as err:  # noqa: BLE001  (the border, as below)
            log.warning("%s did not end in order: %s", self.told.name, _one_line(err))

    def _end(self, trial: Trial, *, failed: bool) -> None:
        """A trial can end without having started."""
        if shown := self.shown.pop(trial.trial_id, None):
            self._tell(shown, self.told.logger.log_trial_end, shown, failed)

    def _tell(self, shown: Shown, tell: Callable[..., object], *what: object) -> None:
        if shown in self.lost:
            return
        try:
            tell(*what)
        except Exception as err:  # noqa: BLE001  (the border: a server that is down ends no search)
            self.lost.add(shown)
            _say_lost(self.told.name, shown, err)


def _say_lost(name: str, shown: Shown, err: Exception) -> None:
    log.warning("%s is told no more of trial %s: %s", name, shown, _one_line(err))


def _one_line(err: Exception) -> str:
    cause = getattr(err, "cause", None) or err  # of an error that Ray brings from another process
    return f"{type(cause).__name__}: {' '.join(redacted(str(cause)).split())[:300]}"


def _shown(run: Place, trial_id: str, index: int, point: Point, **_: Any) -> Shown:
    """A trial with its point in values that every tracker can show."""
    plain = (bool, int, float, str)
    params = {
        key: value if isinstance(value, plain) else str(value) for key, value in point.items()
    }
    directory = run.path / TENSORBOARD / trial_id
    return Shown(trial_id, _wandb_id(run, trial_id), str(directory), {"index": index, **params})


def _figures(result: dict[str, Any]) -> dict[str, float]:
    """An epoch's figures, without what else it or Ray reports."""
    values = {column.name: result.get(column.name) for column in fields(EpochReport)}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _forget_cleared(run: Place) -> None:
    """Remove what is here of trials that were cleared, as they are to run again."""
    trials = [directory.name for directory in (run.path / "trials").glob("*")]
    for directory in (run.path / TENSORBOARD).glob("*"):
        if directory.name not in trials:
            run.remove(directory)
    of_trials = tuple(f"-{_wandb_id(run, trial_id)}" for trial_id in trials)
    for directory in (run.path / WANDB).glob("*run-*"):
        if not directory.name.endswith(of_trials):
            run.remove(directory)


class PlainTensorBoard(TBXLoggerCallback):  # type: ignore[misc]  # ray is not typed
    """Ray's, with the figures under their own names and nothing of Ray's among them."""

    def log_trial_result(self, iteration: int, trial: Shown, result: dict[str, float]) -> None:
        writer = self._trial_writer[trial]
        for name, value in result.items():
            writer.add_scalar(name, value, global_step=iteration)
        writer.flush()
        self._trial_result[trial] = result  # which the parent shows beside the parameters


def _tensorboard(run: Place) -> Told:
    """Event files in the run's `tensorboard/TRIAL/`."""

    def forget(trial_id: str) -> None:
        if (directory := run.path / TENSORBOARD / trial_id).exists():
            run.remove(directory)

    return Told("TensorBoard", PlainTensorBoard(), forget)


def _mlflow(uri: str, run: Place) -> Told:
    """An experiment with the run's name, and in it a run with each trial's name."""
    import mlflow
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    for name, value in MLFLOW_PATIENCE.items():
        os.environ.setdefault(name, value)
    client = mlflow.MlflowClient(uri)

    class PlainMlflow(MLflowLoggerCallback):  # type: ignore[misc]  # ray is not typed
        """Ray's, with one request an epoch in place of two for each figure."""

        def log_trial_result(self, iteration: int, trial: Shown, result: dict[str, float]) -> None:
            now = int(time.time() * 1000)
            metrics = [mlflow.entities.Metric(*item, now, iteration) for item in result.items()]
            client.log_batch(self._trial_runs[trial], metrics=metrics)

    logger = PlainMlflow(uri, experiment_name=run.path.name, tags={RUN_TAG: str(run)})
    try:
        logger.setup()
    except Exception as err:  # the border: stores and servers have errors of their own
        raise ConfigError(
            f"track.mlflow_uri is {uri}, and MLflow cannot use it: {redacted(str(err))[:300]}",
            "the URI of an MLflow server, or sqlite:///FILE",
        ) from err

    def forget(trial_id: str) -> None:
        experiments = [logger.mlflow_util.experiment_id]
        for earlier in client.search_runs(experiments, f"attributes.run_name = '{trial_id}'"):
            if earlier.data.tags.get(RUN_TAG) == str(run):
                client.delete_run(earlier.info.run_id)

    return Told("MLflow", logger, forget)


def _wandb(track: TrackConfig, run: Place) -> Told:
    """A group with the run's name, and in it a W&B run for each trial, written to `wandb/`."""
    from ray.air.integrations.wandb import WandbLoggerCallback, _WandbLoggingActor

    class Writer(_WandbLoggingActor):  # type: ignore[misc]  # ray is not typed
        """The process of a trial. Ray ends it once this returns, and W&B's own child with it."""

        def run(self) -> None:
            super().run()
            self._wandb.teardown()  # which waits for the child to write the last of what it has

    # Ray's `setup` is not called: it asks for an API key, of which `offline` has no need.
    class PlainWandb(WandbLoggerCallback):  # type: ignore[misc]  # ray is not typed
        """Ray's, with an epoch's number by Ray's name, and no second writer behind a failed one."""

        _logger_actor_cls = Writer

        def log_trial_result(self, iteration: int, trial: Shown, result: dict[str, float]) -> None:
            if trial in self._trial_logging_actors:
                result = {**result, TRAINING_ITERATION: iteration}
                super().log_trial_result(iteration, trial, result)

        def log_trial_end(self, trial: Shown, failed: bool = False) -> None:
            if trial in self._trial_logging_actors:
                super().log_trial_end(trial, failed)

        def _cleanup_logging_actor(self, trial: Shown) -> None:
            try:
                ray.get(self._trial_logging_futures[trial], timeout=0)
            except Exception as err:  # noqa: BLE001  (the border: whatever W&B raised)
                _say_lost("W&B", trial, err)
            super()._cleanup_logging_actor(trial)

    logger = PlainWandb(
        project=track.wandb_project,
        group=run.path.name,
        upload_timeout=UPLOAD_SECONDS,
        mode=track.wandb_mode,
        dir=str(run.path),
    )

    def forget(trial_id: str) -> None:
        for earlier in (run.path / WANDB).glob(f"*run-*_*-{_wandb_id(run, trial_id)}"):
            run.remove(earlier)

    return Told("W&B", logger, forget)


def _wandb_id(run: Place, trial_id: str) -> str:
    return f"{run.path.name}-{trial_id}"


def _check_login() -> None:
    import wandb

    try:
        reason = "" if wandb.login(prompt=False) else "nobody is logged in"
    except wandb.Error as err:
        reason = str(err)
    if reason:
        raise ConfigError(
            f"track.wandb_mode is online, and {reason}",
            "offline, or online with an API key",
            "set WANDB_API_KEY, or run `wandb login`",
        )


def _is_installed(package: str) -> bool:
    """Whether there is a package, and not just a directory of its name, such as W&B leaves."""
    return getattr(importlib.util.find_spec(package), "origin", None) is not None
