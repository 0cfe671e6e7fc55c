"""How fast do training images come, against decoding alone, and against other loaders?

    python jobs/bench_input.py [--data DIR] [--set bench.cores=2] [--set bench.rounds=5]

Photos of three sizes that it makes itself, and those of --data, are read as batches of 64 random
crops at 224 px, uint8. Each loader runs in processes of its own, in turns; what it prefetched while
it waited is taken out first. Prints medians of ratios: to one core that does nothing but decode the
same JPEGs in full with simplejpeg (libjpeg-turbo), and to ImageFolder with PIL on as many cores.
The last column is the first one in images per second of CPU time, which other work on the machine
disturbs less. Loaders that are not installed are left out.

Measured on 2 cores, in 3 rounds (2 for the other containers at 2000x1500), about 2 minutes a set;
two cores unless "1 thread" is said. Those of tlrunner and ImageFolder were measured on an idle
machine, the others on one that was used. Medians, of decoding alone on one core:

                                   227x227 photos, 11 KiB   227x227   500x375   2000x1500
    tlrunner, 1 thread             0.65                     0.68      0.83      1.25
    tlrunner                       1.03                     1.19      1.58      2.54
    tlrunner, decoded cache        2.77                     3.18      15.6      141
    ImageFolder, PIL               0.29                     0.32      0.74      0.78
    ImageFolder, PIL, float32                               0.18      0.55      0.99
    webdataset, PIL                0.26                     0.19      0.81      0.79
    litdata, PIL                   0.28                     0.21      0.75
    Hugging Face streaming, PIL    0.26                     0.17      0.67
    webdataset, cv2                0.72                     0.60      1.36      2.13
    litdata, cv2                   0.79                     0.82      1.43
    Hugging Face streaming, cv2    0.70                     0.76      1.09
    Ray Data, cv2                                                     0.10

Tried, and did not help: decoding into a buffer that is kept (no difference); 5 to 7 eighths of a
JPEG's size (slower than all of it); OpenCV's area average (4 times slower than a blur before a
linear resize, and farther from Pillow's filter); Pillow's resize of a box with fractions (1.6
instead of 2.4 levels off, at twice the time of a warp); chunks of 32 or 64 images instead of 16.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, set_start_method
from pathlib import Path

import cv2
import numpy as np
import psutil
import simplejpeg
import torch
from bench_input_peers import FOLDER, LIMIT, PEERS, is_installed, write_files
from pydantic import Field
from rich.console import Console
from rich.table import Table

from tlrunner.cli import run_job
from tlrunner.data.sources import open_source
from tlrunner.jobconfig import LogConfig
from tlrunner.section import Section

# width, height -> how many, and the quality that makes their bytes those of photos of this size
MADE = {(227, 227): (512, 83), (500, 375): (256, 95), (2000, 1500): (64, 85)}
UNTIMED_BATCHES = 8  # more than any loader holds ready


class InputImages(Section):
    uri: str = Field("sample:flowers", min_length=1)
    """Images as in every job; of these, the JPEGs are read."""
    limit: int = Field(512, ge=64)
    """Read no more than these."""


class InputBench(Section):
    rounds: int = Field(5, ge=1)
    """Turns of each loader."""
    seconds: float = Field(2.0, gt=0)
    """Length of a turn, at the least: four batches are."""
    cores: int = Field(2, ge=1)
    """Threads or worker processes of a loader; all run on that many cores."""
    peers: str = ""
    """Measure only loaders with one of these in their names, between commas, and the two that are
    compared with."""
    sets: str = ""
    """Read only sets of images that have this in their name, e.g. 500x375."""


class InputBenchJob(Section):
    data: InputImages = InputImages()
    bench: InputBench = InputBench()
    log: LogConfig = LogConfig()


def bench(job: InputBenchJob, job_name: str, out: Console, dry_run: bool) -> int:
    config = job.bench
    parts = [LIMIT, FOLDER, *config.peers.split(",")]
    wanted = [name for name in PEERS if any(part in name for part in parts)]
    peers = [name for name in wanted if is_installed(name)]
    if missing := set(wanted) - set(peers):
        out.print(f"not installed: {'; '.join(sorted(missing))}")
    if dry_run:
        out.print(f"{config.rounds} rounds of: {'; '.join(peers)}")
        return 0
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.cores])
    for name, images in image_sets(job.data):
        if config.sets in name:
            measure(name, list(images), peers, config, out)
    return 0


def image_sets(data: InputImages) -> Iterator[tuple[str, Iterator[bytes]]]:
    source = open_source(data.uri, labelled=False)
    step = max(1, len(source) // data.limit)
    read = (source.read(number) for number in range(0, len(source), step))
    yield data.uri, (image for image in read if simplejpeg.is_jpeg(image))
    for (width, height), (count, quality) in MADE.items():
        yield f"{width}x{height}", (photo(width, height, seed, quality) for seed in range(count))


def photo(width: int, height: int, seed: int, quality: int) -> bytes:
    """A JPEG of smooth noise in which, as in a photo, the coarse outweighs the fine."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 120, np.float32)
    for cells, strength in ((4, 45), (16, 25), (64, 14), (max(width, height) // 3, 8)):
        coarse = random.normal(size=(max(2, cells * height // width), cells, 3)).astype(np.float32)
        pixels += strength * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels += random.normal(size=(height, width, 1)) * 5  # the grain of a sensor
    levels = np.clip(pixels, 0, 255).astype(np.uint8)
    return bytes(simplejpeg.encode_jpeg(levels, quality=quality, colorsubsampling="420"))


def measure(
    name: str, images: list[bytes], peers: list[str], config: InputBench, out: Console
) -> None:
    """Run all peers in turns on one set of images, and print their ratios."""
    turns: dict[str, list[tuple[float, float]]] = {peer: [] for peer in peers}
    with tempfile.TemporaryDirectory() as root:
        write_files(images, Path(root))
        spawn = get_context("spawn")
        processes = {
            peer: ProcessPoolExecutor(1, spawn, _start, (peer, root, config.cores))
            for peer in peers
        }
        try:
            for _ in range(config.rounds):
                for peer, process in processes.items():
                    turns[peer].append(process.submit(_turn, config.seconds).result())
        finally:
            for process in processes.values():
                process.submit(_end)
    out.print(_table(name, images, turns))


def _table(name: str, images: list[bytes], turns: dict[str, list[tuple[float, float]]]) -> Table:
    size = sum(map(len, images)) / len(images) / 2**10
    title = f"{name}: {len(images)} JPEGs of {size:.0f} KiB"
    table = Table(
        "loader", "of decoding", "of ImageFolder", "of decoding, by CPU time", title=title
    )
    for peer, of_peer in turns.items():
        ratios = [
            [mine[kind] / base[kind] for mine, base in zip(of_peer, turns[against], strict=True)]
            for against, kind in ((LIMIT, 0), (FOLDER, 0), (LIMIT, 1))
        ]
        table.add_row(peer, *(_spread(ratio) for ratio in ratios))
    return table


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


# -- In a peer's process ---------------------------------------------------------------------------

_batches: Iterator[int]


def _start(peer: str, root: str, cores: int) -> None:
    global _batches
    if sys.platform == "linux":  # a spawned process would spawn its workers, unlike a user's script
        set_start_method("fork", force=True)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    _batches = PEERS[peer](Path(root), cores)


def _turn(seconds: float) -> tuple[float, float]:
    """Images per second, and per second of CPU time of this process and those it started."""
    for _ in range(UNTIMED_BATCHES):
        next(_batches)
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    num_images = num_batches = 0
    while num_batches < 4 or time.perf_counter() - started < seconds:
        num_images += next(_batches)
        num_batches += 1
    speeds = (
        num_images / (time.perf_counter() - started),
        num_images / (_cpu_seconds() - cpu_started),
    )
    _wait_until_idle()
    return speeds


def _wait_until_idle() -> None:
    """A loader goes on until it holds all that it may hold: not in the turn of the next one."""
    before = _cpu_seconds()
    for _ in range(60):
        time.sleep(0.3)
        now = _cpu_seconds()
        if now - before < 0.06:
            return
        before = now


def _cpu_seconds() -> float:
    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # a worker whose epoch is over
            continue
        total += times.user + times.system
    return total


def _end() -> None:
    for process in psutil.Process().children(recursive=True):
        process.terminate()
    os._exit(0)  # loaders that others wrote may wait for ever


if __name__ == "__main__":
    sys.exit(run_job(Path(__file__).stem, InputBenchJob, bench))
