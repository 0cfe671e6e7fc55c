"""How fast does a file come from S3, against plain boto3 with the same ranges and threads?

    python jobs/bench_store.py --data s3://BUCKET/KEY        (with the usual AWS_* variables)

All read the object in ranges of 8 MiB, by four threads a CPU, in turns. The plain peers use a
client of boto3 as it is and repeat nothing: one writes each range to its place in a file, as
tlrunner does, the other throws it away. tlrunner is measured without digests and with a SHA-256
known for each range, as a manifest gives it. The file is written to `data.cache_dir`: take a
directory in memory, lest a disk decides. Prints medians of MB/s, and of the ratios within each
round.

Measured on 2 CPU cores that also ran the server, 256 MiB, 30 ms of latency and 90 MB/s a
connection, twice 15 rounds of 40 s in all: 1.04 times the speed of plain boto3 that writes (about
510 MB/s); with digests 0.92 and 0.93 times. SHA-256 costs 0.7 s of a core for each GB, and here no
core is idle. What helped: a thread more for each CPU, since those that hash leave their connection
idle (from 0.89). Tried and did not help: reading in blocks of 64 KiB to 1 MiB and hashing each
while it is in the CPU's cache takes as many CPU seconds. With 16 connections on the 2 cores it was
0.64 to 0.77: more came in than they could take.
"""

import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import boto3
from botocore.config import Config
from rich.console import Console

from tlrunner.cli import run_job
from tlrunner.data.fetch import download, num_threads, open_store, ranges
from tlrunner.data.store import Part, Store
from tlrunner.errors import ConfigError, StorageError
from tlrunner.jobconfig import TrainJob

ROUNDS = 15


def bench(job: TrainJob, job_name: str, out: Console, dry_run: bool) -> int:
    parent, _, name = job.data.uri.rpartition("/")
    if not parent.startswith("s3://"):
        raise ConfigError(f"data.uri is '{job.data.uri}'", "s3://BUCKET/KEY", "pass --data")
    if dry_run:
        out.print(f"{ROUNDS} rounds of reading {job.data.uri} in each way")
        return 0
    store = open_store(parent)
    num_bytes = store.size(name)
    if not num_bytes:
        raise StorageError(f"there is nothing at '{job.data.uri}'")
    with tempfile.TemporaryDirectory(dir=_existing(job.data.cache_dir)) as directory:
        ways = _ways(store, parent, name, ranges(num_bytes), Path(directory) / "file")
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(ROUNDS + 1):
            names = list(ways)
            for way in names[number % len(names) :] + names[: number % len(names)]:
                started = time.perf_counter()
                ways[way]()
                seconds[way].append(time.perf_counter() - started)
                (Path(directory) / "file").unlink(missing_ok=True)
    _print(out, num_bytes, {way: values[1:] for way, values in seconds.items()})
    return 0


def _ways(
    store: Store, parent: str, name: str, parts: list[Part], path: Path
) -> dict[str, Callable[[], None]]:
    bucket, _, prefix = parent.removeprefix("s3://").partition("/")
    client = boto3.client("s3", config=Config(max_pool_connections=num_threads()))

    def get(part: Part) -> bytes:
        wanted = f"bytes={part.start}-{part.start + part.num_bytes - 1}"
        answer = client.get_object(Bucket=bucket, Key=f"{prefix}/{name}".lstrip("/"), Range=wanted)
        content: bytes = answer["Body"].read()
        return content

    def write_plainly() -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        with ThreadPoolExecutor(num_threads()) as pool:
            list(pool.map(lambda part: os.pwrite(file, get(part), part.start), parts))
        os.close(file)

    def read_plainly() -> None:
        with ThreadPoolExecutor(num_threads()) as pool:
            list(pool.map(lambda part: len(get(part)), parts))

    known = [replace(part, sha256=hashlib.sha256(get(part)).hexdigest()) for part in parts]
    return {
        "tlrunner": lambda: download(store, name, path, parts),
        "tlrunner, SHA-256 checked": lambda: download(store, name, path, known),
        "plain boto3, written": write_plainly,
        "plain boto3, thrown away": read_plainly,
    }


def _existing(directory: str) -> Path:
    path = Path(directory).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def _print(out: Console, num_bytes: int, seconds: dict[str, list[float]]) -> None:
    ours = [way for way in seconds if way.startswith("tlrunner")]
    for way, values in seconds.items():
        line = f"{way:26} {num_bytes / 1e6 / statistics.median(values):7.0f} MB/s"
        for own in ours if way not in ours else ():
            ratios = [plain / mine for plain, mine in zip(values, seconds[own], strict=True)]
            line += f"; {own} has {statistics.median(ratios):.3f} of it"
            line += f" ({min(ratios):.3f} to {max(ratios):.3f})"
        out.print(line, highlight=False)


if __name__ == "__main__":
    sys.exit(run_job(Path(__file__).stem, TrainJob, bench))
