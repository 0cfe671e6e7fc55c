import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.report.rundir import RunDir
from tlrunner.report.summary import Judging, leaderboard, leaderboard_csv, summarise
from tlrunner.train.trial_dir import EpochReport, TrialRecord

WriteTrial = Callable[..., TrialConfig]


@pytest.fixture
def run(tmp_path: Path, write_trial: WriteTrial) -> RunDir:
    """Five trials, of which 0001 is the best."""
    run = RunDir(tmp_path / "mine", "0123456789ab")
    write_trial(run.trials / "0000-a", [0.25, 0.5])
    write_trial(run.trials / "0001-b", [0.75, 0.5])
    write_trial(run.trials / "0002-c", [0.5], "stopped")
    write_trial(run.trials / "0003-d", [], "diverged", detail="non-finite loss at step 3")
    write_trial(run.trials / "0004-e", [0.1], "failed", detail='OSError: "disk", full\nvery')
    return run


def test_the_leaderboard_has_a_row_a_trial_with_its_best_epoch(run: RunDir) -> None:
    rows = leaderboard(run.records())
    assert [row["trial_id"][:4] for row in rows] == ["0001", "0000", "0002", "0004", "0003"]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    best = rows[0]
    assert (best["val_acc"], best["epoch"], best["epochs_run"]) == (0.75, 1, 2)
    assert best["seconds"] == 3.0, "of the whole trial"
    assert (best["backbone.name"], best["optim.momentum"]) == ("squeezenet1_1", None)
    assert rows[-1]["val_acc"] is None
    assert rows[-1]["detail"] == "non-finite loss at step 3"


def test_the_csv_reads_back_whatever_a_trial_says(run: RunDir) -> None:
    rows = leaderboard(run.records())
    read = list(csv.DictReader(io.StringIO(leaderboard_csv(rows), newline="")))
    assert [row["detail"] for row in read] == [row["detail"] for row in rows]
    assert [row["val_acc"] for row in read] == ["0.75", "0.5", "0.5", "0.1", ""]
    assert all(None not in row and None not in row.values() for row in read)


def test_the_leaderboard_of_no_trials_is_a_table_all_the_same() -> None:
    assert leaderboard_csv(leaderboard([])).splitlines() == ["rank"]


def test_the_summary_counts_trials_by_how_they_ended(run: RunDir) -> None:
    summary = summarise(run, run.records(), "partial", wall_seconds=12.5)
    assert (summary["status"], summary["run"]) == ("partial", "mine")
    assert summary["config_hash"] == "0123456789ab"
    assert summary["trials"] == {
        "total": 5,
        "completed": 2,
        "stopped": 1,
        "diverged": 1,
        "failed": 1,
    }
    assert summary["wall_seconds"] == 12.5
    assert summary["compute_seconds"] == 3.0 + 3.0 + 1.5 + 1.5
    assert "torch" in summary["versions"]


def test_the_best_trial_comes_with_the_config_that_repeats_it(
    run: RunDir, tiny_trial: TrialConfig
) -> None:
    best = summarise(run, run.records(), "ok", 0.0)["best"]
    assert set(best) == {
        "trial_id",
        "config",
        "val_acc",
        "val_loss",
        "epoch",
        "trainable_params",
        "total_params",
        "latency_seconds",
        "seconds",
    }
    assert (best["trial_id"], best["val_acc"], best["epoch"]) == ("0001-b", 0.75, 1)
    assert TrialConfig.model_validate(json.loads(json.dumps(best["config"]))) == tiny_trial


@pytest.mark.parametrize("state", ["diverged", "failed"])
def test_without_a_finished_epoch_there_is_no_best(
    tmp_path: Path, write_trial: WriteTrial, state: str
) -> None:
    run = RunDir(tmp_path, "")
    write_trial(run.trials / "0000-a", [], state)
    assert summarise(run, run.records(), "failed", 0.0)["best"] is None
    assert summarise(run, [], "failed", 0.0)["best"] is None


@given(st.text(max_size=40))
def test_any_text_survives_the_csv(
    tmp_path_factory: pytest.TempPathFactory,
    write_trial: WriteTrial,
    tiny_trial: TrialConfig,
    text: str,
) -> None:
    run = RunDir(tmp_path_factory.mktemp("run"), "")
    config = with_values(tiny_trial, {"backbone.weights": f"weights {text}"})
    write_trial(run.trials / "0000-a", [0.5], "failed", detail=text, config=config)
    rows = leaderboard(run.records())
    storable = text.replace("\0", "\N{REPLACEMENT CHARACTER}")  # Python 3.10 reads no NUL back
    read = next(csv.DictReader(io.StringIO(leaderboard_csv(rows), newline="")))
    assert (read["detail"], read["backbone.weights"]) == (storable, f"weights {storable}")


# -- Repeats and trade-offs ------------------------------------------------------------------------


@pytest.fixture
def repeated(tmp_path: Path, write_trial: WriteTrial, tiny_trial: TrialConfig) -> RunDir:
    """Trial 0000 was found best, and does worse with other seeds than 0001; 0002 has one repeat."""
    run = RunDir(tmp_path / "mine", "")

    def write(trial_id: str, val_acc: float, seed: int) -> None:
        config = with_values(tiny_trial, {"train.seed": seed})
        write_trial(run.trials / trial_id, [0.1, val_acc], config=config)

    write("0000-a0", 1.0, 0)
    write("0000-a1", 0.5, 1)
    write("0000-a2", 0.25, 2)
    write("0001-b0", 0.5, 0)
    write("0001-b1", 0.75, 1)
    write("0001-b2", 0.5, 2)
    write("0002-c0", 0.5, 0)
    write("0002-c1", 0.875, 1)
    return run


def test_the_best_mean_over_other_seeds_wins(repeated: RunDir) -> None:
    judging = Judging(first_seed=0)
    records = judging.ranked(repeated.records())
    assert records[0].trial_id == "0001-b1", "its best repeat"
    summary = summarise(repeated, records, "ok", 0.0, judging)
    repeats = summary["best"]["repeats"]
    assert (repeats["num_repeats"], repeats["mean_val_acc"]) == (2, 0.625)
    assert repeats["std_val_acc"] == pytest.approx(0.125 * 2**0.5)
    rows = {row["trial_id"]: row for row in leaderboard(records, judging)}
    assert rows["0001-b1"]["rank"] == 1
    assert rows["0000-a0"]["mean_val_acc"] == 0.375
    assert (rows["0002-c1"]["num_repeats"], rows["0002-c1"]["std_val_acc"]) == (1, None)


def test_without_repeats_the_most_accurate_wins(repeated: RunDir) -> None:
    records = Judging().ranked(repeated.records())
    assert records[0].trial_id == "0000-a0"
    assert "repeats" not in summarise(repeated, records, "ok", 0.0)["best"]
    assert "num_repeats" not in leaderboard(records)[0]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8, unique=True)
)
def test_the_pareto_front_is_what_nothing_beats(figures: list[tuple[int, int]]) -> None:
    records = [
        TrialRecord(
            f"{number:04d}-a",
            TrialConfig(),
            (EpochReport(1, acc / 4, 1.0, 1.0, 1.0, 1, params, 0.1, 1.0, None),),
            "completed",
            "",
        )
        for number, (acc, params) in enumerate(figures)
    ]
    front = Judging(trade_off="total_params").pareto(records)
    for record, (acc, params) in zip(records, figures, strict=True):
        beaten = any(a >= acc and p <= params and (a, p) != (acc, params) for a, p in figures)
        assert (record.trial_id in front) != beaten
    rows = leaderboard(records, Judging(trade_off="total_params"))
    assert {row["trial_id"] for row in rows if row["pareto"]} == front


def test_what_is_noted_of_a_trial_stands_in_the_leaderboard(
    tmp_path: Path, write_trial: WriteTrial
) -> None:
    run = RunDir(tmp_path, "")
    write_trial(run.trials / "0000-a", [0.5], "stopped", detail="gave way")
    run.trial("0000-a").note("statistics are of each worker")
    assert leaderboard(run.records())[0]["detail"] == "statistics are of each worker; gave way"
    assert summarise(run, run.records(), "ok", 0.0)["best"]["notes"] == [
        "statistics are of each worker"
    ]
