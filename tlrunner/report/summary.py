"""leaderboard.csv and summary.json: a run in one table and in one object."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from tlrunner.report.rundir import RunDir, installed_versions
from tlrunner.train.trial_dir import State, TrialRecord

Status = Literal["ok", "partial", "failed", "interrupted"]
STATES: tuple[State, ...] = ("completed", "stopped", "diverged", "failed")
SECTIONS = ("backbone", "freeze", "head", "optim", "train", "augment")


def leaderboard(records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """One row a trial, in the order given, with its best epoch and its config flattened."""
    rows = []
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
                "trainable_params": best.trainable_params if best else None,
                "seconds": record.epochs[-1].seconds if record.epochs else None,
                **_flat_config(record),
                "detail": record.detail,
            }
        )
    return rows


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
    run: RunDir, records: Sequence[TrialRecord], status: Status, wall_seconds: float
) -> dict[str, Any]:
    """The object that summary.json holds; `best` is None if no trial has a usable epoch."""
    states = Counter(record.state for record in records)
    best = records[0] if records and records[0].best else None
    return {
        "status": status,
        "run": run.path.name,
        "config_hash": run.config_hash,
        "trials": {"total": len(records), **{state: states[state] for state in STATES}},
        "best": _summarise_best(best) if best else None,
        "wall_seconds": wall_seconds,
        "compute_seconds": sum(r.epochs[-1].seconds for r in records if r.epochs),
        "versions": installed_versions(),
    }


def _summarise_best(record: TrialRecord) -> dict[str, Any]:
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
        "seconds": record.epochs[-1].seconds,
    }


def _flat_config(record: TrialRecord) -> dict[str, Any]:
    tree = record.config.model_dump(mode="json", include=set(SECTIONS))
    searched = {
        f"{section}.{key}": value for section in SECTIONS for key, value in tree[section].items()
    }
    return {"data.image_size": record.config.data.image_size, **searched}
