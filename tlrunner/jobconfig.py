"""Every key of a whole job: where it writes, what it searches, which images it reads.

`TrainJob` is one trial with a place for its result, `JobConfig` adds the search over trials;
`PrepareJob` and `PredictJob` are the configs of the two jobs that make data.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from tlrunner.config import CACHE_DIR, TrialConfig
from tlrunner.searchconfig import SearchConfig
from tlrunner.section import Section, Uri

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class OutputConfig(Section):
    """Where results go: `uri`/`name`/."""

    uri: Uri = "runs"
    """The directory that holds runs."""
    name: str | None = Field(None, pattern=NAME_PATTERN)
    """Name of the run. None: the job's name, the date and a number."""


class LogConfig(Section):
    level: Literal["info", "debug"] = "info"
    """What the terminal shows; `debug` adds Ray's messages and tracebacks of user errors."""


class TrackConfig(Section):
    """Who else is told of each epoch. TensorBoard always is, in the run's `tensorboard/`."""

    mlflow_uri: Uri | None = None
    """Tracking URI of an MLflow server, or `sqlite:///FILE`. None: MLflow is not used."""
    wandb_project: str | None = Field(None, min_length=1)
    """Project of Weights & Biases. None: it is not used."""
    wandb_mode: Literal["offline", "online"] | None = None
    """`offline` (the default) writes to the run's `wandb/`, for `wandb sync`."""

    @model_validator(mode="before")
    @classmethod
    def _mode_goes_with_a_project(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("wandb_project") is None:
            if values.get("wandb_mode") is not None:
                raise ValueError("'wandb_mode' is not used without 'wandb_project'")
            return values
        return {**values, "wandb_mode": values.get("wandb_mode") or "offline"}


class TrainJob(TrialConfig):
    """`jobs/train.py`: one configuration."""

    output: OutputConfig = OutputConfig()
    log: LogConfig = LogConfig()

    def trial(self) -> TrialConfig:
        """The part that decides the outcome."""
        return TrialConfig(**{name: getattr(self, name) for name in TrialConfig.model_fields})


class JobConfig(TrainJob):
    """`jobs/tune_*.py`: a search over configurations."""

    search: SearchConfig = SearchConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _search_fits_the_trial(self) -> "JobConfig":
        budget, resources = self.search.budget, self.resources
        if budget and budget.gpu_hours is not None and resources.gpus_per_worker == 0:
            raise ValueError(
                "search.budget.gpu_hours is not used with resources.gpus_per_worker 0; "
                "cpu_hours, wall_seconds and num_trials are"
            )
        if self.search.final_repeats and "train.seed" in self.search.space:
            raise ValueError(
                "search.final_repeats repeats trials with other seeds, so train.seed cannot be in "
                "search.space"
            )
        for entry in self.search.space.get("backbone.weights", ()):
            if not all(isinstance(value, str) for value in entry.values):
                raise ValueError(
                    f"search.space: 'backbone.weights' is {list(entry.values)!r:.200}, valid: words"
                )
        return self


class PrepareSource(Section):
    """Which images to write as shards."""

    uri: Uri = "sample:flowers"
    """`sample:flowers`, an ImageFolder directory, a flat directory of unlabelled images, a CSV or
    JSONL list, Parquet files, or a directory or `s3://` prefix of shards."""
    limit: int | None = Field(None, ge=4)
    """Write this many samples, stratified by class. None: all."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Stop when more than this share of the images cannot be used."""
    cache_dir: str = Field(CACHE_DIR, min_length=1)
    """Where what is fetched is kept."""


class ShardConfig(Section):
    """What becomes of an image before it is stored."""

    max_side: int | None = Field(None, ge=16, le=65535)
    """Scale larger images down to this longer side, in pixels. None: keep them as they are."""
    max_pixels: int = Field(50_000_000, ge=64, le=1_000_000_000)
    """Images with more pixels are not used."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the order of rows."""


class PrepareJob(Section):
    """`jobs/prepare_images.py`: any source -> shards."""

    data: PrepareSource = PrepareSource()
    shards: ShardConfig = ShardConfig()
    output: OutputConfig = OutputConfig()
    log: LogConfig = LogConfig()


class PredictSource(PrepareSource):
    """Which images to predict."""

    num_workers: int | None = Field(None, ge=1, le=256)
    """Threads that decode. None: as many as the machine has CPUs."""
    batch_size: int = Field(64, ge=1, le=65536)
    """Images computed at once."""
    cache_bytes: int | None = Field(None, ge=0)
    """Disk that fetched shards may take. None: a third of what is free, at most 200 GB."""


class PredictJob(Section):
    """`jobs/predict.py`: a model and images -> predictions."""

    data: PredictSource = PredictSource()
    output: OutputConfig = OutputConfig()
    log: LogConfig = LogConfig()
