"""A run's directory: its name, its identity, and the trials in it.

The same name with the same config continues; with another config it is refused, so that one
directory never mixes the results of two searches.
"""

import datetime
import errno
import itertools
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel

from tlrunner.config import CACHE_DIR, DataConfig
from tlrunner.configfile import config_hash, shown
from tlrunner.errors import ConfigError, DataError, InterruptedRun, StorageError
from tlrunner.files import cannot_write, write_json
from tlrunner.jobconfig import OutputConfig
from tlrunner.report.identity import TRIAL_ID, Identity, check_inside
from tlrunner.report.lease import Lease, held
from tlrunner.stored import not_as_written
from tlrunner.train.checkpoint import is_whole
from tlrunner.train.place import CHECKPOINTS, Place, place_at
from tlrunner.train.trial_dir import TrialDir, TrialRecord

SUCCESS = "_SUCCESS"
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "ray", "pyarrow", "numpy")


@dataclass(frozen=True)
class RunDir:
    """`path` is absolute, `config_hash` that of the config which began the run.

    `is_new`: named here, not by the user, so it is to be a directory of its own. `uri`: the S3
    prefix that the run is kept below, if it is; `path` is then a working copy. `lease`: of the
    process that holds the run.
    """

    path: Path
    config_hash: str
    is_new: bool = False
    uri: str | None = None
    lease: Lease | None = field(default=None, compare=False)

    @property
    def place(self) -> Place:
        return Place(self.path, self.uri, self.lease.fence if self.lease else None)

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    @property
    def is_finished(self) -> bool:
        return self.place.store.size(SUCCESS) is not None

    def is_lost(self) -> bool:
        """Whether another process is known to have taken over the run."""
        return self.lease is not None and bool(self.lease.lost)

    def check_held(self) -> None:
        """Before each commit of the run's own; see `Lease.check`."""
        if self.lease:
            self.lease.check()

    def trial(self, trial_id: str) -> TrialDir:
        return TrialDir(self.place.below("trials").below(trial_id))

    def records(self) -> list[TrialRecord]:
        """Every trial that began, best first: by val_acc, then by val_loss, then by id.

        Raises:
            StorageError: there is something that is no trial, or a trial that cannot be read.
        """
        begun = [TrialDir(path) for path in self.trial_paths() if (path / "config.json").exists()]
        return sorted((trial.read() for trial in begun), key=_rank)

    def trial_paths(self) -> list[Path]:
        """The directories of trials, also of those that never began.

        Raises:
            StorageError: there is another one.
        """
        paths = sorted(self.trials.iterdir()) if self.trials.is_dir() else []
        paths = [path for path in paths if path.is_dir()]
        for path in paths:
            if not TRIAL_ID.fullmatch(path.name):
                raise not_as_written(self.trials, shown(path.name), "names of trials")
        return paths


def read_trials(uri: str, cache_dir: str) -> list[TrialRecord]:
    """The trials of any run, best first.

    Raises:
        StorageError: there is no run.
    """
    place = place_at(uri, cache_dir)
    place.fetch(without=CHECKPOINTS)
    check_inside(place.path)
    if not (place.path / "run.json").exists():
        raise StorageError(f"{place} holds no run.json", "the directory of a run")
    return RunDir(place.path, "", uri=place.uri).records()


def find_run(
    job: BaseModel, output: OutputConfig, job_name: str, cache_dir: str = CACHE_DIR
) -> RunDir:
    """The directory of a new run, not made yet, or that of the run to continue.

    Args:
        cache_dir: holds the working copy of a run in S3.

    Raises:
        ConfigError: the name belongs to a run with another config, or to no run.
        StorageError: nothing can be written there.
    """
    place = place_for(output, job_name, cache_dir)
    run = RunDir(place.path, config_hash(job), is_new=output.name is None, uri=place.uri)
    _check_same(run)
    return run


def place_for(output: OutputConfig, job_name: str, cache_dir: str = CACHE_DIR) -> Place:
    """Where a job writes: `uri`/`name`, or a new name where none is given; not made yet.

    Raises:
        StorageError: nothing can be written there.
    """
    parent = place_at(output.uri, cache_dir)
    if not parent.uri:
        _check_writable(parent.path)
    name = output.name or _new_name(parent, job_name)
    return place_at(f"{parent}/{name}", cache_dir)


def check_empty(place: Place) -> None:
    """Refuse a place that holds something.

    Raises:
        StorageError: it does.
    """
    if place.path.is_file() or _contents(place):
        raise StorageError(f"{place} holds something already", "", "choose another --name")


def _contents(place: Place) -> list[str]:
    """Names of what is directly in a place."""
    if place.uri:
        return sorted({entry.name.split("/")[0] for entry in place.store.list()})
    return sorted(path.name for path in place.path.iterdir()) if place.path.is_dir() else []


def _check_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(directory, err) from err
    if not os.access(directory, os.W_OK):
        raise cannot_write(directory, PermissionError(errno.EACCES, "Permission denied"))


def settled_before(run: RunDir, data: DataConfig) -> DataConfig:
    """A config of images with what it leaves open as the run has it already, if it was begun."""
    begun = run.place.read(Identity, "run.json")
    if begun is None:
        return data
    left_open = [key for key in ("streaming", "decoded_cache") if getattr(data, key) == "auto"]
    return data.model_copy(update={key: getattr(begun.config.data, key) for key in left_open})


@contextmanager
def begun_run(
    run: RunDir, job: BaseModel, images_sha256: str
) -> Iterator[tuple[RunDir, list[TrialRecord]]]:
    """Hold a run's directory, and say in it what the run is.

    run.json gets the resolved config, its hash, versions, the hash of the images' manifest, and the
    number of its holder.
    Trials that failed are cleared, to run again, and so are those that were broken off and have
    nothing to go on from.

    Yields:
        The run, and the trials that ended before and are kept.

    Raises:
        InterruptedRun: another process is writing this run, or has just finished it; also of what
            is written under its `place` once another has taken it over.
        ConfigError, DataError: it was begun with another config, or on other images.
    """
    if run.is_new:
        run = _made_new(run)
    with held(run.place) as lease:
        run = replace(run, lease=lease)
        if run.is_finished:  # since it was looked at; nothing may change any more
            raise InterruptedRun(
                f"run '{run.path.name}' was just finished by another process",
                "",
                "the same command shows it",
            )
        run.place.fetch()
        _check_same(run, images_sha256)
        content = {
            "run": run.path.name,
            "fence": lease.fence.number,
            "config_hash": run.config_hash,
            "config": job.model_dump(mode="json"),
            "versions": installed_versions(),
            "data": {"manifest_sha256": images_sha256},
        }
        run.check_held()
        write_json(run.path / "run.json", content)
        run.place.save(run.path / "run.json")
        yield run, _clear_unsettled(run)


def _check_same(run: RunDir, images_sha256: str | None = None) -> None:
    """Refuse to continue another run, or to write into a directory that is no run."""
    check_inside(run.path)
    other = run.place.read(Identity, "run.json")
    if other is None:
        foreign = [name for name in _contents(run.place) if not name.startswith(".")]
        if foreign:
            raise ConfigError(
                f"{run.place} holds {foreign[0]} and no run.json, so it is no run to continue",
                "a run, an empty directory, or a new name",
                "choose another --name",
            )
        return
    if other.config_hash != run.config_hash:
        parent = str(run.place).rpartition("/")[0]
        raise ConfigError(
            f"run '{run.path.name}' in {parent} was begun with another config "
            f"(hash {other.config_hash:.40}, now {run.config_hash})",
            "the config it was begun with",
            "choose another --name, or remove that directory",
        )
    if images_sha256 and other.data.manifest_sha256 != images_sha256:
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
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            continue
        except OSError as err:
            raise cannot_write(path, err) from err
        uri = f"{run.uri.rpartition('/')[0]}/{path.name}" if run.uri else None
        return replace(run, path=path, uri=uri)
    raise AssertionError("numbers do not end")


def _clear_unsettled(run: RunDir) -> list[TrialRecord]:
    """Gives the trials that ended."""
    records = run.records()
    ended = {r.trial_id: r for r in records if _is_kept(run, r)}
    broken_off = [r.trial_id for r in records if r.state == "interrupted"]
    for name in broken_off:
        run.trial(name).tell_kept()
    resumable = {name for name in broken_off if run.trial(name).to_go_on_from()}
    for directory in run.trial_paths():
        if directory.name not in ended and directory.name not in resumable:
            run.place.remove(directory)
    return list(ended.values())


def _is_kept(run: RunDir, record: TrialRecord) -> bool:
    """A trial that ended, and whose best checkpoint is whole."""
    if not (record.is_settled and record.best):
        return record.is_settled
    trial = run.trial(record.trial_id)
    if not is_whole(trial.best_checkpoint(record.best)) and run.uri:
        # Of the working copy, which is not what counts, and may have none.
        shutil.rmtree(trial.checkpoints, ignore_errors=True)
        trial.place.fetch()
    return is_whole(trial.best_checkpoint(record.best))


def installed_versions() -> dict[str, str]:
    versions = {name: metadata.version(name) for name in ("tlrunner", *PACKAGES)}
    return {"python": platform.python_version(), **versions}


def _new_name(parent: Place, job_name: str) -> str:
    prefix = f"{job_name}-{datetime.date.today().isoformat()}"
    for number in itertools.count(1):
        place = parent.below(f"{prefix}-{number}")
        if not (_contents(place) or place.path.exists()):
            return place.path.name
    raise AssertionError("numbers do not end")


def _rank(record: TrialRecord) -> tuple[float, float, str]:
    best = record.best
    if best is None:
        return (0.0, 0.0, record.trial_id)
    return (-best.val_acc - 1, best.val_loss, record.trial_id)
