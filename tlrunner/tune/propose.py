"""Which trial is next: points in order, or as Optuna suggests them from what came before.

Ray Tune asks a `Proposer` for each trial when there is room for one; the points come from a
`Points`, which is told how each of them ended.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import optuna
from ray.tune.search import Searcher

from tlrunner.jobconfig import JobConfig
from tlrunner.searchconfig import Distribution
from tlrunner.train.trial_dir import TrialRecord
from tlrunner.tune.space import Point, can_be, located, num_trials_of, suggest_point


class Points(Protocol):
    """Where the points of a search come from."""

    def ask(self) -> tuple[int, Point] | None:
        """The next point and its number; None when there are no more."""

    def tell(self, index: int, read: Callable[[], TrialRecord | None]) -> None:
        """That a trial ended; `read` gives its record, or None if it never began."""


class ListedPoints:
    """Those that are given, in order."""

    def __init__(self, points: Iterable[tuple[int, Point]]) -> None:
        self.points = iter(points)

    def ask(self) -> tuple[int, Point] | None:
        return next(self.points, None)

    def tell(self, index: int, read: Callable[[], TrialRecord | None]) -> None:
        """They do not depend on it."""


class Asked:
    """Other points, and which of them were asked for."""

    def __init__(self, others: Points) -> None:
        self.others = others
        self.points: list[tuple[int, Point]] = []

    def ask(self) -> tuple[int, Point] | None:
        asked = self.others.ask()
        if asked:
            self.points.append(asked)
        return asked

    def tell(self, index: int, read: Callable[[], TrialRecord | None]) -> None:
        self.others.tell(index, read)


class OptunaPoints:
    """A tree-structured Parzen estimator (Bergstra et al., 2011), over one objective or two."""

    def __init__(
        self,
        job: JobConfig,
        own: Sequence[TrialRecord],
        other: Sequence[TrialRecord],
        broken_off: Sequence[TrialRecord] = (),
    ) -> None:
        """`own`: trials of this search that ended before; `other`: those of an earlier run.

        `broken_off`: those of this search that are to go on.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.job = job
        self.directions = ["maximize", *(["minimize"] if job.search.trade_off else [])]
        self.broken_off = list(broken_off)
        begun = [*own, *broken_off]
        self.next_index = max((record.index for record in begun), default=-1) + 1
        self.num_left = (num_trials_of(job) or 10**9) - len(own)
        self.study = optuna.create_study(
            directions=self.directions,
            # What runs beside a point is taken to do badly, so that its neighbours wait for it.
            sampler=optuna.samplers.TPESampler(
                seed=(job.search.seed or 0) + self.next_index, constant_liar=True
            ),
        )
        self.num_learnt = sum(self._learn(record) for record in [*other, *own])
        self.asked: dict[int, optuna.Trial] = {}

    def ask(self) -> tuple[int, Point] | None:
        if self.num_left <= 0:
            return None
        self.num_left -= 1
        if self.broken_off:
            record = self.broken_off.pop(0)
            index, found = record.index, located(self.job, record.config) or {}
            self.study.enqueue_trial({n: _as_param(*of) for n, of in found.items()})
        else:
            index, self.next_index = self.next_index, self.next_index + 1
        self.asked[index] = self.study.ask()
        return index, suggest_point(self.job, self.asked[index])

    def tell(self, index: int, read: Callable[[], TrialRecord | None]) -> None:
        record = read()
        values = objectives(self.job, record) if record else None
        if values is None:
            self.study.tell(self.asked[index], state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(self.asked[index], values)

    def _learn(self, record: TrialRecord) -> bool:
        """Whether a trial lies in the space, and so teaches something of it."""
        values = objectives(self.job, record)
        found = located(self.job, record.config)
        if values is None or found is None:
            return False
        trial = optuna.trial.create_trial(
            params={name: _as_param(entry, value) for name, (entry, value) in found.items()},
            distributions={name: _optuna_distribution(entry) for name, (entry, _) in found.items()},
            values=values,
        )
        self.study.add_trial(trial)
        return True


def objectives(job: JobConfig, record: TrialRecord) -> list[float] | None:
    """Accuracy of a trial's best epoch, and what it is weighed against; None if it has none."""
    if record.best is None:
        return None
    trade_off = job.search.trade_off
    return [record.best.val_acc, *([float(getattr(record.best, trade_off))] if trade_off else [])]


def _as_param(entry: Distribution, value: Any) -> Any:
    """A value as Optuna knows it: a choice by its place."""
    if entry.kind == "choice":
        singles = (entry.model_copy(update={"choice": (choice,)}) for choice in entry.values)
        return [can_be(single, value) for single in singles].index(True)
    return value


def _optuna_distribution(entry: Distribution) -> optuna.distributions.BaseDistribution:
    if entry.kind == "choice":
        return optuna.distributions.CategoricalDistribution(list(range(len(entry.values))))
    low, high = entry.values
    if entry.kind == "randint":
        return optuna.distributions.IntDistribution(low, high)
    return optuna.distributions.FloatDistribution(low, high, log=entry.kind == "loguniform")


class Proposer(Searcher):  # type: ignore[misc]  # ray is not typed
    """Gives Ray the next point while there is room for a trial.

    Args:
        is_over: whether there is to be no other trial. Where none is under way, Ray waits for the
            next one, and looks for nothing else meanwhile.
        has_room: whether one more trial is to be under way now.
        record_of: what Ray's trial of an id left, if it began.
    """

    def __init__(
        self,
        points: Points,
        is_over: Callable[[], bool],
        has_room: Callable[[], bool],
        record_of: Callable[[str], TrialRecord | None],
    ) -> None:
        super().__init__(metric="val_acc", mode="max")
        self.points = points
        self.is_over = is_over
        self.has_room = has_room
        self.record_of = record_of
        self.numbers: dict[str, int] = {}  # Ray's id of a trial -> number of its point

    def suggest(self, trial_id: str) -> Any:
        if self.is_over():
            return Searcher.FINISHED
        if not self.has_room():
            return None
        asked = self.points.ask()
        if asked is None:
            return Searcher.FINISHED
        self.numbers[trial_id] = asked[0]
        return {"trial": {"index": asked[0], "point": asked[1]}}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if trial_id in self.numbers:  # once, whatever Ray makes of the trial then
            self.points.tell(self.numbers.pop(trial_id), partial(self.record_of, trial_id))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # likewise

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is known of a search is in its run directory."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a search is continued from its run directory, never from Ray's files")
