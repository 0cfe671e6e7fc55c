"""Faults of every kind, as many as fit in some minutes: slow; `jobs/bench_faults.py` has more."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).resolve().parents[2] / "jobs" / "bench_faults.py"
SEED = 20


def test_no_fault_loses_a_trial_runs_one_twice_or_passes_for_a_success() -> None:
    command = [sys.executable, str(BENCH), "--faults", "20", "--seed", str(SEED)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
