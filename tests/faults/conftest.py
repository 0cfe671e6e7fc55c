"""A run that was broken off behind its first epoch, and the job that goes on with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tlrunner import run as jobs
from tlrunner.cli import run_job
from tlrunner.jobconfig import TrainJob

Job = Callable[..., int]


@pytest.fixture(scope="session")
def job_config(tiny_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "config.json"
    path.write_text(json.dumps(tiny_tree))
    return path


@pytest.fixture
def train_job(job_config: Path, tmp_path: Path) -> Job:
    """`train_job(*flags)`: jobs/train.py on the tiny trial, as run `mine` below tmp_path/runs."""

    def job(*flags: str) -> int:
        given = ["--config", str(job_config), "--out", str(tmp_path / "runs"), "--name", "mine"]
        return run_job("train", TrainJob, jobs.train, argv=[*given, *flags])

    return job


@pytest.fixture(scope="session")
def _broken_off(job_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("broken") / "runs"
    run_trial = jobs.run_trial

    def broken_off(config: Any, report: Any, **others: Any) -> Any:
        def stop(finished: Any) -> None:
            raise KeyboardInterrupt

        return run_trial(config, stop, **others)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jobs, "run_trial", broken_off)
        flags = ["--config", str(job_config), "--out", str(runs), "--name", "mine"]
        assert run_job("train", TrainJob, jobs.train, argv=flags) == 75
    return runs


@pytest.fixture
def broken_off(_broken_off: Path, tmp_path: Path) -> Path:
    """The run's directory; a copy, for each test its own."""
    return Path(shutil.copytree(_broken_off, tmp_path / "runs")) / "mine"


@pytest.fixture(scope="session")
def _finished(_broken_off: Path, job_config: Path) -> Path:
    runs = Path(shutil.copytree(_broken_off, _broken_off.with_name("finished")))
    flags = ["--config", str(job_config), "--out", str(runs), "--name", "mine"]
    assert run_job("train", TrainJob, jobs.train, argv=flags) == 0
    return runs


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """The directory of the run after it went on; a copy, for each test its own."""
    return Path(shutil.copytree(_finished, tmp_path / "runs")) / "mine"
