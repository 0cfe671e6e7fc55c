"""Two processes start the same run within 50 ms, time and again: one of them writes it, alone."""

import json
import multiprocessing
import os
import random
import re
import time
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from s3_servers import Bucket, use_endpoint

from tlrunner.configfile import load
from tlrunner.errors import InterruptedRun
from tlrunner.files import write_json
from tlrunner.jobconfig import JobConfig
from tlrunner.report.rundir import begun_run, find_run
from tlrunner.train.place import LEASE, place_at

pytestmark = pytest.mark.slow
APART_SECONDS = 0.05
WAIT_SECONDS = 120  # for the other process, which may find a machine that is busy


def test_one_of_two_starts_on_a_machine_writes_the_run(tmp_path: Path) -> None:
    check_starts(str(tmp_path / "runs"), 50, tmp_path, caches=("cache", "cache"))


def test_one_of_two_starts_on_two_machines_writes_the_run_in_s3(
    moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with FaultProxy(moto_bucket.endpoint, {}) as proxy:  # which keeps conditional writes atomic
        use_endpoint(monkeypatch, proxy.endpoint)
        check_starts(f"{moto_bucket.uri}/runs", 10, tmp_path, caches=("here", "there"))


def check_starts(runs: str, num_rounds: int, tmp_path: Path, caches: tuple[str, str]) -> None:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    processes = [
        context.Process(
            target=start_often,
            args=(
                number,
                runs,
                num_rounds,
                tmp_path / cache,
                together,
                tmp_path / f"{number}.json",
            ),
        )
        for number, cache in enumerate(caches)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    told = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    for number, both in enumerate(zip(*told, strict=True)):
        (winner,) = (one for one in both if one["won"])
        (loser,) = (one for one in both if not one["won"])
        assert loser["exit_code"] == 75
        # who is late by less than it takes to write a name is told of no name
        holder = rf"(process {winner['process']} on .+|another process)"
        assert re.match(rf"run 'run-{number}' is being written by {holder}; ", loser["error"])
        run, alone = (f"{parent}/run-{number}" for parent in (runs, tmp_path / "alone"))
        begin(str(tmp_path / "alone"), number, tmp_path / "cache")
        assert content_of(run, winner["process"]) == content_of(alone, os.getpid())
    assert {one["won"] for one in told[0]} == {True, False}, "it is not always the same one"


def start_often(
    number: int, runs: str, num_rounds: int, cache: Path, together: Barrier, tells: Path
) -> None:
    """What each of the processes does."""
    dice = random.Random(number)
    told = []
    for run in range(num_rounds):
        together.wait(WAIT_SECONDS)
        time.sleep(dice.uniform(0, APART_SECONDS))
        told.append(begin(runs, run, cache, together))
    write_json(tells, told)


def begin(runs: str, number: int, cache: Path, together: Barrier | None = None) -> dict[str, Any]:
    """Begin a run, and hold it until the other process has tried to, if there is one."""
    meet = partial(together.wait, WAIT_SECONDS) if together else lambda: None
    job = load(JobConfig, None, (), {"output.uri": runs, "output.name": f"run-{number}"})
    try:
        with begun_run(find_run(job, job.output, "tune", str(cache)), job, "abc") as (run, _):
            write_json(run.path / "winner.json", os.getpid())
            run.place.save(run.path / "winner.json")
            meet()
        meet()
    except InterruptedRun as err:
        meet()
        meet()
        return {"won": False, "process": os.getpid(), "error": str(err), "exit_code": err.exit_code}
    return {"won": True, "process": os.getpid()}


def content_of(run: str, process: int) -> dict[str, Any]:
    """Every file of a run that this process wrote, without what tells it from other such runs."""
    store = place_at(run, "none").store
    content = {entry.name: json.loads(store.read(entry.name)) for entry in store.list()}
    assert content.pop("winner.json") == process
    assert content[LEASE]["holder"].startswith(f"process {process} on ")
    content[LEASE] = content[LEASE]["fence"]
    del content["run.json"]["config"]["output"]
    return content
