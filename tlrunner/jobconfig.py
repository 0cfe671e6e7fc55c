"""Every key of a whole job: where it writes, what it searches, which images it reads.

`TrainJob` is one trial with a place for its result, `JobConfig` adds the search over trials;
`PrepareJob` and `PredictJob` are the configs of the two jobs that make data.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from tlrunner.config import CACHE_DIR, Section, TrialConfig, Uri
from tlrunner.files import canonical_json

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
DISTRIBUTION_KINDS = ("choice", "uniform", "loguniform", "randint", "grid")


class OutputConfig(Section):
    """Where results go: `uri`/`name`/."""

    uri: Uri = "runs"
    """The directory that holds runs."""
    name: str | None = Field(None, pattern=NAME_PATTERN)
    """Name of the run. None: the job's name, the date and a number."""


class LogConfig(Section):
    level: Literal["info", "debug"] = "info"
    """What the terminal shows; `debug` adds Ray's messages and tracebacks of user errors."""


class TrainJob(TrialConfig):
    """`jobs/train.py`: one configuration."""

    output: OutputConfig = OutputConfig()
    log: LogConfig = LogConfig()

    def trial(self) -> TrialConfig:
        """The part that decides the outcome."""
        return TrialConfig(**{name: getattr(self, name) for name in TrialConfig.model_fields})


class Distribution(Section):
    """Values that a searched key can take: exactly one of the five kinds."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these values, with equal chance."""
    uniform: tuple[float, float] | None = None
    """A number between two bounds."""
    loguniform: tuple[float, float] | None = None
    """A number between two positive bounds, uniform in its logarithm."""
    randint: tuple[int, int] | None = None
    """A whole number between two bounds, both included."""
    grid: tuple[Any, ...] | None = Field(None, min_length=1)
    """Each of these values in turn (`search.algorithm: grid`)."""
    when: dict[str, Any] = {}
    """Used only where these other keys have this value, or one of this list of values."""

    @property
    def kind(self) -> str:
        return next(kind for kind in DISTRIBUTION_KINDS if getattr(self, kind) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The choices, or the two bounds."""
        return tuple(getattr(self, self.kind))

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {self.kind: list(self.values), **({"when": self.when} if self.when else {})}

    @model_validator(mode="after")
    def _is_one_proper_distribution(self) -> "Distribution":
        given = [kind for kind in DISTRIBUTION_KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(DISTRIBUTION_KINDS)}, has {given}")
        low, high = (self.values + self.values)[:2]
        if self.kind in ("uniform", "loguniform", "randint") and not low < high:
            raise ValueError(f"{self.kind} is [{low}, {high}], valid: lower bound first")
        if self.kind == "loguniform" and low <= 0:
            raise ValueError(f"loguniform is [{low}, {high}], valid: positive bounds")
        try:
            canonical_json([self.values, self.when])
        except (TypeError, ValueError) as err:
            raise ValueError(f"{self.kind} holds a value that JSON has not: {err}") from err
        return self


class SearchConfig(Section):
    """Which trials run, and which of them are stopped early."""

    variants = {
        "algorithm": {
            "random": {"num_trials": 8, "seed": 0},
            "tpe": {"num_trials": 8, "seed": 0},
            "grid": {},
        },
        "scheduler": {
            "none": {},
            "median": {"grace_epochs": 1},
            "asha": {"grace_epochs": 1, "reduction_factor": 3},
        },
    }
    space: dict[str, tuple[Distribution, ...]] = {}
    """Dotted key -> distribution, or a list of conditional ones of which the first that fits is
    used."""
    algorithm: Literal["random", "grid", "tpe"] = "random"
    """Independent draws, every combination, or Optuna's tree-structured Parzen estimator."""
    num_trials: int | None = Field(None, ge=1, le=100_000)
    """`random`, `tpe`: how many points are tried, fewer where the space has no more."""
    scheduler: Literal["none", "asha", "median"] = "none"
    """Early stopping: asynchronous successive halving, or the median rule."""
    grace_epochs: int | None = Field(None, ge=1)
    """Epochs that every trial gets before it can be stopped."""
    reduction_factor: int | None = Field(None, ge=2, le=100)
    """`asha`: one in this many trials goes on at each rung."""
    max_epochs: int | None = Field(None, ge=1)
    """End trials after this many epochs, whatever their train.epochs. None: no such bound."""
    time_budget_seconds: float | None = Field(None, gt=0)
    """End the search after this much wall time; the best so far is the result."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """None: as many as the resources allow."""
    seed: int | None = Field(None, ge=0, lt=2**31)
    """`random`, `tpe`: of the points that are drawn; the seed of a trial is `train.seed`."""

    @field_validator("space", mode="before")
    @classmethod
    def _one_distribution_is_a_list_of_one(cls, space: Any) -> Any:
        if not isinstance(space, dict):
            return space
        return {key: [entry] if isinstance(entry, dict) else entry for key, entry in space.items()}

    @model_validator(mode="after")
    def _grid_goes_with_grid(self) -> "SearchConfig":
        for key, entries in self.space.items():
            for entry in entries:
                if (entry.kind == "grid") != (self.algorithm == "grid"):
                    raise ValueError(
                        f"space '{key}' is a {entry.kind}, which does not go with algorithm "
                        f"'{self.algorithm}'; grid goes with grid, the others with random and tpe"
                    )
        return self


class JobConfig(TrainJob):
    """`jobs/tune_*.py`: a search over configurations."""

    search: SearchConfig = SearchConfig()


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
