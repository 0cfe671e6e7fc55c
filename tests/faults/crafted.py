"""What tests of crafted state ask of a run: its trial, its files, and how a job refuses it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tlrunner.files import sha256_file

Captured = pytest.CaptureFixture[str]
Job = Callable[..., int]


def refused(train_job: Job, capsys: Captured, named: str, *flags: str) -> str:
    """The line with which the job refuses a file by its name."""
    capsys.readouterr()
    code = train_job(*flags)
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (73, 1), lines
    assert named in lines[0]
    assert len(lines[0]) < 1000
    return lines[0]


def trial_of(run: Path) -> Path:
    (trial,) = (run / "trials").iterdir()
    return trial


def content_of(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): sha256_file(path) for path in files}
