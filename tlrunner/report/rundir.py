"""A run's directory: its name, its identity, and the trials in it.

The same name with the same config continues; with another config it is refused, so that one
directory never mixes the results of two searches.
"""

import datetime
import errno
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tlrunner.configfile import config_hash
from tlrunner.errors import ConfigError
from tlrunner.files import cannot_write, read_json, write_json
from tlrunner.jobconfig import OutputConfig
from tlrunner.train.trial_dir import TrialDir, TrialRecord

SUCCESS = "_SUCCESS"
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "ray", "pyarrow", "numpy")


@dataclass(frozen=True)
class RunDir:
    """`path` is absolute; `config_hash` is that of the config which began the run."""

    path: Path
    config_hash: str

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    @property
    def is_finished(self) -> bool:
        return (self.path / SUCCESS).exists()

    def records(self) -> list[TrialRecord]:
        """Every trial that began, best first: by val_acc, then by val_loss, then by id."""
        directories = self.trials.glob("*/config.json") if self.trials.is_dir() else ()
        records = [TrialDir(file.parent).read() for file in directories]
        return sorted(records, key=_rank)


def find_run(job: BaseModel, output: OutputConfig, job_name: str) -> RunDir:
    """The directory of a new run, not made yet, or that of the run to continue.

    Raises:
        ConfigError: the name belongs to a run with another config.
        StorageError: nothing can be written there.
    """
    parent = local_directory(output)
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(parent, err) from err
    if not os.access(parent, os.W_OK):
        raise cannot_write(parent, PermissionError(errno.EACCES, "Permission denied"))
    run = RunDir(parent / (output.name or _new_name(parent, job_name)), config_hash(job))
    begun = run.path / "run.json"
    if begun.exists():
        other = read_json(begun).get("config_hash")
        if other != run.config_hash:
            raise ConfigError(
                f"run '{run.path.name}' in {parent} was begun with another config "
                f"(hash {other}, now {run.config_hash})",
                "the config it was begun with",
                "choose another --name, or remove that directory",
            )
    return run


def local_directory(output: OutputConfig) -> Path:
    """The directory that holds runs, absolute.

    Raises:
        ConfigError: it is not a directory on a file system.
    """
    path = output.uri.removeprefix("file://")
    if "://" in path:
        raise ConfigError(
            f"output.uri is '{output.uri}'",
            "a directory; on a cluster one that all nodes share",
            "write there, then copy the run to its store",
        )
    return Path(path).expanduser().resolve()


def begin_run(run: RunDir, job: BaseModel, **facts: Any) -> int:
    """Say what the run is, and clear what was cut short or failed, to run again.

    run.json gets the resolved config, its hash, versions, and the given facts about the input.
    Gives the number of trials that ended before and are kept.
    """
    content = {
        "run": run.path.name,
        "config_hash": run.config_hash,
        "config": job.model_dump(mode="json"),
        "versions": installed_versions(),
        **facts,
    }
    write_json(run.path / "run.json", content)
    settled = {record.trial_id for record in run.records() if record.is_settled}
    for directory in run.trials.iterdir() if run.trials.is_dir() else ():
        if directory.name not in settled:
            shutil.rmtree(directory)
    return len(settled)


def installed_versions() -> dict[str, str]:
    versions = {name: metadata.version(name) for name in ("tlrunner", *PACKAGES)}
    return {"python": platform.python_version(), **versions}


def _new_name(parent: Path, job_name: str) -> str:
    prefix = f"{job_name}-{datetime.date.today().isoformat()}"
    number = 1
    while (parent / f"{prefix}-{number}").exists():
        number += 1
    return f"{prefix}-{number}"


def _rank(record: TrialRecord) -> tuple[float, float, str]:
    best = record.best
    if best is None:
        return (0.0, 0.0, record.trial_id)
    return (-best.val_acc - 1, best.val_loss, record.trial_id)
