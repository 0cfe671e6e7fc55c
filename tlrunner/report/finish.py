"""The end of a run: from the directories of its trials to `_SUCCESS`.

Nothing is called done before it was read back: every file is hashed as it should be, written, read
from the disk again, and compared; `_SUCCESS` lists those hashes and is written last.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tlrunner.data.dataset import Dataset
from tlrunner.data.fetch import open_store
from tlrunner.data.manifest import Manifest
from tlrunner.data.store import check_name
from tlrunner.data.write import BAD_NAME
from tlrunner.files import sha256_text, write_json, write_text, write_with
from tlrunner.report.page import render_page
from tlrunner.report.rundir import SUCCESS, RunDir
from tlrunner.report.summary import Judging, Status, leaderboard, leaderboard_csv, summarise
from tlrunner.train.checkpoint import COMMIT, Fact, committed, describe_file, verify_commit
from tlrunner.train.export import export_model
from tlrunner.tune.rank import RANK


def finish_run(
    run: RunDir,
    images: Manifest,
    wall_seconds: float,
    judging: Judging = Judging(),  # noqa: B008  (it is frozen)
    *,
    interrupted: bool = False,
) -> dict[str, Any]:
    """Write best/, leaderboard.csv, report.html and summary.json, then `_SUCCESS` if all is well.

    Gives the summary. An interrupted run gets no best/ and no `_SUCCESS`: it is to be continued.

    Raises:
        StorageError: something could not be written, or did not read back as written.
        InterruptedRun: another process has taken over the run.
    """
    records = judging.ranked(run.records())
    has_best = bool(records and records[0].best)
    any_failed = any(record.state == "failed" for record in records)
    status: Status = "partial" if any_failed else "ok"
    if not has_best:
        status = "failed"
    if interrupted:
        status = "interrupted"
    elif has_best:
        best = run.path / "best"
        run.check_held()
        run.place.remove(best, first=COMMIT)
        run.trial(records[0].trial_id).place.fetch()
        export_model(records[0], run.trial(records[0].trial_id), images, best)
        verify_commit(best)
        run.check_held()
        run.place.save_directory(best, last=COMMIT)
    rows = leaderboard(records, judging)
    summary = summarise(run, records, status, wall_seconds, judging)
    texts = {
        "leaderboard.csv": leaderboard_csv(rows),
        "report.html": render_page(summary, rows, records),
        "summary.json": json.dumps(summary, indent=2, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        run.check_held()
        write_text(run.path / name, text)
        run.place.save(run.path / name)
        run.place.check(name, sha256_text(text))
    if status == "ok":
        given = [name for name in ("run.json", RANK) if (run.path / name).exists()]
        _succeed(run, [*texts, f"best/{COMMIT}"], given)
    return summary


def _succeed(run: RunDir, made: list[str], given: list[str]) -> None:
    """Vouch for what was made and read back just now, and for what there was."""
    facts = {name: describe_file(run.path / name) for name in (*made, *given)}
    if run.uri:  # what is local was hashed as it was read just now
        copied = {name: facts[name] for name in given} | _of_best(committed(run.path / "best"))
        for name, fact in copied.items():
            run.place.check(name, fact.sha256)
    run.check_held()
    write_json(run.path / SUCCESS, {name: asdict(fact) for name, fact in facts.items()})
    run.place.save(run.path / SUCCESS)


def _of_best(facts: Mapping[str, Fact]) -> dict[str, Fact]:
    return {f"best/{name}": fact for name, fact in facts.items()}


def check_finished(run: RunDir) -> None:
    """Check that a finished run is what `_SUCCESS` vouched for.

    Raises:
        StorageError: a file is not what it was then.
    """
    vouched = run.place.read(dict[str, Fact], SUCCESS) or {}
    model = run.place.read(dict[str, Fact], f"best/{COMMIT}") or {}
    for name, fact in (vouched | _of_best(model)).items():
        check_name(name, str(run.place))
        run.place.check(name, fact.sha256)


def exit_code(summary: dict[str, Any]) -> int:
    """0 all ended well, 2 some trials failed, 3 none is usable, 75 interrupted."""
    return {"ok": 0, "partial": 2, "failed": 3, "interrupted": 75}[str(summary["status"])]


def copy_bad_images(images: Dataset, run: RunDir) -> None:
    """The list of unusable images stands in the run's directory too, where people look."""
    if not images.manifest.num_bad:
        return
    try:
        listing = open_store(images.uri).read(BAD_NAME)
    except FileNotFoundError:
        return
    write_with(run.path / BAD_NAME, lambda copy: copy.write_bytes(listing))
    run.place.save(run.path / BAD_NAME)
