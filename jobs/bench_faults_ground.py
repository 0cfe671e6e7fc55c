"""Where the searches of `bench_faults.py` run, and what can be broken there.

A local Ray, with one or two workers a trial; a Ray cluster of two nodes; a run in S3, behind a
proxy that spoils requests; a run on a file system whose size can be changed.
"""

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import boto3

from tlrunner.tune.cluster import START_SETTINGS

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))  # has the one proxy that spoils S3; it needs nothing else
from fault_proxy import FaultProxy  # noqa: E402

BUCKET = "faults"
ROOMY_BYTES = 1 << 30
CHECKPOINT_SECONDS, EPOCHS, NUM_TRIALS = 0.5, 10, 4
LOOK_SECONDS = 0.2
MARK = "TLRUNNER_FAULTS"  # environment variable of all processes of a search
NODE = "TLRUNNER_FAULTS_NODE"  # environment variable of all processes of one node
CLOCK = """
import datetime, os, time
import pandas  # its C cannot be imported where datetime is no longer C's own

off = int(os.environ["TLRUNNER_CLOCK"])
true_time, true_time_ns, true_datetime = time.time, time.time_ns, datetime.datetime

class Meta(type):
    def __instancecheck__(cls, instance):
        return isinstance(instance, true_datetime)

class Off(true_datetime, metaclass=Meta):
    @classmethod
    def now(cls, tz=None):
        return true_datetime.now(tz) + datetime.timedelta(seconds=off)

    @classmethod
    def utcnow(cls):
        return cls.now(datetime.timezone.utc).replace(tzinfo=None)

Off.__module__, Off.__name__, Off.__qualname__ = "datetime", "datetime", "datetime"
time.time, time.time_ns = lambda: true_time() + off, lambda: true_time_ns() + off * 10**9
datetime.datetime = Off
"""


@dataclass
class Ground:
    """What a search is given, and what can be broken there."""

    name: str
    root: Path  # of all searches
    environment: dict[str, str]
    runs: str = ""
    num_workers: int = 1
    num_trials: int = NUM_TRIALS
    proxy: FaultProxy | None = None
    disk: Path | None = None
    nodes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)  # the head first

    def tree(self) -> dict[str, Any]:
        """The config of a search; BatchNorm has no place in it, nor has anything frozen."""
        cache = str(self.root / "cache")
        search = {"space": {"optim.lr": {"loguniform": [1e-5, 1e-3]}}}
        return {
            "data": {"cache_dir": cache, "image_size": 64, "limit": 480},
            "backbone": {"name": "squeezenet1_1", "weights": "none"},
            "freeze": {"strategy": "full"},
            "train": {"epochs": EPOCHS, "batch_size": 8, "checkpoint_seconds": CHECKPOINT_SECONDS},
            "resources": {"gpus_per_worker": 0, "workers_per_trial": self.num_workers},
            "search": {**search, "budget": {"num_trials": self.num_trials}},
        }

    def start_node(self, look: Callable[[], object] = lambda: None) -> None:
        """One more node of one CPU, the first as head; in the environment is how to reach it.

        `look` is called until it is up.
        """
        if not self.nodes:
            with socket.socket() as found:
                found.bind(("127.0.0.1", 0))
                self.environment["RAY_ADDRESS"] = f"127.0.0.1:{found.getsockname()[1]}"
        _, _, port = self.environment["RAY_ADDRESS"].partition(":")
        place = [
            "--head",
            "--include-dashboard=false",
            f"--port={port}",
            f"--temp-dir={self.environment['RAY_TMPDIR']}/ray",
        ]
        if self.nodes:
            place = [f"--address={self.environment['RAY_ADDRESS']}"]
        name = f"{self.environment[MARK]}-{port}-{len(self.nodes)}"
        said = self.root / f"{name}.txt"
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
        command += ["--disable-usage-stats", *place]
        with said.open("wb") as output:
            environment = {**self.environment, NODE: name}
            # In a session of its own, which Linux schedules as one: in this one's, Ray's workers,
            # all of them nice, would wait for whatever else is busy there.
            node = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        self.nodes[name] = node
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in said.read_text():
            assert time.monotonic() < deadline, said.read_text()
            look()
            time.sleep(LOOK_SECONDS)

    def kill_node(self, name: str) -> None:
        """The node goes at once; `ray start` sees that and clears up behind it."""
        for pid, command in processes(NODE, name).items():
            if "/raylet/raylet" in command or "/gcs/gcs_server" in command:
                os.kill(pid, signal.SIGKILL)

    def resize(self, num_free: int) -> None:
        """Leave so many bytes on the disk; writers may be faster, and are tried again."""
        assert self.disk
        for _ in range(20):
            size = os.statvfs(self.disk)
            used = (size.f_blocks - size.f_bfree) * size.f_frsize
            options = f"remount,size={used + num_free}"
            if mounted(self.disk, options):
                return
        raise AssertionError("the file system cannot be resized")


def mounted(place: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def can_mount(root: Path) -> bool:
    """Whether a file system of its own can be had, which needs root."""
    if not shutil.which("mount") or not mounted(root, "size=1m"):
        return False
    subprocess.run(["umount", str(root)], check=True)
    return True


def write_clock(root: Path) -> None:
    """What `clock_off` needs; every Python that starts imports it."""
    (root / "clock").mkdir()
    (root / "clock" / "sitecustomize.py").write_text(CLOCK)


def clock_off(place: Ground, seconds: int) -> dict[str, str]:
    """Environment of processes whose clock is so many seconds off."""
    path = os.pathsep.join([str(place.root / "clock"), place.environment["PYTHONPATH"]])
    return {"PYTHONPATH": path, "TLRUNNER_CLOCK": str(seconds)}


def ray_warnings(environment: Mapping[str, str], seconds: float, most: int = 20) -> list[str]:
    """What nodes and heads below a temporary directory of Ray's have complained of lately."""
    since = f"[{datetime.now() - timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S}"
    logs = Path(environment["RAY_TMPDIR"]).glob("ray/session_2*/logs/*.out")
    lines = [
        line
        for path in logs
        if path.name.startswith(("raylet", "gcs_server"))
        for line in path.read_text(errors="replace").splitlines()
        if line > since and re.match(r"\[[^]]* [WEC] ", line)
    ]
    return sorted(lines)[-most:]


@contextmanager
def ground(name: str, number: int, root: Path) -> Iterator[Ground]:
    """One of local, workers, cluster, s3, disk; no process of it is left behind."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    mark = f"{os.getpid()}-{name}-{number}"
    environment = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    ray_files = root / f"ray-{number}"  # short, as the names of Ray's sockets are long
    ray_files.mkdir()
    environment |= {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(ray_files)}
    environment |= {"RAY_AUTH_MODE": "disabled"}
    environment |= {MARK: mark, **START_SETTINGS}  # nodes that are started here have them as well
    place = Ground(name, root, {**kept, **environment}, str(root / f"{name}-{number}"))
    with ExitStack() as held:
        try:
            _prepare(place, held)
            yield place
        finally:
            end_processes(MARK, mark)
            for node in place.nodes.values():
                node.wait()


def _prepare(place: Ground, held: ExitStack) -> None:
    if place.name == "workers":
        place.num_workers, place.num_trials = 2, 2
    elif place.name == "s3":
        place.runs = f"s3://{BUCKET}/runs"
        aws = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
        place.proxy = held.enter_context(FaultProxy(aws["AWS_ENDPOINT_URL"], {}))
        place.environment |= {**aws, "AWS_ENDPOINT_URL": place.proxy.endpoint}
    elif place.name == "disk":
        place.disk = Path(place.runs)
        place.disk.mkdir(exist_ok=True)
        assert mounted(place.disk, f"size={ROOMY_BYTES}")
        held.callback(subprocess.run, ["umount", "--lazy", str(place.disk)], check=True)
    elif place.name == "cluster":
        for _ in range(2):
            place.start_node()


@contextmanager
def s3_server() -> Iterator[None]:
    """A server with one bucket, that the environment of this process points at."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    yield
    server.stop()


def processes(variable: str, value: str) -> dict[int, str]:
    """Processes that were started, however indirectly, with a variable; their command lines."""
    found, setting = {}, f"{variable}={value}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if setting in (directory / "environ").read_bytes().split(b"\0"):
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(directory.name)] = command.decode(errors="replace").strip()
        except OSError:
            continue  # it ended meanwhile
    return found


def end_processes(variable: str, value: str) -> None:
    """End what is left of them."""
    while left := processes(variable, value).keys() - {os.getpid()}:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(LOOK_SECONDS)
