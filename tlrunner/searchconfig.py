"""Every key of a search: which trials run, which of them stop early, and when it is over."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from tlrunner.files import canonical_json
from tlrunner.section import Section, Uri

DISTRIBUTION_KINDS = ("choice", "uniform", "loguniform", "randint", "grid")
DEFAULT_TRIALS = 8
MOST_TRIALS = 100_000
MOST_SECONDS = 1e8  # three years


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


class BudgetConfig(Section):
    """What a search may spend; it ends with the first of these that is spent."""

    num_trials: int | None = Field(None, ge=1, le=MOST_TRIALS)
    """Points that are tried, fewer where the space has no more."""
    wall_seconds: float | None = Field(None, gt=0, le=MOST_SECONDS)
    """Time since the job began."""
    cpu_hours: float | None = Field(None, gt=0, le=1e9)
    """CPUs of trials times hours."""
    gpu_hours: float | None = Field(None, gt=0, le=1e9)
    """GPUs of trials, or shares of them, times hours."""

    @property
    def is_bounded(self) -> bool:
        return any(value is not None for value in self.model_dump().values())


class RankConfig(Section):
    """Which of the searched backbones are tried: those whose frozen features tell most."""

    keep: int = Field(3, ge=1)
    """Backbones that stay."""
    by: Literal["log_me", "h_score", "ridge_accuracy"] = "log_me"
    """LogME (You et al., 2021), H-score (Bao et al., 2019; tells little where there are far fewer
    images than features) or the accuracy of a linear probe."""
    num_images: int = Field(1000, ge=4, le=10_000)
    """Training images that the scores are of; the probe is tested on as many of validation."""


class SearchConfig(Section):
    """Which trials run, and which of them are stopped early."""

    variants = {
        "algorithm": {"random": {"seed": 0}, "tpe": {"seed": 0, "warm_start": None}, "grid": {}},
        "scheduler": {
            "none": {},
            "median": {"grace_epochs": 1},
            "asha": {"grace_epochs": None, "grace_seconds": None, "reduction_factor": 3},
            "hyperband": {"reduction_factor": 3},
            "pbt": {"perturbation_epochs": 1},
        },
    }
    space: dict[str, Annotated[tuple[Distribution, ...], Field(min_length=1)]] = {}
    """Dotted key -> distribution, or a list of conditional ones of which the first that fits is
    used."""
    points: tuple[Annotated[dict[str, Any], Field(min_length=1)], ...] = ()
    """Trials given one by one, each as dotted keys with its values, instead of a `space`
    (`algorithm: grid`)."""
    algorithm: Literal["random", "grid", "tpe"] = "random"
    """Independent draws, every combination, or Optuna's tree-structured Parzen estimator."""
    budget: BudgetConfig | None = None
    """When the search is over; 8 trials where nothing is said."""
    rank: RankConfig | None = None
    """Score the values of backbone.name before any trial, each as the first trial with it would
    have it, and try the best alone. Time for that is in no budget but wall_seconds. None: try
    all."""
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = "none"
    """Early stopping: asynchronous successive halving (Li et al., 2020), HyperBand (Li et al.,
    2018) or the median rule; or population based training (Jaderberg et al., 2017). None of them
    judges a trial before its backbone is thawed and its warm-up over."""
    grace_epochs: int | None = Field(None, ge=1)
    """`asha`, `median`: epochs that every trial gets before it can be stopped."""
    grace_seconds: float | None = Field(None, gt=0, le=MOST_SECONDS)
    """`asha`: seconds of each trial instead, which small and large backbones get alike."""
    reduction_factor: int | None = Field(None, ge=2, le=100)
    """`asha`, `hyperband`: one in this many trials goes on at each rung."""
    perturbation_epochs: int | None = Field(None, ge=1)
    """`pbt`: epochs between two times that the worst quarter goes on from copies of the best."""
    max_epochs: int | None = Field(None, ge=1)
    """End trials after this many epochs, whatever their train.epochs. None: no such bound."""
    trade_off: Literal["latency_seconds", "total_params"] | None = None
    """Weigh accuracy against this: TPE looks for the whole Pareto front, and the leaderboard marks
    it. The winner is still the most accurate."""
    warm_start: Uri | None = None
    """`tpe`: directory of an earlier run, whose trials it learns from before its own."""
    final_repeats: int | None = Field(None, ge=2, le=100)
    """Train the best configurations once more with this many other seeds; the best mean wins."""
    final_candidates: int | None = Field(None, ge=1, le=100)
    """How many configurations are repeated: 3 where nothing is said."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """None: as many as the resources allow."""
    max_failures: int = Field(3, ge=0, le=1000)
    """Errors of a trial behind which it goes on from its checkpoint; the same error behind the same
    checkpoint ends it. A process or a node that dies is no error of the trial."""
    seed: int | None = Field(None, ge=0, lt=2**31)
    """`random`, `tpe`: of the points that are drawn; the seed of a trial is `train.seed`."""

    @field_validator("space", mode="before")
    @classmethod
    def _one_distribution_is_a_list_of_one(cls, space: Any) -> Any:
        if not isinstance(space, dict):
            return space
        return {key: [entry] if isinstance(entry, dict) else entry for key, entry in space.items()}

    @model_validator(mode="before")
    @classmethod
    def _fill_what_is_not_said(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("budget") is None:
            is_grid = values.get("algorithm") == "grid"
            values["budget"] = {} if is_grid else {"num_trials": DEFAULT_TRIALS}
        if values.get("scheduler") == "asha" and values.get("grace_seconds") is None:
            values["grace_epochs"] = values.get("grace_epochs") or 1
        if values.get("final_repeats") is not None:
            values["final_candidates"] = values.get("final_candidates") or 3
        return values

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

    @model_validator(mode="after")
    def _points_stand_alone(self) -> "SearchConfig":
        if self.points and self.space:
            raise ValueError("space and points are both set, valid: one of them")
        if self.points and self.algorithm != "grid":
            raise ValueError(f"points do not go with algorithm '{self.algorithm}', valid: grid")
        if self.points and self.scheduler == "pbt":
            raise ValueError(
                "points do not go with scheduler 'pbt', which draws new values from a space"
            )
        return self

    @model_validator(mode="after")
    def _budget_fits_the_algorithm(self) -> "SearchConfig":
        assert self.budget is not None, "filled in before"
        if self.algorithm == "grid":
            if self.budget.num_trials is not None:
                raise ValueError(
                    "'budget.num_trials' is not used with algorithm 'grid', whose trials are every "
                    "combination; it is used with: random, tpe"
                )
        elif not self.budget.is_bounded:
            raise ValueError(
                "budget has no bound, and the search no end; valid: num_trials, wall_seconds, "
                "cpu_hours or gpu_hours"
            )
        return self

    @model_validator(mode="after")
    def _scheduler_fits_the_rest(self) -> "SearchConfig":
        if self.grace_epochs is not None and self.grace_seconds is not None:
            raise ValueError("grace_epochs and grace_seconds are both set, valid: one of them")
        if self.final_candidates is not None and self.final_repeats is None:
            raise ValueError("'final_candidates' is not used without 'final_repeats'")
        if self.trade_off and self.scheduler != "none":
            raise ValueError(
                f"trade_off does not go with scheduler '{self.scheduler}', which stops trials by "
                "their accuracy alone; valid: scheduler 'none'"
            )
        if self.scheduler == "pbt":
            self._check_population()
        return self

    def _check_population(self) -> None:
        if self.algorithm == "tpe":
            raise ValueError(
                "algorithm 'tpe' does not go with scheduler 'pbt', which changes the values of "
                "running trials; valid: random, grid"
            )
        if self.final_repeats is not None:
            raise ValueError(
                "final_repeats does not go with scheduler 'pbt': a schedule of values that was "
                "found on the way cannot be repeated from a configuration"
            )
        if self.max_concurrent_trials is not None:
            raise ValueError(
                "max_concurrent_trials does not go with scheduler 'pbt', whose trials take turns "
                "by themselves"
            )
        if self.algorithm == "random" and (self.budget is None or not self.budget.num_trials):
            raise ValueError("scheduler 'pbt' needs budget.num_trials, the size of the population")
