"""Pickles among a run's files: none is loaded, so none of them runs code.

An audit hook cannot be taken off again, so it is set in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tlrunner.cli import run_job
from tlrunner.jobconfig import JobConfig

JOBS = Path(__file__).resolve().parents[2] / "jobs"
# Names that loaders of accelerate, torch and Ray look for.
PICKLES = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl")
PICKLES += ("pytorch_model.bin", "model.pth", "checkpoint.pt", "state.pkl", "trainable.pkl")
RAY_PICKLES = ("tuner.pkl", "trainable.pkl", "error.pkl", "search_gen_state.pkl", "params.pkl")
RAY_PICKLES += ("searcher-state-2026-01-01_00-00-00.pkl", ".tune_metadata", ".is_checkpoint")
RAY_STATE = "experiment_state-2026-01-01_00-00-00.json"

# Imported before, since imports are no state; what an event is told of is cut short.
AUDITED = """
import importlib, runpy, sys
job, told = sys.argv[1], open(sys.argv[2], "w")
for module in sys.argv[3].split():
    importlib.import_module(module)
EVENTS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty",
          "subprocess.Popen", "os.rename")

def hook(event, args):
    if event in EVENTS:
        print(event, repr(args)[:200], file=told, flush=True)

sys.addaudithook(hook)
sys.argv = [job, *sys.argv[4:]]
runpy.run_path(job, run_name="__main__")
"""


class Evil:
    """A pickle that makes a file wherever it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def evil(mark: Path) -> bytes:
    import pickle

    return pickle.dumps(Evil(mark))


def audited(job: Path, told: Path, imports: str, *flags: str) -> tuple[int, list[str]]:
    """Exit code of a job in a process of its own, and what it was heard to do."""
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, str(job), str(told), imports, *flags],
        capture_output=True,
        check=False,
    )
    return done.returncode, told.read_text().splitlines()


def test_no_pickle_is_loaded_as_a_run_goes_on(
    broken_off: Path, job_config: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    (checkpoint,) = broken_off.glob("trials/*/checkpoints/*")
    for directory in (broken_off, *list(checkpoint.parents)[:3], checkpoint):
        for name in PICKLES:
            (directory / name).write_bytes(evil(mark))
    flags = ["--config", str(job_config), "--out", str(broken_off.parent), "--name", "mine"]
    imports = "accelerate timm torch tlrunner.cli tlrunner.run"
    code, events = audited(JOBS / "train.py", tmp_path / "events", imports, *flags)
    assert code == 0
    assert not mark.exists()
    renamed = [event for event in events if event.startswith("os.rename ")]
    assert renamed, "nothing was heard"
    assert events == renamed


def test_a_pickle_that_is_loaded_is_heard(tmp_path: Path) -> None:
    (tmp_path / "evil.pkl").write_bytes(evil(tmp_path / "ran"))
    job = tmp_path / "job.py"
    job.write_text("import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))")
    code, events = audited(job, tmp_path / "events", "", str(tmp_path / "evil.pkl"))
    assert (code, events) == (0, ["pickle.find_class ('posix', 'mkdir')"])
    assert (tmp_path / "ran").is_dir()


@pytest.mark.slow
def test_no_pickle_of_rays_is_loaded_as_a_search_goes_on(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    config = tmp_path / "config.json"
    space = {"optim.lr": {"grid": [0.1, 0.01]}}
    search = {"algorithm": "grid", "space": space}
    config.write_text(json.dumps({**tiny_tree, "train": {"epochs": 1}, "search": search}))
    flags = ["--config", str(config), "--out", str(tmp_path / "runs"), "--name", "mine"]

    def tune() -> int:
        return run_job("tune", JobConfig, "tlrunner.run:tune", argv=flags)

    assert tune() == 0
    run, mark = tmp_path / "runs" / "mine", tmp_path / "ran"
    (run / "_SUCCESS").unlink()
    last = max((run / "trials").iterdir())
    (last / "end.json").unlink(missing_ok=True)
    (last / "metrics.jsonl").unlink()  # so one trial is to be done again
    for directory in (run, run / ".ray", run / ".ray" / "tune", run / ".ray" / "tune" / "trial_0"):
        directory.mkdir(exist_ok=True)
        for name in (*PICKLES, *RAY_PICKLES):
            (directory / name).write_bytes(evil(mark))
        state = {"_stats": {}, "checkpoints": [evil(mark).hex()], "runner_data": {}}
        (directory / RAY_STATE).write_text(json.dumps(state))
    assert tune() == 0
    assert not mark.exists()
    assert not (run / ".ray").exists()
    assert (run / "_SUCCESS").exists()
