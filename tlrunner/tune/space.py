"""The search space: from distributions over dotted keys to points, and from points to trials.

A point is a flat map of dotted keys to plain values. Random and grid search know all their points
before anything starts; TPE asks for one at a time. All three walk the space in the same way
(`build_point`), so conditions mean the same to each.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from tlrunner.config import TrialConfig
from tlrunner.configfile import config_hash, get_value, shown, with_values
from tlrunner.errors import ConfigError
from tlrunner.files import canonical_json
from tlrunner.jobconfig import JobConfig
from tlrunner.searchconfig import Distribution

if TYPE_CHECKING:
    import optuna

    from tlrunner.train.trial_dir import TrialRecord

Point = dict[str, Any]
Ask = Callable[[str, Distribution], Any]  # name of a distribution -> a value from it

SHARED_BY_ALL_TRIALS = ("data.", "reuse.", "resources.")
TRIAL_ID = r"^[0-9]{4,}-[0-9a-f]{6}(-e[0-9]+)?$"
MAX_REPEATS = 1000  # random draws of known points before a small space is taken to be exhausted
NUM_PROBES = 64  # random points on which a space is checked that is only asked later
MAX_PLANNED = 1000  # points of a search of very many that are checked beforehand


@dataclass(frozen=True)
class PlannedTrial:
    """One trial to run. Its id is its place in the search and the hash of its config.

    `copied`: the trial and epoch that a population based search has it go on from, if so.
    """

    index: int
    config: TrialConfig
    copied: tuple[str, int] | None = None

    @property
    def trial_id(self) -> str:
        epoch = f"-e{self.copied[1]}" if self.copied else ""
        return f"{self.index:04d}-{config_hash(self.config)[:6]}{epoch}"


def build_point(job: JobConfig, ask: Ask, keys: Sequence[str] = ()) -> Point:
    """One point: each key whose condition holds gets a value from `ask`.

    A key with several conditional distributions uses the first that fits, and is left at the
    job's own value if none does. `keys`: those of the space in order, where that is known.
    """
    point: Point = {}
    base = job.trial()
    for key in keys or _ordered_keys(job):
        entries = job.search.space[key]
        for number, entry in enumerate(entries):
            if _holds(entry.when, point, base):
                name = key if len(entries) == 1 else f"{key}#{number}"
                point[key] = ask(name, entry)
                break
    return point


def iter_points(job: JobConfig) -> Iterator[Point]:
    """The points of a random or grid search, in order, none of them twice.

    Point i of a random search depends on the seed and i alone, so more trials extend a search. It
    ends where `budget.num_trials` says, or when the space has no other points.
    """
    if job.search.points:
        yield from {canonical_json(point): dict(point) for point in job.search.points}.values()
        return
    if job.search.algorithm == "grid":
        yield from _grid_points(job)
        return
    known: set[str] = set()
    repeats = 0
    keys = _ordered_keys(job)
    for attempt in itertools.count():
        if len(known) == num_trials_of(job) or repeats == MAX_REPEATS:
            return
        point = random_point(job, attempt, keys)
        name = canonical_json(point)
        repeats = repeats + 1 if name in known else 0
        if name not in known:
            known.add(name)
            yield point


def num_trials_of(job: JobConfig) -> int | None:
    """How many trials may run at most, if that is said."""
    assert job.search.budget is not None, "the config fills it in"
    return job.search.budget.num_trials


def random_point(job: JobConfig, attempt: int, keys: Sequence[str] = ()) -> Point:
    """A point drawn by the search's seed and the number of the attempt alone."""
    # One generator for each name: a key added to the space leaves the others' values as they were.
    return build_point(
        job,
        lambda name, entry: _draw(random.Random(f"{job.search.seed}:{attempt}:{name}"), entry),
        keys,
    )


def located(job: JobConfig, config: TrialConfig) -> dict[str, tuple[Distribution, Any]] | None:
    """Name -> distribution and value of all that leads to a config; None if nothing does."""
    found: dict[str, tuple[Distribution, Any]] = {}

    def ask(name: str, entry: Distribution) -> Any:
        value = get_value(config, name.partition("#")[0])
        found[name] = entry, value
        return value

    build_point(job, ask)
    return found if all(can_be(entry, value) for entry, value in found.values()) else None


def point_at(job: JobConfig, trial: "PlannedTrial | TrialRecord") -> Point:
    """The point of a trial of the search, which may have been granted other resources."""
    if job.search.points:
        ids = ((trial_at(job, trial.index, p).trial_id, p) for p in iter_points(job))
        return next(point for trial_id, point in ids if trial_id == trial.trial_id)
    found = located(job, trial.config)
    assert found is not None, "a config of the space"
    return {name.partition("#")[0]: value for name, (_, value) in found.items()}


def can_be(entry: Distribution, value: Any) -> bool:
    """Whether a distribution has a value."""
    if entry.kind in ("choice", "grid"):
        return _plain(value) in [_plain(choice) for choice in entry.values]
    low, high = entry.values
    return isinstance(value, int | float) and bool(low <= value <= high)


def _plain(value: Any) -> Any:
    """Lists of a YAML file are tuples in a config."""
    return tuple(value) if isinstance(value, list) else value


def suggest_point(job: JobConfig, trial: "optuna.Trial") -> Point:
    """A point whose values Optuna suggests."""

    def ask(name: str, entry: Distribution) -> Any:
        if entry.kind == "choice":
            # Optuna's categories are scalars, so a list is chosen by its place.
            return entry.values[trial.suggest_categorical(name, list(range(len(entry.values))))]
        low, high = entry.values
        if entry.kind == "randint":
            return trial.suggest_int(name, low, high)
        return trial.suggest_float(name, low, high, log=entry.kind == "loguniform")

    return build_point(job, ask)


def trial_at(
    job: JobConfig, index: int, point: Point, copied: tuple[str, int] | None = None
) -> PlannedTrial:
    """The trial of a point, validated by the same classes as any config.

    Raises:
        ConfigError: the values do not fit together; the message names the point.
    """
    try:
        return PlannedTrial(index, with_values(job.trial(), point), copied)
    except ConfigError as err:
        raise ConfigError(
            f"search.space can give {shown(point, 500)}: {err.found}", err.valid, err.remedy
        ) from err


def planned_trials(job: JobConfig) -> list[PlannedTrial]:
    """Every trial that can be known beforehand, each validated.

    Of TPE, and of a search with no number of trials, a sample of the space; the first of very many.
    """
    _check_keys(job)
    if job.search.algorithm == "tpe":
        points = [random_point(job, attempt) for attempt in range(NUM_PROBES)]
    else:
        is_known = job.search.algorithm == "grid" or num_trials_of(job) is not None
        points = list(itertools.islice(iter_points(job), MAX_PLANNED if is_known else NUM_PROBES))
    return [trial_at(job, index, point) for index, point in enumerate(points)]


def _draw(rng: random.Random, entry: Distribution) -> Any:
    if entry.kind == "choice":
        return entry.values[rng.randrange(len(entry.values))]
    low, high = entry.values
    if entry.kind == "randint":
        return rng.randint(low, high)
    if entry.kind == "loguniform":
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    return rng.uniform(low, high)


def _grid_points(job: JobConfig) -> Iterator[Point]:
    """Every combination: an odometer over the choices that `build_point` asks for.

    Which keys a point has depends on its earlier values, so the odometer is read as it turns: the
    last place that can still move moves on, and the places after it are asked anew.
    """
    places: list[int] = []
    distinct: dict[str, list[Any]] = {}  # of each distribution, its values
    keys = _ordered_keys(job)
    while True:
        sizes: list[int] = []

        def ask(name: str, entry: Distribution, sizes: list[int] = sizes) -> Any:
            if name not in distinct:
                distinct[name] = list({canonical_json(v): v for v in entry.values}.values())
            if len(sizes) == len(places):
                places.append(0)
            sizes.append(len(distinct[name]))
            return distinct[name][places[len(sizes) - 1]]

        yield build_point(job, ask, keys)
        while places and places[-1] + 1 == sizes[len(places) - 1]:
            places.pop()
        if not places:
            return
        places[-1] += 1


def _holds(when: Mapping[str, Any], point: Point, base: TrialConfig) -> bool:
    for key, wanted in when.items():
        value = point[key] if key in point else get_value(base, key)
        if value not in _listed(wanted):
            return False
    return True


def _ordered_keys(job: JobConfig) -> list[str]:
    """The keys of the space, each after those its conditions look at.

    Raises:
        ConfigError: conditions look at each other in a circle.
    """
    space = job.search.space
    ordered: dict[str, None] = {}

    def place(key: str, behind: tuple[str, ...]) -> None:
        if key in ordered:
            return
        if key in behind:
            raise ConfigError(
                f"search.space: conditions go in a circle: {' -> '.join([*behind, key])}"
            )
        for entry in space[key]:
            for other in entry.when:
                if other in space:
                    place(other, (*behind, key))
        ordered.setdefault(key)

    for key in space:
        place(key, ())
    return list(ordered)


def _check_keys(job: JobConfig) -> None:
    base = job.trial()
    for key, entries in job.search.space.items():
        conditions = [pair for entry in entries for pair in entry.when.items()]
        _check_key(base, key)
        for other, _ in conditions:
            _check_exists(base, other)
        if not all(entry.when for entry in entries[:-1]):
            raise ConfigError(
                f"search.space: '{key}' has a distribution without `when` before others, which "
                "are never used",
                "the one without `when` last",
            )
        for entry in entries:
            if entry.kind in ("choice", "grid", "randint"):
                _check_values(job, key, entry.values, f"'{key}' can be")
        for other, wanted in conditions:
            _check_condition(job, key, other, wanted)
    for point in job.search.points:
        for key in point:
            _check_key(base, key)
    _ordered_keys(job)


def _check_key(base: TrialConfig, key: str) -> None:
    """A key that trials of a search can differ in."""
    if key.startswith(SHARED_BY_ALL_TRIALS) and key != "data.image_size":
        raise ConfigError(
            f"search.space: '{key}' is the same for all trials of a search, so that they "
            "can be compared",
            "keys of backbone, freeze, head, optim, train, augment, and data.image_size",
        )
    _check_exists(base, key)


def _check_exists(base: TrialConfig, key: str) -> None:
    try:
        get_value(base, key)
    except ConfigError as err:
        raise ConfigError(f"search.space: {err.found}", err.valid, err.remedy) from err
    if "." not in key:
        raise ConfigError(f"search.space: '{key}' is a section", f"a key in it, as '{key}.KEY'")


def _check_values(job: JobConfig, key: str, values: Sequence[Any], saying: str) -> None:
    """Values that a key cannot have, or would have as others, are a mistake."""
    section, _, field = key.partition(".")
    kind = type(getattr(job, section)).model_fields[field].rebuild_annotation()
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    for value in values:
        found = f"search.space: {saying} {shown(value)}, which {key} cannot be"
        try:
            taken = adapter.validate_python(value)
        except ValidationError as err:
            valid = str(err.errors()[0]["msg"]).removeprefix("Input should be ").replace("'", "")
            raise ConfigError(found, valid) from err
        if _plain(taken) != _plain(value):
            raise ConfigError(found, shown(taken))


def _check_condition(job: JobConfig, key: str, other: str, wanted: Any) -> None:
    """A condition that no trial can meet is a mistake, mostly of spelling."""
    if not _listed(wanted):
        raise ConfigError(f"search.space: '{key}' is searched when {other} is none of no values")
    _check_values(job, other, _listed(wanted), f"'{key}' is searched when {other} is")
    entries = job.search.space.get(other, ())
    if not entries or any(entry.kind not in ("choice", "grid") for entry in entries):
        return
    choices = [choice for entry in entries for choice in entry.values]
    for value in _listed(wanted):
        if value not in choices:
            raise ConfigError(
                f"search.space: '{key}' is searched when {other} is {shown(value)}, which is not "
                "among its values",
                ", ".join(shown(choice) for choice in choices[:20]),
            )


def _listed(wanted: Any) -> tuple[Any, ...]:
    return tuple(wanted) if isinstance(wanted, list | tuple) else (wanted,)
