"""The jobs, each from its config to an exit code: read one top to bottom to see a whole run.

`tune` searches, `train` runs one configuration, `prepare` makes shards; `predict.py` has the
fourth. Each takes its config, the job's name, a console, and whether it only shows what it would
do.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from tlrunner.config import TrialConfig
from tlrunner.data.dataset import open_dataset, verify_shards
from tlrunner.data.prepare import prepare
from tlrunner.data.sources import open_source
from tlrunner.data.write import write_shards
from tlrunner.errors import InterruptedRun, TlrunnerError
from tlrunner.files import read_json
from tlrunner.jobconfig import JobConfig, PrepareJob, SearchConfig, TrainJob
from tlrunner.report.finish import copy_bad_images, exit_code, finish_run
from tlrunner.report.rundir import RunDir, begun_run, find_run, new_directory
from tlrunner.screen import preparing, show_summary
from tlrunner.train.feed import open_data
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import EpochReport, TrialDir
from tlrunner.tune.plan import check_search, check_trial, count_trials, grant_here, show_plan
from tlrunner.tune.space import PlannedTrial
from tlrunner.uris import absolute, is_weights_file

log = logging.getLogger("tlrunner")
AnyTrial = TypeVar("AnyTrial", bound=TrialConfig)


def tune(job: JobConfig, job_name: str, out: Console, dry_run: bool) -> int:
    """Search for the best configuration. Gives the exit code."""
    started = time.monotonic()
    job = with_absolute_paths(job)

    # -- Everything that can be wrong is found before anything starts ------------------------------
    job = job.model_copy(update={"search": _with_absolute_weights(job.search)})
    trials = check_search(job)
    source = open_source(job.data.uri)
    if dry_run:
        show_plan(job, trials, source, out)
        return 0
    run = find_run(job, job.output, job_name)
    if run.is_finished:
        return _show_finished(run, out)

    # -- Images, then trials -----------------------------------------------------------------------
    # Imported here, since the other jobs need no Ray and start the sooner for it.
    from tlrunner.tune.search import check_shared, connected_to_ray, granted_resources, run_search

    interrupted = False
    with ExitStack() as held:
        with connected_to_ray(job.log.level):
            job = job.model_copy(update={"resources": granted_resources(job.resources)})
            trials = check_search(job)  # once more, now that it is known whether there are GPUs
            shards = _prepared(job, out)
            run, num_settled = held.enter_context(_begun(run, job, shards, out))
            check_shared(run.path)
            num_trials = count_trials(job.search, trials)
            try:
                run_search(job, num_trials, num_settled, run.path, shards, out)
            except KeyboardInterrupt:
                interrupted = True
        return _finish(run, shards, started, out, interrupted)


def train(job: TrainJob, job_name: str, out: Console, dry_run: bool) -> int:
    """Train one configuration, in this process. Gives the exit code."""
    started = time.monotonic()
    job = with_absolute_paths(job)
    job = job.model_copy(update={"resources": grant_here(job.resources)})
    config = job.trial()
    check_trial(config)
    source = open_source(job.data.uri)
    planned = PlannedTrial(0, config)
    if dry_run:
        show_plan(job, [planned], source, out)
        return 0
    run = find_run(job, job.output, job_name)
    if run.is_finished:
        return _show_finished(run, out)
    shards = _prepared(job, out)

    def show(report: EpochReport) -> None:
        out.print(
            f"epoch {report.epoch}/{config.train.epochs}  val_acc {report.val_acc:.4f}  "
            f"val_loss {report.val_loss:.4f}  train_loss {report.train_loss:.4f}  "
            f"{report.images_per_second:.0f} images/s  {report.seconds:.0f} s"
        )

    interrupted = False
    with _begun(run, job, shards, out) as (run, num_settled):
        directory = run.trials / planned.trial_id
        try:
            if num_settled == 0:  # else only the end is missing
                run_trial(config, show, trial_dir=directory, shards=shards)
        except KeyboardInterrupt:
            interrupted = True
        except TlrunnerError:
            raise
        except Exception as err:
            TrialDir(directory).fail(err)
            log.error("trial %s failed: %s", planned.trial_id, err, exc_info=err)
        return _finish(run, shards, started, out, interrupted)


def prepare_images(job: PrepareJob, job_name: str, out: Console, dry_run: bool) -> int:
    """Write any source of images as shards. Gives the exit code."""
    source = open_source(absolute(job.data.uri), labelled=False)
    if dry_run:
        out.print(f"{len(source)} images of {len(source.class_names)} classes in {source.uri}")
        return 0
    directory = new_directory(job.output, job_name)
    with preparing(out) as progress:
        manifest = write_shards(
            source,
            directory,
            limit=job.data.limit,
            max_bad_fraction=job.data.max_bad_fraction,
            progress=progress,
        )
    out.print(
        f"{manifest.num_images} images of {len(manifest.class_names)} classes in "
        f"{len(manifest.shards)} shards, {manifest.num_bad} unusable: {directory}",
        soft_wrap=True,
    )
    return 0


def with_absolute_paths(job: AnyTrial) -> AnyTrial:
    """Trials run in directories of their own, so relative paths are settled here."""
    weights = job.backbone.weights
    settled = {"weights": absolute(weights)} if is_weights_file(weights) else {}
    data = job.data.model_copy(
        update={
            "uri": absolute(job.data.uri),
            "cache_dir": str(Path(job.data.cache_dir).expanduser().resolve()),
        }
    )
    backbone = job.backbone.model_copy(update=settled)
    return job.model_copy(update={"data": data, "backbone": backbone})


def _with_absolute_weights(search: SearchConfig) -> SearchConfig:
    """Likewise for the files among the weights that are searched."""
    space = dict(search.space)
    if "backbone.weights" in space:
        space["backbone.weights"] = tuple(
            entry.model_copy(
                update={
                    entry.kind: tuple(
                        absolute(w) if is_weights_file(w) else w for w in entry.values
                    )
                }
            )
            for entry in space["backbone.weights"]
        )
    return search.model_copy(update={"space": space})


def _prepared(job: TrainJob, out: Console) -> Path:
    """The shards of the job's images, whose split is known to work."""
    with preparing(out) as progress:
        shards = prepare(
            job.data.uri,
            job.data.cache_dir,
            max_bad_fraction=job.data.max_bad_fraction,
            progress=progress,
        )
    verify_shards(shards)  # every byte, once a run
    dataset, splits = open_data(job.data, shards)
    out.print(
        f"{len(splits.train)} images train, {len(splits.val)} validate, {len(splits.test)} test; "
        f"{len(dataset.class_names)} classes",
    )
    return shards


@contextmanager
def _begun(run: RunDir, job: TrainJob, shards: Path, out: Console) -> Iterator[tuple[RunDir, int]]:
    """The run's directory, ours from here on, with a log and the list of unusable images in it."""
    with begun_run(run, job, open_dataset(shards).manifest.sha256) as (run, num_settled):
        _log_to(run)
        copy_bad_images(shards, run)
        kept = f": {num_settled} trials are done already" if num_settled else ""
        out.print(f"run {run.path}{kept}", soft_wrap=True)
        if "runtime_resources" in run.path.parts:
            out.print(
                "note: this directory is Ray's copy of the job and goes when the job does; give "
                "--out an absolute path to keep the run",
                soft_wrap=True,
            )
        yield run, num_settled


def _finish(run: RunDir, shards: Path, started: float, out: Console, interrupted: bool) -> int:
    manifest = open_dataset(shards).manifest
    summary = finish_run(run, manifest, time.monotonic() - started, interrupted=interrupted)
    if interrupted:
        raise InterruptedRun(
            f"run {run.path} was interrupted",
            "",
            f"the same command with --name {run.path.name} continues it",
        )
    show_summary(summary, run.path, out)
    return exit_code(summary)


def _show_finished(run: RunDir, out: Console) -> int:
    summary: dict[str, Any] = read_json(run.path / "summary.json")
    out.print(f"run {run.path} is finished already", highlight=False, soft_wrap=True)
    show_summary(summary, run.path, out)
    return exit_code(summary)


def _log_to(run: RunDir) -> None:
    """From here on the run's directory keeps what the terminal shows no more than a line of."""
    handler = logging.FileHandler(run.path / "log.txt", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
