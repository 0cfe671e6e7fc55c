"""What does a search cost beside its trials, and does its driver grow?

    python jobs/bench_overhead.py [--set search.budget.num_trials=200]

Two searches on one local Ray cluster, in turns, of trials that do almost nothing: report one epoch
and end. The peer is a plain Ray Tune function, one CPU each, in reused actors, without any of Ray's
loggers, that imports what any trial of images needs (accelerate, torchvision). Ours is the
search of the jobs, with its points, budget, table, trackers and trial directories, around a trial
that only writes its record. Prints the wall seconds of each, medians and the ratio within each
round, and the resident memory of the driver as trials go by.

Measured on 2 cores, 200 trials, 3 rounds: 2.74 times as long (2.73 to 2.78; 14.9 s to 5.4), 48 ms
more a trial; driver at trial 100 and at the end 989 and 998 MiB. Before, it was 1.18, to a peer
that took 14.8 s; that it imported timm makes 0.6 s of it, the rest is not explained. It was 1.87
then while the actor's function imported torch when unpickled: Ray gives trials to actors that are
ready, so the first one did nearly all of them.
"""

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from ray import tune
from rich.console import Console

from tlrunner.cli import run_job
from tlrunner.jobconfig import JobConfig
from tlrunner.signals import Halt
from tlrunner.train.images import Images
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import EpochReport, TrialDir
from tlrunner.tune import search as search_module
from tlrunner.tune.cluster import connected_to_ray, granted_resources
from tlrunner.tune.search import Search, run_search
from tlrunner.tune.space import num_trials_of
from tlrunner.tune.trainable import Trials, planned_trial, report

ROUNDS = 3
SPACE = {"optim.lr": ({"loguniform": (1e-5, 1e-1)},)}
REPORT = EpochReport(1, 0.5, 1.0, 1.0, 100.0, 10, 20, 0.01, 0.1, None)


def bench(job: JobConfig, job_name: str, out: Console, dry_run: bool) -> int:
    tree = job.model_dump()
    tree["search"]["space"] = SPACE
    tree["train"]["epochs"] = 1
    job = JobConfig.model_validate(tree)
    num_trials = num_trials_of(job)
    assert num_trials is not None, "a benchmark of a number of trials"
    if dry_run:
        out.print(f"{ROUNDS} rounds of {num_trials} trials in each way")
        return 0
    seconds: dict[str, list[float]] = {"plain Ray Tune": [], "tlrunner": []}
    with connected_to_ray(job.log.level):
        resources, _ = granted_resources(job.resources)
        job = job.model_copy(update={"resources": resources})
        for number in range(ROUNDS):
            ways = {"plain Ray Tune": _plain, "tlrunner": _ours}
            for name in sorted(ways, reverse=bool(number % 2)):
                with tempfile.TemporaryDirectory() as directory:
                    started = time.perf_counter()
                    ways[name](job, num_trials, Path(directory), out)
                    seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        out.print(f"{name:16} {statistics.median(values):6.1f} s ({each})", highlight=False)
    ratios = [ours / plain for plain, ours in zip(*seconds.values(), strict=True)]
    out.print(
        f"tlrunner takes {statistics.median(ratios):.2f} times as long "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        highlight=False,
    )
    return 0


def _plain(job: JobConfig, num_trials: int, directory: Path, out: Console) -> None:
    def trial(config: dict[str, Any]) -> None:
        import accelerate  # noqa: F401
        import torchvision  # noqa: F401

        tune.report(asdict(REPORT))

    tune.Tuner(
        tune.with_resources(trial, {"cpu": job.resources.cpus_per_worker}),
        param_space={"number": tune.grid_search(list(range(num_trials)))},
        tune_config=tune.TuneConfig(metric="val_acc", mode="max", reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(directory), verbose=0),
    ).fit()


def _ours(job: JobConfig, num_trials: int, directory: Path, out: Console) -> None:
    run = Place(directory)
    search = Search(job, num_trials, time.monotonic(), run, Images("", ""), Halt())
    samples: list[tuple[int, float]] = []
    done = threading.Event()
    watching = threading.Thread(target=_watch, args=(run.path / "trials", samples, done))
    watching.start()
    with mock.patch.object(search_module, "build_trainable", _idle):
        run_search(search, Console(file=StringIO()))
    done.set()
    watching.join()
    ended = [TrialDir(path).read().state for path in (run.path / "trials").iterdir()]
    assert ended == ["completed"] * num_trials, "every trial ran"
    half = [mib for count, mib in samples if count >= num_trials // 2]
    out.print(
        f"driver: {half[0]:.0f} MiB at trial {num_trials // 2}, {half[-1]:.0f} MiB at the end, "
        f"at most {max(half):.0f}",
        highlight=False,
    )


def _idle(trials: Trials, bell: Any) -> Callable[[dict[str, Any]], None]:
    """A trial without its training."""

    def trainable(values: dict[str, Any]) -> None:
        from tlrunner.train.trial import run_trial  # noqa: F401
        from tlrunner.train.trial_dir import EpochReport, TrialDir

        finished = EpochReport(**figures)
        planned = planned_trial(trials.job, values)
        directory = TrialDir(trials.place.below(planned.trial_id))
        directory.begin(planned.config)
        directory.append(finished)
        report(finished)

    figures = asdict(REPORT)
    return trainable


def _watch(trials: Path, samples: list[tuple[int, float]], done: threading.Event) -> None:
    """Resident memory of this process in MiB, with the number of trials that have begun."""
    while not done.wait(0.5):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        count = len(list(trials.iterdir())) if trials.exists() else 0
        samples.append((count, pages * 4096 / 2**20))


if __name__ == "__main__":
    sys.exit(run_job(Path(__file__).stem, JobConfig, bench))
