"""The end of a run: from the directories of its trials to `_SUCCESS`.

Nothing is called done before it was read back: every file is hashed as it should be, written, read
from the disk again, and compared; `_SUCCESS` lists those hashes and is written last.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from tlrunner.data.manifest import Manifest
from tlrunner.errors import StorageError
from tlrunner.files import sha256_text, write_json, write_text, write_with
from tlrunner.report.page import render_page
from tlrunner.report.rundir import SUCCESS, RunDir
from tlrunner.report.summary import Status, leaderboard, leaderboard_csv, summarise
from tlrunner.train.checkpoint import describe_file, verify_commit
from tlrunner.train.export import export_model
from tlrunner.train.trial_dir import TrialDir


def finish_run(
    run: RunDir, images: Manifest, wall_seconds: float, *, interrupted: bool = False
) -> dict[str, Any]:
    """Write best/, leaderboard.csv, report.html and summary.json, then `_SUCCESS` if all is well.

    Gives the summary. An interrupted run gets no best/ and no `_SUCCESS`: it is to be continued.

    Raises:
        StorageError: something could not be written, or did not read back as written.
    """
    records = run.records()
    has_best = bool(records and records[0].best)
    any_failed = any(record.state == "failed" for record in records)
    status: Status = "partial" if any_failed else "ok"
    if not has_best:
        status = "failed"
    if interrupted:
        status = "interrupted"
    elif has_best:
        best = run.path / "best"
        shutil.rmtree(best, ignore_errors=True)
        export_model(records[0], TrialDir(run.trials / records[0].trial_id), images, best)
        verify_commit(best)
    rows = leaderboard(records)
    summary = summarise(run, records, status, wall_seconds)
    texts = {
        "leaderboard.csv": leaderboard_csv(rows),
        "report.html": render_page(summary, rows, records),
        "summary.json": json.dumps(summary, indent=2, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        write_text(run.path / name, text)
        if describe_file(run.path / name)["sha256"] != sha256_text(text):
            raise StorageError(f"{run.path / name} does not read back as it was written")
    if status == "ok":
        vouched = [*texts, "best/COMMIT.json", "run.json"]
        write_json(run.path / SUCCESS, {name: describe_file(run.path / name) for name in vouched})
    return summary


def exit_code(summary: dict[str, Any]) -> int:
    """0 all ended well, 2 some trials failed, 3 none is usable, 75 interrupted."""
    return {"ok": 0, "partial": 2, "failed": 3, "interrupted": 75}[str(summary["status"])]


def copy_bad_images(shards: Path, run: RunDir) -> None:
    """The list of unusable images stands in the run's directory too, where people look."""
    listing = shards / "bad_images.parquet"
    if listing.exists():
        write_with(run.path / listing.name, lambda copy: shutil.copyfile(listing, copy))
