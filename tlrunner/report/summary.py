"""leaderboard.csv and summary.json: a run in one table and in one object."""

import csv
import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pydantic import BaseModel

from tlrunner.config import TrialConfig
from tlrunner.errors import StorageError
from tlrunner.report.rundir import RunDir, installed_versions
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import State, TrialRecord

Status = Literal["ok", "partial", "failed", "interrupted"]
STATES: tuple[State, ...] = ("completed", "stopped", "diverged", "failed")
SECTIONS = ("backbone", "freeze", "head", "optim", "train", "augment")


@dataclass(frozen=True)
class Spread:
    """Accuracy of one configuration over seeds that it was not chosen for."""

    num_repeats: int
    mean_val_acc: float
    std_val_acc: float | None  # of a sample; None of a single one

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        spread = statistics.stdev(values) if len(values) > 1 else None
        return cls(len(values), statistics.mean(values), spread)


@dataclass(frozen=True)
class Judging:
    """How trials are compared, beside the accuracy of each.

    `first_seed`: where configurations were repeated, the seed of the trials that are no repeats.
    `trade_off`: the figure that accuracy is weighed against.
    """

    first_seed: int | None = None
    trade_off: str | None = None

    def spreads(self, records: Sequence[TrialRecord]) -> dict[int, Spread]:
        """By the number of the configuration, of those that were repeated."""
        accuracies: dict[int, list[float]] = defaultdict(list)
        for record in records:
            if record.state == "completed" and record.best and self._is_repeat(record):
                accuracies[record.index].append(record.best.val_acc)
        return {index: Spread.of(values) for index, values in accuracies.items()}

    def ranked(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """The winner first: of the configuration with the best mean, its best repeat."""
        spreads = self.spreads(records)
        if not spreads:
            return list(records)
        most = max(spread.num_repeats for spread in spreads.values())
        # One that the budget left with fewer seeds than others was not tried as they were.
        index = max(
            (index for index, spread in spreads.items() if spread.num_repeats == most),
            key=lambda index: spreads[index].mean_val_acc,
        )
        winner = next(r for r in records if r.index == index and self._is_repeat(r))
        return [winner, *(record for record in records if record is not winner)]

    def pareto(self, records: Sequence[TrialRecord]) -> set[str]:
        """Ids of the trials that no other beats in one of the two figures and equals in both."""
        figures = {
            r.trial_id: (-r.best.val_acc, float(getattr(r.best, self.trade_off)))
            for r in records
            if r.best and self.trade_off
        }
        return {
            trial_id
            for trial_id, (error, cost) in figures.items()
            if not any(
                e <= error and c <= cost and (e, c) != (error, cost) for e, c in figures.values()
            )
        }

    def _is_repeat(self, record: TrialRecord) -> bool:
        return self.first_seed is not None and record.config.train.seed != self.first_seed


SPREAD_COLUMNS = tuple(field.name for field in fields(Spread))


def leaderboard(
    records: Sequence[TrialRecord],
    judging: Judging = Judging(),
) -> list[dict[str, Any]]:
    """One row a trial, in the order given, with its best epoch and its config flattened."""
    rows = []
    spreads, pareto = judging.spreads(records), judging.pareto(records)
    for rank, record in enumerate(records, start=1):
        best = record.best
        rows.append(
            {
                "rank": rank,
                "trial_id": record.trial_id,
                "state": record.state,
                "val_acc": best.val_acc if best else None,
                "val_loss": best.val_loss if best else None,
                "epoch": best.epoch if best else None,
                "epochs_run": len(record.epochs),
                **({"pareto": record.trial_id in pareto} if judging.trade_off else {}),
                **_spread_columns(spreads, record.index),
                "trainable_params": best.trainable_params if best else None,
                "total_params": best.total_params if best else None,
                "latency_seconds": best.latency_seconds if best else None,
                "seconds": record.epochs[-1].seconds if record.epochs else None,
                **_flat_config(record),
                "detail": "; ".join(text for text in (*record.notes, record.detail) if text),
            }
        )
    return rows


def _spread_columns(spreads: Mapping[int, Spread], index: int) -> dict[str, Any]:
    if not spreads:
        return {}
    return asdict(spreads[index]) if index in spreads else dict.fromkeys(SPREAD_COLUMNS)


def leaderboard_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["rank"])
    writer.writeheader()
    writer.writerows({key: _storable(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _storable(value: Any) -> Any:
    """Python 3.10 cannot read a NUL back."""
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}") if isinstance(value, str) else value


def summarise(
    run: RunDir,
    records: Sequence[TrialRecord],
    status: Status,
    wall_seconds: float,
    judging: Judging = Judging(),
) -> dict[str, Any]:
    """The object that summary.json holds; `best` is None if no trial has a usable epoch."""
    states = Counter(record.state for record in records)
    best = records[0] if records and records[0].best else None
    return {
        "status": status,
        "run": run.path.name,
        "config_hash": run.config_hash,
        "trials": {"total": len(records), **{state: states[state] for state in STATES}},
        "best": _summarise_best(best, judging.spreads(records)) if best else None,
        "wall_seconds": wall_seconds,
        "compute_seconds": sum(r.epochs[-1].seconds for r in records if r.epochs),
        "reuse": _summarise_reuse(records),
        "versions": installed_versions(),
    }


class _Best(BaseModel):
    trial_id: str
    config: TrialConfig
    val_acc: float
    epoch: int
    repeats: Spread | None = None


class _Summary(BaseModel):
    """`summary.json`, as far as it is told once more."""

    status: Status
    trials: dict[str, int]
    best: _Best | None
    wall_seconds: float


def read_summary(run: Place) -> dict[str, Any]:
    """What `show_summary` tells of a run that is finished.

    Raises:
        StorageError: summary.json is absent, or not what a run writes.
    """
    summary = run.read(_Summary, "summary.json")
    if summary is None:
        raise StorageError(f"{run} holds no summary.json", "", "remove its _SUCCESS to end it anew")
    return summary.model_dump()


def _summarise_reuse(records: Sequence[TrialRecord]) -> dict[str, float]:
    """Of frozen stages: seconds of computing what is kept, seconds that reading it saved."""
    last = [record.epochs[-1] for record in records if record.epochs]
    return {
        "fill_seconds": sum(report.fill_seconds for report in last),
        "saved_seconds": sum(report.saved_seconds for report in last),
        "largest_file_bytes": max((report.reused_bytes for report in last), default=0),
    }


def _summarise_best(record: TrialRecord, spreads: Mapping[int, Spread]) -> dict[str, Any]:
    best = record.best
    assert best is not None, "a best trial has a best epoch"
    return {
        "trial_id": record.trial_id,
        "config": record.config.model_dump(mode="json"),
        "val_acc": best.val_acc,
        "val_loss": best.val_loss,
        "epoch": best.epoch,
        "trainable_params": best.trainable_params,
        "total_params": best.total_params,
        "latency_seconds": best.latency_seconds,
        "seconds": record.epochs[-1].seconds,
        **({"notes": list(record.notes)} if record.notes else {}),
        **({"repeats": asdict(spreads[record.index])} if record.index in spreads else {}),
    }


def _flat_config(record: TrialRecord) -> dict[str, Any]:
    tree = record.config.model_dump(mode="json", include=set(SECTIONS))
    searched = {
        f"{section}.{key}": value for section in SECTIONS for key, value in tree[section].items()
    }
    return {"data.image_size": record.config.data.image_size, **searched}
