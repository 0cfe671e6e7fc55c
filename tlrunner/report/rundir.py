"""A run's directory: its name, its identity, and the trials in it.

The same name with the same config continues; with another config it is refused, so that one
directory never mixes the results of two searches.
"""

import datetime
import errno
import fcntl
import itertools
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel

from tlrunner.configfile import config_hash
from tlrunner.errors import ConfigError, DataError, InterruptedRun, StorageError
from tlrunner.files import cannot_write, read_json, write_json
from tlrunner.jobconfig import OutputConfig
from tlrunner.train.checkpoint import verify_commit
from tlrunner.train.trial_dir import TrialDir, TrialRecord

SUCCESS = "_SUCCESS"
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "ray", "pyarrow", "numpy")


@dataclass(frozen=True)
class RunDir:
    """`path` is absolute, `config_hash` that of the config which began the run.

    `is_new`: named here, not by the user, so it is to be a directory of its own.
    """

    path: Path
    config_hash: str
    is_new: bool = False

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
        ConfigError: the name belongs to a run with another config, or to no run.
        StorageError: nothing can be written there.
    """
    parent = _writable_parent(output)
    name = output.name or _new_name(parent, job_name)
    run = RunDir(parent / name, config_hash(job), is_new=output.name is None)
    _check_same(run)
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


def new_directory(output: OutputConfig, job_name: str) -> Path:
    """A directory for what a job makes, found to be absent or empty; not made yet.

    Raises:
        ConfigError: it is not on a file system.
        StorageError: it holds something already, or nothing can be written there.
    """
    parent = _writable_parent(output)
    directory = parent / (output.name or _new_name(parent, job_name))
    try:
        taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    except OSError as err:
        raise cannot_write(directory, err) from err
    if taken:
        raise StorageError(f"{directory} holds something already", "", "choose another --name")
    return directory


def _writable_parent(output: OutputConfig) -> Path:
    parent = local_directory(output)
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(parent, err) from err
    if not os.access(parent, os.W_OK):
        raise cannot_write(parent, PermissionError(errno.EACCES, "Permission denied"))
    return parent


@contextmanager
def begun_run(run: RunDir, job: BaseModel, images_sha256: str) -> Iterator[tuple[RunDir, int]]:
    """Hold a run's directory, and say in it what the run is.

    run.json gets the resolved config, its hash, versions, and the hash of the images' manifest.
    Trials that were cut short or failed are cleared, to run again.

    Yields:
        The run, and the number of trials that ended before and are kept.

    Raises:
        InterruptedRun: another process is writing this run.
        ConfigError, DataError: it was begun with another config, or on other images.
    """
    if run.is_new:
        run = _made_new(run)
    with _held(run):
        _check_same(run, images_sha256)
        content = {
            "run": run.path.name,
            "config_hash": run.config_hash,
            "config": job.model_dump(mode="json"),
            "versions": installed_versions(),
            "data": {"manifest_sha256": images_sha256},
        }
        write_json(run.path / "run.json", content)
        yield run, _clear_unsettled(run)


def _check_same(run: RunDir, images_sha256: str | None = None) -> None:
    """Refuse to continue another run, or to write into a directory that is no run."""
    begun = run.path / "run.json"
    if not begun.exists():
        foreign = [p.name for p in _entries(run.path) if not p.name.startswith(".")]
        if foreign:
            raise ConfigError(
                f"{run.path} holds {foreign[0]} and no run.json, so it is no run to continue",
                "a run, an empty directory, or a new name",
                "choose another --name",
            )
        return
    other = read_json(begun)
    if other.get("config_hash") != run.config_hash:
        raise ConfigError(
            f"run '{run.path.name}' in {run.path.parent} was begun with another config "
            f"(hash {other.get('config_hash')}, now {run.config_hash})",
            "the config it was begun with",
            "choose another --name, or remove that directory",
        )
    if images_sha256 and other["data"]["manifest_sha256"] != images_sha256:
        raise DataError(
            f"the images changed since run '{run.path.name}' was begun",
            "the images it was begun on",
            "choose another --name",
        )


def _made_new(run: RunDir) -> RunDir:
    """Make the directory of a run that was named here; another process may take a name first."""
    prefix, _, number = run.path.name.rpartition("-")
    for attempt in itertools.count(int(number)):
        path = run.path.with_name(f"{prefix}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        except OSError as err:
            raise cannot_write(path, err) from err
        return replace(run, path=path)
    raise AssertionError("numbers do not end")


@contextmanager
def _held(run: RunDir) -> Iterator[None]:
    """Be the one process that writes this run; the system lets go however the process ends."""
    path = run.path.with_name(f".{run.path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as err:
        raise cannot_write(path, err) from err
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            file.seek(0)
            raise InterruptedRun(
                f"run '{run.path.name}' is being written by {file.read() or 'another process'}",
                "",
                "wait for it, or choose another --name",
            ) from err
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _clear_unsettled(run: RunDir) -> int:
    settled = {record.trial_id for record in run.records() if _is_kept(run, record)}
    for directory in _entries(run.trials):
        if directory.name not in settled:
            shutil.rmtree(directory)
    return len(settled)


def _is_kept(run: RunDir, record: TrialRecord) -> bool:
    """A trial that ended, and whose best checkpoint is whole."""
    if record.is_settled and record.best:
        try:
            verify_commit(TrialDir(run.trials / record.trial_id).best_checkpoint(record.best))
        except StorageError:
            return False
    return record.is_settled


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


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
