"""The jobs, each from its config to an exit code: read one top to bottom to see a whole run.

`tune` searches, `train` runs one configuration, `prepare` makes shards; `predict.py` has the
fourth. Each takes its config, the job's name, a console, and whether it only shows what it would
do.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from rich.console import Console

from tlrunner.config import ResourceConfig, TrialConfig
from tlrunner.data.augment import short_side
from tlrunner.data.dataset import Dataset, open_dataset, verify_shards
from tlrunner.data.prepare import prepare
from tlrunner.data.sources import open_source
from tlrunner.data.write import WriteSettings, write_shards
from tlrunner.errors import ConfigError, InterruptedRun, TlrunnerError
from tlrunner.jobconfig import JobConfig, PrepareJob, TrainJob
from tlrunner.machine import importing
from tlrunner.model.classifier import describe
from tlrunner.paths import with_absolute_paths, with_absolute_weights
from tlrunner.report.finish import check_finished, copy_bad_images, exit_code, finish_run
from tlrunner.report.rundir import (
    RunDir,
    begun_run,
    find_run,
    place_for,
    read_trials,
    settled_before,
)
from tlrunner.report.summary import Judging, read_summary
from tlrunner.screen import preparing, show_summary
from tlrunner.searchconfig import BudgetConfig, SearchConfig
from tlrunner.signals import halting
from tlrunner.train.feed import settle_decoded_cache, settle_streaming, split_data, which
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import EpochReport, TrialRecord
from tlrunner.tune.plan import (
    check_search,
    check_trial,
    count_trials,
    grant,
    show_plan,
    this_machine,
)
from tlrunner.tune.space import PlannedTrial, located
from tlrunner.uris import absolute

log = logging.getLogger("tlrunner")
LOG_NAME = "log.txt"
AnyJob = TypeVar("AnyJob", bound=TrainJob)
Grant = Callable[[ResourceConfig], tuple[ResourceConfig, bool]]


def tune(job: JobConfig, job_name: str, out: Console, dry_run: bool) -> int:
    """Search for the best configuration. Gives the exit code."""
    started = time.monotonic()
    job = with_absolute_paths(job)

    # -- Everything that can be wrong is found before anything starts ------------------------------
    job = job.model_copy(update={"search": with_absolute_weights(job.search)})
    trials = check_search(job)
    source = open_source(job.data.uri, cache_dir=job.data.cache_dir)
    earlier = _earlier_trials(job, out)
    if dry_run:
        show_plan(job, trials, source, out)
        return 0
    run = find_run(job, job.output, job_name, job.data.cache_dir)
    if run.is_finished:
        return _show_finished(run, out)

    # -- Images, then trials -----------------------------------------------------------------------
    # Imported here, since the other jobs need no Ray and start the sooner for it.
    with importing():
        from tlrunner.tune.cluster import check_shared, connected_to_ray, granted_resources
        from tlrunner.tune.search import Search, run_search
        from tlrunner.tune.tracking import check_trackers

    check_trackers(job.track)
    interrupted = False
    with ExitStack() as held:
        with connected_to_ray(job.log.level):
            job = _granted(job, granted_resources, out)
            trials = check_search(job)  # once more, now that it is known whether there are GPUs
            job, images = _prepared(job, run, [t.config for t in trials], out)
            run, ended = held.enter_context(_begun(run, job, images, out))
            if not run.uri:
                check_shared(run.path, "run.json", "choose it with --out")
            try:
                with halting(has_reason=run.is_lost) as is_halted:
                    search = Search(
                        job=job,
                        num_trials=count_trials(job, trials),
                        started=started,
                        run=run.place,
                        images=which(images),
                        is_halted=is_halted,
                        ended=ended,
                        earlier=earlier,
                    )
                    run_search(search, out)
            except KeyboardInterrupt:
                interrupted = True
        repeats_of = job.train.seed if job.search.final_repeats else None
        judging = Judging(repeats_of, job.search.trade_off)
        return _finish(run, images, started, out, interrupted, judging)


def train(job: TrainJob, job_name: str, out: Console, dry_run: bool) -> int:
    """Train one configuration, in this process or in several workers. Gives the exit code."""
    if job.resources.workers_per_trial > 1:  # it takes Ray to place them: a search of one trial
        search = SearchConfig(budget=BudgetConfig(num_trials=1))
        tree = {name: getattr(job, name) for name in TrainJob.model_fields}
        return tune(JobConfig(**tree, search=search), job_name, out, dry_run)
    started = time.monotonic()
    job = with_absolute_paths(job)
    job = job.model_copy(update={"resources": grant(job.resources, [this_machine()])})
    config = job.trial()
    check_trial(config)
    source = open_source(job.data.uri, cache_dir=job.data.cache_dir)
    if dry_run:
        show_plan(job, [PlannedTrial(0, config)], source, out)
        return 0
    run = find_run(job, job.output, job_name, job.data.cache_dir)
    if run.is_finished:
        return _show_finished(run, out)
    job, images = _prepared(job, run, [config], out)
    planned = PlannedTrial(0, job.trial())

    def show(report: EpochReport) -> None:
        out.print(
            f"epoch {report.epoch}/{config.train.epochs}  val_acc {report.val_acc:.4f}  "
            f"val_loss {report.val_loss:.4f}  train_loss {report.train_loss:.4f}  "
            f"{report.images_per_second:.0f} images/s  {report.seconds:.0f} s"
        )

    interrupted = False
    with _begun(run, job, images, out) as (run, ended):
        directory = run.trial(planned.trial_id)
        try:
            if not ended:  # else only the end is missing
                with halting(has_reason=run.is_lost) as is_halted:
                    result = run_trial(
                        planned.config,
                        show,
                        trial_dir=directory.place,
                        images=which(images),
                        resume_from=directory.to_go_on_from(),
                        is_halted=is_halted,
                    )
                interrupted = result.state == "interrupted"
        except KeyboardInterrupt:
            interrupted = True
        except TlrunnerError:
            raise
        except Exception as err:
            directory.fail(err, planned.config)
            log.error("trial %s failed: %s", planned.trial_id, err, exc_info=err)
        return _finish(run, images, started, out, interrupted)


def prepare_images(job: PrepareJob, job_name: str, out: Console, dry_run: bool) -> int:
    """Write any source of images as shards. Gives the exit code."""
    cache_dir = job.data.cache_dir
    source = open_source(absolute(job.data.uri), labelled=False, cache_dir=cache_dir)
    if dry_run:
        out.print(f"{len(source)} images of {len(source.class_names)} classes in {source.uri}")
        return 0
    target = str(place_for(job.output, job_name, cache_dir))
    settings = WriteSettings(job.data.limit, **job.shards.model_dump())
    with preparing(out) as progress:
        manifest = write_shards(
            source,
            target,
            settings,
            max_bad_fraction=job.data.max_bad_fraction,
            progress=progress,
        )
    out.print(
        f"{manifest.num_images} images of {len(manifest.class_names)} classes in "
        f"{len(manifest.shards)} shards, {manifest.num_bad} unusable: {target}",
        soft_wrap=True,
    )
    return 0


def _prepared(
    job: AnyJob, run: RunDir, trials: Sequence[TrialConfig], out: Console
) -> tuple[AnyJob, Dataset]:
    """The job's images as shards, and the job with all that depends on them decided.

    Only what is known of the rows is read here: the shards themselves are read by the trials.
    """
    with preparing(out) as progress:
        shards = prepare(
            job.data.uri,
            job.data.cache_dir,
            max_bad_fraction=job.data.max_bad_fraction,
            progress=progress,
        )
    verify_shards(shards)  # every byte, once a run
    images = open_dataset(shards, streamed=True)
    splits = split_data(job.data, images)
    out.print(
        f"{len(splits.train)} images train, {len(splits.val)} validate, {len(splits.test)} test; "
        f"{len(images.class_names)} classes",
    )
    # What is decided by the machine stays so for a run, wherever it is continued.
    data = settle_streaming(settled_before(run, job.data), shards)
    preprocesses = [describe(t.backbone, t.data.image_size).preprocess for t in trials]
    data = settle_decoded_cache(data, images, splits, preprocesses)
    if data.streaming == "on":
        out.print(
            "images are streamed; each epoch shuffles 16 row groups at a time, and what is frozen "
            "is not reused"
        )
    if data.decoded_cache == "on":
        sides = sorted({short_side(preprocess) for preprocess in preprocesses})
        out.print(
            "images are decoded once; training crops are cut from a shorter side of at most "
            f"{', '.join(map(str, sides))} px"
        )
    return job.model_copy(update={"data": data}), images


@contextmanager
def _begun(
    run: RunDir,
    job: TrainJob,
    images: Dataset,
    out: Console,
) -> Iterator[tuple[RunDir, list[TrialRecord]]]:
    """The run's directory, ours from here on, with a log and the list of unusable images in it.

    Yields the trials that ended before, too.
    """
    sha256 = images.manifest.sha256
    with begun_run(run, job, sha256) as (run, ended):
        _log_to(run)
        copy_bad_images(images, run)
        kept = f": {len(ended)} trials are done already" if ended else ""
        out.print(f"run {run.place}{kept}", soft_wrap=True)
        if "runtime_resources" in str(run.place).split("/"):
            out.print(
                "note: this directory is Ray's copy of the job and goes when the job does; give "
                "--out an absolute path to keep the run",
                soft_wrap=True,
            )
        yield run, ended


def _granted(job: JobConfig, granted_resources: Grant, out: Console) -> JobConfig:
    """The job with the resources of a trial on the cluster."""
    resources, must_grow = granted_resources(job.resources)
    if must_grow:
        out.print(
            f"a trial of {resources.workers_per_trial} workers does not fit on the cluster yet: "
            "waiting for its autoscaler"
        )
    return job.model_copy(update={"resources": resources})


def _earlier_trials(job: JobConfig, out: Console) -> list[TrialRecord]:
    """The trials of the run that the search is to learn from.

    Raises:
        ConfigError: there are none.
    """
    if job.search.warm_start is None:
        return []
    records = read_trials(job.search.warm_start, job.data.cache_dir)
    usable = [
        record for record in records if record.best and located(job, record.config) is not None
    ]
    if not usable:
        raise ConfigError(
            f"search.warm_start is {job.search.warm_start}, and none of its {len(records)} trials "
            "lies in search.space",
            "the directory of a run with a like space",
        )
    out.print(f"TPE learns from {len(usable)} of the {len(records)} trials of that run")
    return usable


def _finish(
    run: RunDir,
    images: Dataset,
    started: float,
    out: Console,
    interrupted: bool,
    judging: Judging = Judging(),  # noqa: B008  (it is frozen)
) -> int:
    run.check_held()
    kept = ("tensorboard/**/*", "wandb/*run-*/**/*")
    run.place.save(*(f for name in kept for f in sorted(run.path.glob(name)) if f.is_file()))
    _save_log(run)
    summary = finish_run(
        run, images.manifest, time.monotonic() - started, judging, interrupted=interrupted
    )
    if interrupted:
        raise InterruptedRun(
            f"run {run.place} was interrupted",
            "",
            f"the same command with --name {run.path.name} continues it",
        )
    show_summary(summary, str(run.place), out)
    return exit_code(summary)


def _show_finished(run: RunDir, out: Console) -> int:
    check_finished(run)
    summary = read_summary(run.place)
    out.print(f"run {run.place} is finished already", highlight=False, soft_wrap=True)
    show_summary(summary, str(run.place), out)
    return exit_code(summary)


def _save_log(run: RunDir) -> None:
    """Put the log where the run is kept, as it is now: what fails on the way is added to it."""
    if run.uri and (run.path / LOG_NAME).exists():
        with TemporaryDirectory() as directory:
            copy = Path(shutil.copy(run.path / LOG_NAME, directory))
            run.place.store.put(LOG_NAME, copy, run.place.checked_fence)


class _LogFile(logging.FileHandler):
    """A log that cannot be written is not what fails a run: its results say that by themselves."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        pass


def _log_to(run: RunDir) -> None:
    """From here on the run's directory keeps what the terminal shows no more than a line of."""
    handler = _LogFile(run.path / LOG_NAME, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
