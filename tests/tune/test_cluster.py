"""Trials on clusters of several nodes: slow, each test starts one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from clusters import left_behind, nodes_of
from ray.util import placement_group, remove_placement_group

from tlrunner.train.trial_dir import TrialDir
from tlrunner.tune.abandoned import free_abandoned

pytestmark = pytest.mark.slow

JOB = Path(__file__).resolve().parents[2] / "jobs" / "tune_flowers.py"
Job = Callable[..., subprocess.CompletedProcess[str]]
TWO_WORKERS = {"workers_per_trial": 2, "gpus_per_worker": 0}


@pytest.fixture
def job(tiny_tree: dict[str, Any], tmp_path: Path) -> Job:
    """`job(address, name, section=..., ...)`: the main job in a process of its own."""

    def run(address: str, name: str, **sections: Any) -> subprocess.CompletedProcess[str]:
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({**tiny_tree, **sections}))
        flags = ["--config", str(file), "--out", str(tmp_path / "runs"), "--name", name]
        return subprocess.run(
            [sys.executable, str(JOB), *flags],
            env={**os.environ, "RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return run


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def figures_of(run: Path) -> dict[str, list[tuple[float, float, float]]]:
    """Losses and accuracy of each epoch of each trial."""
    return {
        path.name: [(e.train_loss, e.val_loss, e.val_acc) for e in TrialDir(path).read().epochs]
        for path in (run / "trials").iterdir()
    }


def test_trials_of_several_workers_give_the_figures_of_one_and_leave_nothing_behind(
    job: Job, tmp_path: Path
) -> None:
    space = {"optim.lr": {"choice": [0.001, 0.0005]}}
    search = {"space": space, "budget": {"num_trials": 2}}
    with nodes_of(0, 2, 2) as address:  # the driver is on a head that takes no trials
        one = job(address, "one", search=search)
        assert one.returncode == 0, one.stdout + one.stderr
        # Three workers fit on no single node.
        three = job(
            address, "three", search=search, resources={**TWO_WORKERS, "workers_per_trial": 3}
        )
        assert three.returncode == 0, three.stdout + three.stderr
        assert left_behind(address, num_cpus=4, within_seconds=30) == []
    alone, together = (figures_of(tmp_path / "runs" / name) for name in ("one", "three"))
    assert alone.keys() == together.keys()
    for trial_id, epochs in alone.items():
        for expected, found in zip(epochs, together[trial_id], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def test_trials_that_the_scheduler_stops_give_their_places_back(job: Job, tmp_path: Path) -> None:
    space = {"optim.lr": {"grid": [0.001, 1e-9, 1e-8]}}
    # The first learns by its second epoch. The last, which two at a time leave waiting, comes to
    # its own long after that; of three at once, any might be the last to get workers.
    search = {"algorithm": "grid", "space": space, "max_concurrent_trials": 2}
    search |= {"scheduler": "asha", "grace_epochs": 2}
    train = {"epochs": 7, "batch_size": 8}
    with nodes_of(0, 2, 2) as address:
        ended = job(address, "asha", search=search, resources=TWO_WORKERS, train=train)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert left_behind(address, num_cpus=4, within_seconds=30) == []
    summary = summary_of(tmp_path / "runs" / "asha")
    assert summary["trials"]["stopped"] > 0
    assert summary["trials"]["total"] == 3


def test_a_trial_that_can_never_fit_is_refused_with_what_the_cluster_has(
    job: Job, tmp_path: Path
) -> None:
    with nodes_of(1, 2) as address:
        ended = job(
            address, "large", search={}, resources={"workers_per_trial": 4, "gpus_per_worker": 0}
        )
        fit = subprocess.run(
            [
                *(Path(sys.executable).with_name("tlrunner"), "doctor", "--cluster"),
                *("--out", tmp_path / "new"),
            ],
            env={**os.environ, "RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            check=False,
        )
    assert ended.returncode == 69
    (line,) = ended.stderr.strip().splitlines()
    assert "resources.workers_per_trial is 4" in line
    assert "1 x 2 CPUs and 0 GPUs" in line
    assert "1 x 1 CPUs and 0 GPUs" in line

    told = fit.stdout.splitlines()
    assert sum(": as here: ok" in line for line in told) == 2
    assert sum(", memory: " in line for line in told) == 2
    assert sum(f"place {tmp_path}/new: written, read" in line for line in told) == 3
    assert not (tmp_path / "new").exists()
    # Whether Ray asks for a token depends on whether its user has one.
    is_open = "anyone who reaches it can run code" in told[-1]
    assert [line for line in told if not line.endswith(": ok")] == told[-1:] * is_open
    assert fit.returncode == (69 if is_open else 0), fit.stdout + fit.stderr
    assert is_open or "asks for a token" in told[-1]


def test_room_that_one_waits_for_who_died_is_freed() -> None:
    class Maker:
        """An actor that reserves something, and keeps it."""

        def __init__(self) -> None:
            self.group = placement_group([{"CPU": 2}])

        def is_there(self) -> bool:
            return True

    with nodes_of(2) as address:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        try:
            held = placement_group([{"CPU": 2}])
            ray.get(held.ready(), timeout=30)
            maker = ray.remote(num_cpus=0)(Maker).remote()
            assert ray.get(maker.is_there.remote())
            assert free_abandoned() == 0, "it lives, and so do we, whose group has no actor"
            ray.kill(maker)
            deadline = time.monotonic() + 30
            while not free_abandoned():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            remove_placement_group(held)
            ray.get(placement_group([{"CPU": 2}]).ready(), timeout=30)
        finally:
            ray.shutdown()
