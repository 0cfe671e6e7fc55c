"""Searches on a Ray that they share: slow, as each has processes of its own."""

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import MARK, marked_processes, nodes_of

import tlrunner
from tlrunner.cli import run_job
from tlrunner.files import sha256_file
from tlrunner.jobconfig import JobConfig, TrainJob

pytestmark = pytest.mark.slow

JOB = Path(__file__).resolve().parents[2] / "jobs" / "tune_flowers.py"
SPACE = {
    "freeze.strategy": {"choice": ["head", "last_stages", "full"]},
    "freeze.num_stages": {"randint": [1, 3], "when": {"freeze.strategy": "last_stages"}},
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
}
MANY = 60  # epochs, so that a trial is under way for some seconds
Search = Callable[..., int]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with nodes_of(2) as address:
        yield address


@pytest.fixture(autouse=True)
def _shared_ray(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)


@pytest.fixture
def search(tiny_tree: dict[str, Any], tmp_path: Path) -> Search:
    """`search(name, space, ...)`: a search under a name, which gives its exit code."""

    def run(name: str, space: dict[str, Any] = SPACE, *others: str, **search: Any) -> int:
        argv = [*flags(name, space, **search), *others]
        return run_job("tune", JobConfig, "tlrunner.run:tune", argv=argv)

    def flags(name: str, space: dict[str, Any], **search: Any) -> list[str]:
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({**tiny_tree, "search": {"space": space, **search}}))
        return ["--config", str(file), "--out", str(tmp_path / "runs"), "--name", name]

    run.flags = flags
    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "leaderboard.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    times = ("seconds", "latency_seconds", "fill_seconds", "saved_seconds")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def content_of(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): sha256_file(path) for path in files}


def test_a_ranking_leaves_backbones_out_and_is_done_once(
    search: Search, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["efficientnet_lite0", "efficientnet_lite1"]
    (tmp_path / "rotten.safetensors").write_text("no weights")
    rotten = {"grid": [str(tmp_path / "rotten.safetensors")]}
    space = {
        "backbone.name": {"grid": [*names, "squeezenet1_1"]},
        "backbone.weights": [
            {**rotten, "when": {"backbone.name": "squeezenet1_1"}},
            {"grid": ["default"]},
        ],
        "optim.lr": {"grid": [0.01, 0.02]},
    }
    settings = {"algorithm": "grid", "rank": {"keep": 1, "by": "ridge_accuracy"}}
    flags = ["--set", "freeze.strategy=head"]
    assert search("ranked", space, *flags, **settings) == 0
    ranked = json.loads((runs / "ranked" / "rank.json").read_text())
    assert [row["is_kept"] for row in ranked["backbones"]] == [True, False, False]
    failed = ranked["backbones"].pop()
    assert (failed["name"], "rotten.safetensors" in failed["error"]) == ("squeezenet1_1", True)
    assert {row["name"] for row in ranked["backbones"]} == set(names)
    best = ranked["backbones"][0]
    assert best["ridge_accuracy"] >= ranked["backbones"][1]["ridge_accuracy"]
    rows = rows_of(runs / "ranked")
    assert [row["backbone.name"] for row in rows] == [best["name"]] * 2
    captured = capsys.readouterr()
    assert "kept" in captured.out
    assert "squeezenet1_1 has no scores: " in captured.err

    assert "rank.json" in json.loads((runs / "ranked" / "_SUCCESS").read_text())

    # A continued run has the same backbones, whatever a new ranking would say.
    (runs / "ranked" / "_SUCCESS").unlink()
    shutil.rmtree(runs / "ranked" / "trials" / rows[1]["trial_id"])
    other = [{**row, "is_kept": not row["is_kept"]} for row in ranked["backbones"]]
    file = runs / "ranked" / "rank.json"
    file.write_text(json.dumps({**ranked, "backbones": other}))
    assert search("ranked", space, *flags, **settings) == 0
    backbones = {row["backbone.name"] for row in rows_of(runs / "ranked")}
    assert backbones == set(names), "those of rank.json, beside the trial that was there"


def test_a_search_repeats_itself_is_continued_and_its_winner_trains_alone(
    search: Search, runs: Path, tmp_path: Path
) -> None:
    # What is kept of frozen stages was computed in other batches, and may round in another way.
    off = ["--set", "reuse.mode=off"]
    assert search("one", SPACE, *off, budget={"num_trials": 4}) == 0
    assert search("other", SPACE, *off, budget={"num_trials": 4}, max_concurrent_trials=1) == 0
    one, other = rows_of(runs / "one"), rows_of(runs / "other")
    assert len(one) == 4
    assert {row["state"] for row in one} == {"completed"}
    assert without_seconds(one) == without_seconds(other)
    assert not (runs / "one" / ".ray").exists()

    # The winner, trained alone, gives the same figures.
    best = runs / "one" / "best"
    assert tlrunner.load(best).labels == ("blue", "green", "red")
    flags = ["--config", str(best / "trial.json"), "--out", str(runs), "--name", "alone"]
    assert run_job("train", TrainJob, "tlrunner.run:train", argv=flags) == 0
    won, alone = (summary_of(runs / name)["best"] for name in ("one", "alone"))
    for key in ("config", "val_acc", "val_loss", "epoch", "trainable_params"):
        assert alone[key] == won[key]

    # A trial that is missing is computed again, and no other.
    lost = one[1]["trial_id"]
    shutil.rmtree(runs / "one" / "trials" / lost)
    (runs / "one" / "_SUCCESS").unlink()
    kept = content_of(runs / "one" / "trials")
    assert search("one", SPACE, *off, budget={"num_trials": 4}) == 0
    now = content_of(runs / "one" / "trials")
    assert {name: digest for name, digest in now.items() if lost not in name} == kept
    assert without_seconds(rows_of(runs / "one")) == without_seconds(one)


def test_a_time_budget_ends_a_search_and_every_trial_of_it(search: Search, runs: Path) -> None:
    space = {"train.epochs": {"choice": [10_000]}, "train.seed": {"randint": [0, 9]}}
    assert search("one", space, budget={"num_trials": 3, "wall_seconds": 20}) == 0
    states = [row["state"] for row in rows_of(runs / "one")]
    assert states
    assert set(states) == {"stopped"}
    assert summary_of(runs / "one")["trials"]["stopped"] == len(states)
    assert (runs / "one" / "_SUCCESS").exists()


def test_a_trial_that_fails_is_told_and_the_others_end(
    search: Search, runs: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"these are no weights")
    space = {"backbone.weights": {"grid": ["none", str(broken)]}, "train.seed": {"grid": [0, 1]}}
    assert search("partial", space, algorithm="grid") == 2
    summary = summary_of(runs / "partial")
    assert summary["status"] == "partial"
    assert summary["trials"] == {
        "total": 4,
        "completed": 2,
        "stopped": 0,
        "diverged": 0,
        "failed": 2,
    }
    for row in rows_of(runs / "partial"):
        assert (row["state"] == "failed") == (row["backbone.weights"] == str(broken))
        assert ("broken.safetensors" in row["detail"]) == (row["state"] == "failed")
    assert not (runs / "partial" / "_SUCCESS").exists()
    assert tlrunner.load(runs / "partial" / "best").labels == ("blue", "green", "red")


def test_tpe_asks_for_as_many_trials_as_it_was_given(search: Search, runs: Path) -> None:
    assert search("tpe", algorithm="tpe", budget={"num_trials": 4}, max_concurrent_trials=1) == 0
    rows = rows_of(runs / "tpe")
    assert sorted(row["trial_id"][:4] for row in rows) == ["0000", "0001", "0002", "0003"]
    assert {row["state"] for row in rows} == {"completed"}
    assert len({row["optim.lr"] for row in rows}) == 4


def test_the_best_are_repeated_and_tpe_learns_from_the_run(
    search: Search, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repeats = {"final_repeats": 2, "final_candidates": 2}
    assert search("first", budget={"num_trials": 3}, **repeats) == 0
    summary, rows = summary_of(runs / "first"), rows_of(runs / "first")
    assert summary["trials"]["total"] == 3 + 2 * 2
    repeated = {row["trial_id"][:4] for row in rows if row["num_repeats"]}
    assert len(repeated) == 2
    means = {row["trial_id"][:4]: row["mean_val_acc"] for row in rows if row["num_repeats"]}
    best = summary["best"]
    assert best["repeats"]["mean_val_acc"] == max(float(mean) for mean in means.values())
    assert best["repeats"]["num_repeats"] == 2
    assert best["config"]["train"]["seed"] in (1, 2)
    assert rows[0]["trial_id"] == best["trial_id"]

    # Only the repeats are missing: the same ones are made.
    ids = sorted(row["trial_id"] for row in rows)
    (runs / "first" / "_SUCCESS").unlink()
    for trial in (runs / "first" / "trials").iterdir():
        if json.loads((trial / "config.json").read_text())["train"]["seed"] > 0:
            shutil.rmtree(trial)
    assert search("first", budget={"num_trials": 3}, **repeats) == 0
    assert sorted(row["trial_id"] for row in rows_of(runs / "first")) == ids

    learnt = {"algorithm": "tpe", "warm_start": str(runs / "first"), "trade_off": "total_params"}
    assert search("second", budget={"num_trials": 2}, **learnt) == 0
    assert "TPE learns from 7 of the 7 trials of that run" in capsys.readouterr().out
    assert "True" in {row["pareto"] for row in rows_of(runs / "second")}


def test_a_budget_of_compute_is_spent_and_not_overrun(search: Search, runs: Path) -> None:
    space = {"optim.lr": {"loguniform": [1e-5, 1e-1]}}
    budget = {"cpu_hours": 10 / 3600}
    assert search("spent", space, budget=budget, max_concurrent_trials=1) == 0
    summary = summary_of(runs / "spent")
    assert summary["trials"]["completed"] > 1, "it went on until then"
    assert summary["compute_seconds"] < 10
    assert (runs / "spent" / "_SUCCESS").exists()


def test_halving_stops_the_worst_and_says_so(search: Search, runs: Path) -> None:
    # The tiny rates learn nothing, so each of them is behind the first after an epoch.
    space = {"optim.lr": {"grid": [1e-3, 1e-7, 1e-8, 1e-9]}, "train.epochs": {"grid": [6]}}
    halving = {"scheduler": "asha", "grace_epochs": 1, "reduction_factor": 2}
    assert search("asha", space, algorithm="grid", max_concurrent_trials=1, **halving) == 0
    rows = rows_of(runs / "asha")
    states = [row["state"] for row in rows]
    assert states.count("completed") + states.count("stopped") == 4
    assert "stopped" in states
    assert rows[0]["optim.lr"] == "0.001"
    assert rows[0]["epochs_run"] == "6"
    assert all(int(row["epochs_run"]) < 6 for row in rows if row["state"] == "stopped")


def interrupt(flags: list[str], mark: str, signum: signal.Signals, log: Path) -> int:
    """Start a search in a process of its own and end it in the first epoch of its second trial."""
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, str(JOB), *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, MARK: mark},
        ) as process,
    ):
        for line in process.stdout:
            if f"epoch 1/{MANY}" in line:
                process.send_signal(signum)
                break
        process.stdout.read()
        return process.wait()


def test_an_interrupted_search_leaves_no_process_and_the_same_command_finishes_it(
    search: Search, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")  # so that all processes are its own
    space = {"train.epochs": {"grid": [2, MANY]}}
    flags = search.flags("cut", space, algorithm="grid", max_concurrent_trials=1)
    run, log = runs / "cut", tmp_path / "stderr.txt"
    kept: list[dict[str, str]] = []
    told: list[list[str]] = []  # lines of the trial that was under way
    for signum in (signal.SIGTERM, signal.SIGINT):
        assert interrupt(flags, tmp_path.name, signum, log) == 75, log.read_text()
        assert log.read_text().splitlines()[-1].endswith("continues it")
        patience = time.monotonic() + 60
        while marked_processes(tmp_path.name) and time.monotonic() < patience:
            time.sleep(0.1)
        assert marked_processes(tmp_path.name) == []
        assert summary_of(run)["status"] == "interrupted"
        assert not (run / "_SUCCESS").exists()
        kept.append(content_of(next(run.glob("trials/0000-*"))))
        told.append(next(run.glob("trials/0001-*/metrics.jsonl")).read_text().splitlines())

    assert run_job("tune", JobConfig, "tlrunner.run:tune", argv=flags) == 0
    kept.append(content_of(next(run.glob("trials/0000-*"))))
    assert kept[0] == kept[1] == kept[2], "the first trial ended once"
    told.append(next(run.glob("trials/0001-*/metrics.jsonl")).read_text().splitlines())
    for earlier, later in itertools.pairwise(told):
        assert earlier == later[: len(earlier)], "no epoch ran twice"
    assert told[0]
    assert summary_of(run)["trials"]["completed"] == 2
    assert {row["epochs_run"] for row in rows_of(run)} == {"2", str(MANY)}
