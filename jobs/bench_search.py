"""How long does a search over given trials take, beside a script that does not reuse frozen work?

    python jobs/bench_search.py --trials '[{"frozen": "head", "lr": 0.003}]' --data DIR --out DIR
        [--peer SCRIPT] [--rounds 3]

A trial is `{"frozen": what, "lr": rate}`: `"head"` freezes the whole EfficientNet-Lite0, a number
so many of its layers from the stem up, counted as stem, stem norm, seven block groups, last
convolution and its norm; 0 trains all. They run through the search of the jobs, on 800 images of
128 px for 3 epochs if `--set` says nothing else, each round as a command of its own, so that every
second from its start to its end counts, and with a seed of its own. `--peer` is a script that takes
`DATA EPOCHS TRIALS LIMIT IMAGE_SIZE OUT` and prints `{"wall": seconds, "accs": [...]}`; it runs in
turns with ours, with half a minute of start-up that it does not count.

Against a script of Ray Tune, Accelerate and ImageFolder with a process for each trial, on 800 of
3,264 photos of flowers and 2 CPU cores with AVX-512, without a GPU; the median of three rounds,
its seconds, and the least and the most of all rounds:

    8 trials of the head alone                          19 s to 168 s: 8.8 times (7.6 to 9.3)
    4 of the head, 2 with 6 layers frozen, 2 of all     64 s to 178 s: 2.9 times (2.8 to 3.4)
    2 of the head, 9, 8, 7 and 6 layers frozen          29 s to 112 s: 3.9 times (2.9 to 4.0)

On slower cores with AVX2: 8.1, 2.1 and 2.6 times (38 s, 183 s and 101 s), before what is kept was
decided for all cuts together, which took the last from 42 s to 29 s here. Mean best accuracy was
0.90 to 0.92, that of the script 0.80 to 0.87. 64 learning rates and decays take 1.16 times the time
of 8. As work grows, in seconds:

    images          500    1,000    3,000
      1 trial      14.9     18.2     32.7
      8 trials     14.9     16.1     26.0
    100 trials     19.1     21.1     31.1

Of the 16 s that 8 trials take on a quiet machine, 9 pass before an image is computed: 2.5 importing
torch in the command, 3.5 for Ray to start, 3 for processes for trials to start and import it again.
The prefix computes 2,080 images in 4 s, and Ray takes 1.4 s to end.

What did not help: Ray started by a thread while the command imports (2 s less; the thread has to
live as long as Ray), Ray's `preload_python_modules`, processes warmed by a task (an actor takes
none that ran one), one trial at a time with both cores. BatchNorm folded into convolutions makes
the prefix 1.55 times as fast, and not the same to the bit.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tlrunner.cli import run_job
from tlrunner.jobconfig import JobConfig

DEFAULTS = {
    "data.limit": 800,
    "data.image_size": 128,
    "train.epochs": 3,
    "augment.crop_scale": [0.6, 1.0],
    "search.algorithm": "grid",
}


def num_trained(frozen: int) -> int:
    """Stages of ours that train where so many of the 11 layers are frozen.

    We have a convolution and its norm in one stage: 9 stages, and a stage with any layer that
    trains does train.
    """
    return 10 - min(max(frozen, 1), 9)


def point_of(trial: dict[str, Any]) -> dict[str, Any]:
    """The values of a trial as dotted keys."""
    frozen = trial["frozen"]
    freeze: dict[str, Any] = {"freeze.strategy": "full"}
    if frozen in ("head", 11):
        freeze = {"freeze.strategy": "head"}
    elif frozen > 1:
        freeze = {"freeze.strategy": "last_stages", "freeze.num_stages": num_trained(frozen)}
    others = {key: value for key, value in trial.items() if key not in ("frozen", "lr")}
    return {**freeze, "optim.lr": trial["lr"], **others}


def ours(
    flags: argparse.Namespace, others: list[str], directory: Path, seed: int
) -> tuple[float, float]:
    """Seconds of the command and the best accuracy; nothing is kept from an earlier round."""
    points = [point_of(trial) for trial in json.loads(flags.trials)]
    settings = {
        **DEFAULTS,
        "train.seed": seed,
        "search.points": points,
        "data.cache_dir": str(directory / "cache"),
    }
    command = [sys.executable, __file__, "--search", "--data", flags.data]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    started = time.perf_counter()
    named = ["--out", str(directory), "--name", "run"]
    subprocess.run([*command, *others, *named], check=True)
    seconds = time.perf_counter() - started
    summary = json.loads((directory / "run" / "summary.json").read_text())
    return seconds, float(summary["best"]["val_acc"])


def peer(flags: argparse.Namespace, directory: Path) -> tuple[float, float]:
    """Likewise for the peer."""
    epochs, limit, size = (
        str(DEFAULTS[key]) for key in ("train.epochs", "data.limit", "data.image_size")
    )
    command = [sys.executable, flags.peer, flags.data, epochs, flags.trials, limit, size]
    done = subprocess.run([*command, str(directory)], check=True, stdout=subprocess.PIPE, text=True)
    told = json.loads(done.stdout.strip().splitlines()[-1])
    return float(told["wall"]), max(float(acc) for acc in told["accs"] if acc is not None)


def bench(flags: argparse.Namespace, others: list[str]) -> None:
    results: dict[str, list[tuple[float, float]]] = {"tlrunner": []}
    for number in range(flags.rounds):
        with tempfile.TemporaryDirectory(dir=flags.out) as directory:
            results["tlrunner"].append(ours(flags, others, Path(directory), number))
            if flags.peer:
                results.setdefault("peer", []).append(peer(flags, Path(directory) / "peer"))
        for name, rounds in results.items():
            print(f"round {number + 1}: {name} {rounds[-1][0]:.1f} s, best {rounds[-1][1]:.4f}")
    for name, rounds in results.items():
        seconds = statistics.median(seconds for seconds, _ in rounds)
        accuracy = statistics.mean(accuracy for _, accuracy in rounds)
        print(f"{name:9} {seconds:7.1f} s, mean best accuracy {accuracy:.4f}")
    if flags.peer:
        pairs = zip(results["tlrunner"], results["peer"], strict=True)
        ratios = [theirs[0] / mine[0] for mine, theirs in pairs]
        print(
            f"tlrunner is {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    if "--search" in sys.argv:
        sys.argv.remove("--search")
        sys.exit(run_job(Path(__file__).stem, JobConfig, "tlrunner.run:tune"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", required=True, help="JSON list of {frozen, lr}")
    parser.add_argument("--data", required=True, help="an ImageFolder directory")
    parser.add_argument("--out", required=True, help="directory for runs, which are removed again")
    parser.add_argument("--peer", help="script to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    bench(*parser.parse_known_args())
