"""Does any fault lose a trial, run one twice, hang, or pass for a success?

    python jobs/bench_faults.py [--faults 200] [--seed N] [--kinds driver,storage]

Starts searches of four short trials with `jobs/tune_flowers.py`, two at once, breaks them as drawn
from the seed, and starts the same command again until it ends with 0. Kinds of fault:

    trial, worker  SIGKILL of a process that trains; a worker is one of two of its trial
    driver         SIGKILL of the command
    sigterm        SIGTERM to it: ends with 75 within 30 s, its trials behind new checkpoints
    node, head     SIGKILL of the raylet of a node, or of GCS and raylet of the head: within 60 s
                   the command ends by itself, and goes on on a new cluster
    storage        the run is in S3, which for some seconds refuses all or some requests
    disk           the run is on a file system that has no room left for some seconds
    double         the command twice at once: one of them ends with 75, the other goes on
    clock          SIGKILL of the command, which starts again a day later or earlier

Promised, and checked behind each of them: no trial is lost; none that was told as done is computed
again; `_SUCCESS` and exit code 0 only where all reads back; something new within each 60 s; what is
computed again came behind the newest checkpoint, and there is one for each
`train.checkpoint_seconds` (0.5 s here, and 5 s of tolerance). Ends with 1 if one was broken. Needs
`moto[server]` and, for full disks, root. What is drawn is the same for a seed, what a fault meets
is not.

Measured on 2 cores, 200 faults, twenty of each kind: 3071 s, no violation; at most 1.5 s of
training were done again, and the newest checkpoint was at most 1.8 s old.
"""

import argparse
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from bench_faults_ground import (
    NODE,
    Ground,
    can_mount,
    clock_off,
    end_processes,
    ground,
    s3_server,
    write_clock,
)
from bench_faults_search import INTERRUPTED, Search
from bench_faults_verdict import END, HANG, LATE, LOST, StoppedError, Verdict, print_table

RECOVER_SECONDS = 180.0  # for a trial to train again behind a fault, where it is slow
# Searches; much of their time is spent in waiting for something to be noticed. Four at once took as
# long on 2 cores, 360 s for 20 faults, as their starts then wait for each other.
AT_ONCE = 3
MOST_STARTS = 40  # before a search is given up
DAY_SECONDS = 86_400


# -- Faults ----------------------------------------------------------------------------------------
def kill_trial(search: Search, place: Ground, chance: random.Random) -> str:
    title = "TrainWorker" if search.kind == "worker" else "ImplicitFunc.train"
    pids = search.pids(title)
    if not pids:
        return "none was there"
    pid = chance.choice(pids)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return f"1 of {len(pids)} killed"


def kill_driver(search: Search, place: Ground, chance: random.Random) -> str:
    search.kill()
    return "killed"


def terminate_driver(search: Search, place: Ground, chance: random.Random) -> str:
    training = [trial_id for trial_id, trial in search.trials.items() if trial.was_training]
    struck_at = time.monotonic()
    search.process.terminate()
    search.wait(lambda: not search.is_running, 30)
    seconds = time.monotonic() - struck_at
    if search.is_running:
        search.note(END, f"still there {seconds:.0f} s after SIGTERM")
        search.kill()
    search.look()
    for trial_id in training:
        trial = search.trials[trial_id]
        halted = trial.events[-1] if trial.events else {}
        is_behind = (halted.get("event"), halted.get("step")) == ("halted", trial.newest)
        if not (trial.done or is_behind or trial.newest_at > struck_at):
            search.note(LATE, f"trial {trial_id} left none on SIGTERM")
    return f"ended with {search.process.returncode} in {seconds:.1f} s"


def kill_node(search: Search, place: Ground, chance: random.Random) -> str:
    name, node = list(place.nodes.items())[-1]
    place.kill_node(name)
    node.wait()
    place.start_node(search.look)
    return "killed, and there is another"


def kill_head(search: Search, place: Ground, chance: random.Random) -> str:
    """What comes next to the command is a new cluster, which starts while the old one ends."""
    old, place.nodes = place.nodes, {}
    place.kill_node(next(iter(old)))
    ended_at: list[float] = []

    def look() -> None:
        search.look()
        if not (search.is_running or ended_at):
            ended_at.append(time.monotonic())

    for _ in range(2):
        place.start_node(look)
    search.wait(lambda: not search.is_running, search.fault_at + 60 - time.monotonic())
    look()
    seconds = (ended_at or [time.monotonic()])[0] - search.fault_at
    if search.is_running:
        search.note(END, f"the command is still there {seconds:.0f} s after the head")
        search.kill()
    for name, node in old.items():
        end_processes(NODE, name)
        node.wait()
    return f"the command ended with {search.process.returncode} in {seconds:.1f} s"


def refuse_requests(search: Search, place: Ground, chance: random.Random) -> str:
    assert place.proxy
    all_of_them, some = {"500": 0.5, "reset": 0.5}, {"500": 0.1, "503": 0.1, "half": 0.1}
    rates = chance.choice([all_of_them, some])
    seconds = chance.uniform(1, 12)
    before = place.proxy.injected.total()
    place.proxy.rates = rates
    search.wait(lambda: False, seconds)
    place.proxy.rates = {}
    num_refused = place.proxy.injected.total() - before
    return f"{sum(rates.values()):.0%} refused for {seconds:.1f} s, {num_refused} requests"


def fill_disk(search: Search, place: Ground, chance: random.Random) -> str:
    seconds = chance.uniform(2, 8)
    place.resize(chance.choice([0, 1 << 20, 5 << 20]))
    search.wait(lambda: False, seconds)
    place.resize(1 << 30)
    return f"full for {seconds:.1f} s"


def start_twice(search: Search, place: Ground, chance: random.Random) -> str:
    """A second start beside the first, or both of them behind the end of a third."""
    at_once = chance.random() < 0.5
    if at_once:
        search.kill()
        search.process = search.start()
    first, second = search.process, search.start()
    is_one_over = lambda: first.poll() is not None or second.poll() is not None  # noqa: E731
    search.wait(is_one_over, 60)
    ended, other = (first, second) if second.poll() is None else (second, first)
    search.process = other
    is_well = ended.poll() == INTERRUPTED or (ended.poll() == 0 and search.is_done)
    if not is_well:
        search.note(END, f"of two starts one ended with {ended.poll()}, not {INTERRUPTED}")
    if ended.poll() is None:
        ended.kill()
        ended.wait()
    return f"{'both' if at_once else 'one more'} started; one ended with {ended.returncode}"


def shift_clock(search: Search, place: Ground, chance: random.Random) -> str:
    days = chance.choice([-1, 1])
    search.kill()
    search.process = search.start(clock_off(place, days * DAY_SECONDS))
    return f"killed, and started {days:+} day"


FAULTS: dict[str, Callable[[Search, Ground, random.Random], str]] = {
    "trial": kill_trial,
    "worker": kill_trial,
    "driver": kill_driver,
    "sigterm": terminate_driver,
    "node": kill_node,
    "head": kill_head,
    "storage": refuse_requests,
    "disk": fill_disk,
    "double": start_twice,
    "clock": shift_clock,
}
HOMES = {  # of those that take more than a command; the others are at home everywhere
    "worker": "workers",
    "node": "cluster",
    "head": "cluster",
    "storage": "s3",
    "disk": "disk",
}
MOST_FAULTS = {"local": 6, "workers": 3, "cluster": 6, "s3": 6, "disk": 6}  # of one search
STARTS_ANEW = ("trial", "worker", "node")  # within the same command


# -- Searches --------------------------------------------------------------------------------------
def planned(
    num_faults: int, kinds: Sequence[str], chance: random.Random
) -> list[tuple[str, list[str]]]:
    """Faults, each kind as often as the others, in searches: the ground of each, and its faults."""
    drawn = [kinds[number % len(kinds)] for number in range(num_faults)]
    searches: list[tuple[str, list[str]]] = []
    for kind in sorted(drawn, key=lambda kind: kind not in HOMES):
        fitting = [
            faults
            for name, faults in searches
            if HOMES.get(kind, name) == name and len(faults) < MOST_FAULTS[name]
        ]
        if fitting:
            min(fitting, key=len).append(kind)
        else:
            searches.append((HOMES.get(kind, "local"), [kind]))
    for _, faults in searches:
        chance.shuffle(faults)
    return searches


def besiege(place: Ground, name: str, faults: list[str], seed: int, verdict: Verdict) -> None:
    """One search with its faults; those that come before its end are taken off the list."""
    chance = random.Random(f"{seed} {name}")
    directory = place.root / "searches" / name
    directory.mkdir(parents=True)
    uri = f"{place.runs}/{name}"
    search = Search(uri, place.tree(), place.environment, directory, verdict)
    since, starts_anew = search.born_at, False
    while trains(search, since, starts_anew):
        search.wait(lambda: False, chance.uniform(0, 2) if faults else math.inf)
        since, starts_anew = search.fault_at, False
        if not (faults and search.is_running and search.training()):
            continue
        kind, num_broken = faults.pop(0), len(search.broken)
        search.strike(kind)
        followed = FAULTS[kind](search, place, chance)
        since = search.over_at = time.monotonic()
        starts_anew = kind in STARTS_ANEW
        is_training = trains(search, since, starts_anew)
        seconds = time.monotonic() - search.fault_at
        lines = [
            f"{name:11} {search.fault_at - search.born_at:4.0f} s  {kind:8} {followed}; "
            f"{'trained again' if is_training else 'was at its end'} after {seconds:.1f} s",
            *(f"    {text}" for text in search.broken[num_broken:]),
        ]
        print("\n".join(lines), flush=True)
        if not is_training:
            break


def trains(search: Search, since: float, starts_anew: bool) -> bool:
    """See the search train, started again as often as needed; False where it is at its end."""
    while search.num_starts < MOST_STARTS:
        if search.is_running:
            if search.wait(lambda: search.trains(since, starts_anew), RECOVER_SECONDS):
                return True
            if search.is_running:
                search.note(HANG, f"no trial trains {RECOVER_SECONDS:.0f} s behind the fault")
                return True
        if search.has_ended():
            return False
        search.process = search.start()
    search.note(LOST, f"given up behind {MOST_STARTS} starts: {search.last_line()}")
    return False


def stop(signum: int, frame: object) -> None:
    print("SIGTERM: clearing up", flush=True)
    sys.exit(128 + signum)


def main() -> int:
    parser = argparse.ArgumentParser(description="Break searches, and see what is lost.")
    parser.add_argument("--faults", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, help="of what is broken when; drawn if not given")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="some of these, with commas")
    flags = parser.parse_args()
    kinds = flags.kinds.split(",")
    if unknown := set(kinds) - FAULTS.keys():
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}")
    seed = flags.seed if flags.seed is not None else random.SystemRandom().randrange(2**31)
    print(f"seed {seed}", flush=True)
    verdict, started = Verdict(), time.monotonic()
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="tlrf", ignore_cleanup_errors=True) as directory:
        root = Path(directory)
        if "disk" in kinds and not can_mount(root):
            print("disk: left out, no file system can be mounted here")
            kinds.remove("disk")
        write_clock(root)
        searches = list(enumerate(planned(flags.faults, kinds, random.Random(seed))))

        def run(numbered: tuple[int, tuple[str, list[str]]]) -> None:
            number, (name, faults) = numbered
            with suppress(StoppedError), ground(name, number, root) as place:
                while faults:
                    besiege(place, f"{name}-{number}-{len(faults)}", faults, seed, verdict)

        with s3_server(), ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                list(pool.map(run, searches))
            finally:
                verdict.is_over.set()
                pool.shutdown(cancel_futures=True)
    print_table(verdict)
    seconds = time.monotonic() - started
    print(f"{verdict.faults.total()} faults in {seconds:.0f} s, {len(verdict.broken)} violations")
    for kind, promise, text in verdict.broken:
        print(f"{kind}: {promise}: {text}")
    if verdict.broken:
        again = f"--faults {flags.faults} --seed {seed} --kinds {','.join(kinds)}"
        print(f"to draw the same faults again: python jobs/bench_faults.py {again}")
    return 1 if verdict.broken else 0


if __name__ == "__main__":
    sys.exit(main())
