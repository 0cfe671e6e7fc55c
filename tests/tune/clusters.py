"""Ray clusters of a test's own, on this machine, and what is left on them."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

MARK = "TLRUNNER_TEST_MARK"  # in the environment of what a test starts, and so of all below it

# Services of Ray's own: one of each for a node, and one for a cluster that Ray Train was used on.
SERVICES = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_Autoscaling")


@contextmanager
def nodes_of(*num_cpus: int) -> Iterator[str]:
    """A cluster whose nodes, the head first, have so many CPUs; gives its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, secrets.token_hex(8))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus[0]})
        try:
            for cpus in num_cpus[1:]:
                cluster.add_node(num_cpus=cpus)
            yield cluster.address
        finally:
            cluster.shutdown()


def marked_processes(mark: str) -> list[Path]:
    """Entries in /proc of what was started, however indirectly, with this mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(entry)
        except OSError:
            continue  # it ended meanwhile
    return found


def left_behind(address: str, num_cpus: int, within_seconds: float) -> list[str]:
    """What is still there of jobs that ended: CPUs in use, placement groups, processes.

    To be asked of a cluster of `nodes_of`, while it is there.
    """
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        deadline = time.monotonic() + within_seconds
        while (left := _left(num_cpus)) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left
    finally:
        ray.shutdown()


def _left(num_cpus: int) -> list[str]:
    left = []
    if (free := ray.available_resources().get("CPU", 0)) != num_cpus:
        left.append(f"{num_cpus - free} CPUs in use")
    groups = placement_group_table().values()
    left += [f"placement group {g['name']}" for g in groups if g["state"] != "REMOVED"]
    return left + sorted(_workers())


def _workers() -> list[str]:
    """Titles of processes of Ray's that run something of a job's."""
    titles = []
    for process in marked_processes(os.environ[MARK]):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended just now
        title = b" ".join(words).decode(errors="replace").strip()
        if title.startswith("ray::") and not title.startswith(SERVICES):
            titles.append(title)
    return titles
