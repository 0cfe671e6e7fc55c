"""Population based training and HyperBand, which pause and copy trials: slow, they start Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from clusters import nodes_of
from safetensors.torch import load_file

from tlrunner.cli import run_job
from tlrunner.jobconfig import JobConfig
from tlrunner.train.attempts import read_attempts
from tlrunner.train.trial_dir import TrialDir, TrialRecord

pytestmark = pytest.mark.slow

JOB = Path(__file__).resolve().parents[2] / "jobs" / "tune_flowers.py"

# Weights that differ from trial to trial, and stay as they are: a step of this size changes no bit.
STILL = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 1e-30}
POPULATION = {
    "scheduler": "pbt",
    "perturbation_epochs": 3,
    "budget": {"num_trials": 4},
    "space": {
        "train.seed": {"randint": [0, 1_000_000]},
        "train.label_smoothing": {"uniform": [0.0, 0.2]},
    },
}


def run_of(tree: dict[str, Any], tmp_path: Path, **sections: Any) -> list[TrialDir]:
    """The trials of a search."""
    file = tmp_path / "job.json"
    file.write_text(json.dumps({**tree, **sections}))
    flags = ["--config", str(file), "--out", str(tmp_path / "runs"), "--name", "one"]
    assert run_job("tune", JobConfig, "tlrunner.run:tune", argv=flags) == 0
    return [TrialDir(path) for path in sorted((tmp_path / "runs/one/trials").iterdir())]


def weights_of(trial: TrialDir) -> str:
    """SHA-256 of a trial's weight matrices; biases start at zero, which any step changes."""
    best = trial.read().best
    assert best is not None
    tensors = load_file(trial.best_checkpoint(best) / "trainable.safetensors")
    matrices = (tensors[name] for name in sorted(tensors) if tensors[name].ndim > 1)
    return sha256(b"".join(tensor.numpy().tobytes() for tensor in matrices)).hexdigest()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_worst_of_a_population_goes_on_from_the_weights_of_one_of_the_best(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    # All at once where that is quick; else two in turns, as workers take long to start together.
    size, num_cpus = (4, 4) if num_workers == 1 else (2, 2)
    with nodes_of(num_cpus) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        trials = run_of(
            tiny_tree,
            tmp_path,
            optim=STILL,
            train={"epochs": 6, "batch_size": 9},
            search={**POPULATION, "budget": {"num_trials": size}},
            resources={"workers_per_trial": num_workers, "gpus_per_worker": 0},
        )
    records: dict[str, TrialRecord] = {trial.path.name: trial.read() for trial in trials}
    by_name = {trial.path.name: trial for trial in trials}
    (copy,) = [name for name in records if name.endswith("-e3")]
    (note,) = [note for note in records[copy].notes if note.startswith("goes on from")]
    (donor,) = [name for name in records if f" {name} " in note]
    (replaced,) = [n for n, r in records.items() if r.index == records[copy].index and n != copy]

    assert weights_of(by_name[copy]) == weights_of(by_name[donor]) != weights_of(by_name[replaced])
    assert [report.epoch for report in records[copy].epochs] == [4, 5, 6]
    assert [report.epoch for report in records[replaced].epochs] == [1, 2, 3]
    assert records[replaced].state == "stopped"
    assert records[replaced].detail == f"gave way to a copy of {donor} after epoch 3"
    assert all(records[name].state == "completed" for name in records if name != replaced)
    # Weights come with what cannot change in a running trial, and with new values of the rest.
    ours, theirs = records[copy].config, records[donor].config
    assert ours.train.seed == theirs.train.seed
    assert ours.train.label_smoothing != theirs.train.label_smoothing
    # What trials went on from is gone; of each the best is kept.
    assert all(len(list(trial.checkpoints.iterdir())) == 1 for trial in trials)


def test_hyperband_pauses_trials_and_goes_on_where_they_were(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    trials = run_of(
        tiny_tree,
        tmp_path,
        train={"epochs": 6, "batch_size": 8},
        search={
            "scheduler": "hyperband",
            "budget": {"num_trials": 8},
            "space": {"optim.lr": {"loguniform": [1e-5, 1e-2]}},
        },
    )
    records = [trial.read() for trial in trials]
    assert {record.state for record in records} == {"completed", "stopped"}
    for record in records:
        epochs = [report.epoch for report in record.epochs]
        assert epochs == list(range(1, len(epochs) + 1)), "each epoch once, in order"
        assert len(epochs) == 6 or record.state == "stopped"


def test_a_population_that_is_broken_off_goes_on(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    train = {"epochs": 8, "batch_size": 9}
    file.write_text(json.dumps({**tiny_tree, "train": train, "search": POPULATION}))
    flags = ["--config", str(file), "--out", str(tmp_path / "runs"), "--name", "one"]
    command = [sys.executable, str(JOB), *flags]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    begun = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    population = tmp_path / "runs" / "one" / "population.json"
    deadline = time.monotonic() + 120
    while not (population.exists() and '"copied": [' in population.read_text()):
        assert time.monotonic() < deadline and begun.poll() is None
        time.sleep(0.1)
    begun.send_signal(signal.SIGTERM)
    assert begun.wait(60) == 75
    members = json.loads(population.read_text())

    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    trials = [TrialDir(path) for path in sorted((tmp_path / "runs/one/trials").iterdir())]
    records = {trial.path.name: trial.read() for trial in trials}
    assert sum(record.state == "completed" for record in records.values()) == 4
    assert {member["index"] for member in json.loads(population.read_text())} == {0, 1, 2, 3}
    for member in members:
        of_member = [r for r in records.values() if r.index == member["index"]]
        told = {report.epoch for record in of_member for report in record.epochs}
        assert told == set(range(1, 9)), "a member has all epochs, whichever trial it was"
        if member["copied"]:
            assert any(r.trial_id.endswith(f"-e{member['copied'][1]}") for r in of_member)
    starts = [
        attempt.step
        for trial in trials
        for attempt in read_attempts(trial.place)
        if attempt.event == "started"
    ]
    assert sum(step > 0 for step in starts) > 1, "what was broken off went on"
