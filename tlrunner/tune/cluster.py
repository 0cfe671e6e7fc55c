"""The Ray cluster: the connection to it, what its nodes see, and how many trials fit on it."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import ray
from ray._private.state import state as ray_state
from ray.exceptions import RayError
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tlrunner.config import ResourceConfig
from tlrunner.errors import InterruptedRun, ResourceError, StorageError
from tlrunner.secrets import Redacting
from tlrunner.tune.plan import Machine, grant, num_places

T = TypeVar("T")

# Ray reads these when it starts: the project has its own table, its own records and its own way to
# stop, and with SIGINT left to Ray an interrupted run would end as a success.
RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # of trials that end before their first epoch
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# A process that dies while it starts is missed only then; Ray's own setting is a minute, in which a
# node of one CPU starts no other. Of a local cluster, and where the user has set nothing.
START_SETTINGS = {"RAY_worker_register_timeout_seconds": "30"}
GONE_SECONDS, LOOK_SECONDS = 30.0, 3.0  # Ray itself waits for its head for a minute
AWS_SECRETS = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
}

log = logging.getLogger("tlrunner")


@contextmanager
def connected_to_ray(log_level: str) -> Iterator[None]:
    """The cluster that RAY_ADDRESS or this machine has, or else a local one, inside this block.

    Raises:
        ResourceError: there is one, and it cannot be reached.
    """
    os.environ.update(RAY_SETTINGS)
    for name, value in START_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Tune would hand these on to trials, and Ray write them to its logs. Nodes have their own.
    ENV_VARS_TO_PROPAGATE.difference_update(AWS_SECRETS)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            include_dashboard=False,
            log_to_driver=log_level == "debug",
            logging_level="DEBUG" if log_level == "debug" else "ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as err:
        raise ResourceError(
            f"no connection to the Ray cluster at {os.environ.get('RAY_ADDRESS', 'this machine')}: "
            f"{str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__}",
            "",
            "check RAY_ADDRESS, the token (RAY_AUTH_MODE, ~/.ray/auth_token) and the versions",
        ) from err
    except SystemExit as err:  # of Ray's handler of a SIGTERM that came meanwhile
        raise KeyboardInterrupt from err
    for handler in logging.getLogger("ray").handlers:  # it shows the traceback of a trial
        handler.addFilter(Redacting())
    # Ray's own SIGTERM handlers exit or abort at once; the one before ends the run in order.
    signal.signal(signal.SIGTERM, on_sigterm)
    threading.Thread(
        target=_watch_head, args=(ray.get_runtime_context().gcs_address,), daemon=True
    ).start()
    try:
        yield
    finally:
        ray.shutdown()


def _watch_head(address: str) -> None:
    """End this process once the head of its cluster is gone, which Ray's calls would wait for.

    Trials that are still there end with their nodes, and write nothing once the run goes on.
    """
    host, _, port = address.rpartition(":")
    seen_at = time.monotonic()
    while time.monotonic() - seen_at < GONE_SECONDS:
        time.sleep(LOOK_SECONDS)
        if not ray.is_initialized():
            return
        with suppress(OSError), socket.create_connection((host, int(port)), LOOK_SECONDS):
            seen_at = time.monotonic()
    log.error(
        "the head of the Ray cluster at %s is gone; the same command continues on another", address
    )
    os._exit(InterruptedRun.exit_code)


def machines() -> list[Machine]:
    """The nodes there are now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Machine(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]


def machines_to_come() -> Machine | None:
    """All that an autoscaler may add up to, as one machine; None without an autoscaler."""
    # Not public, yet what Ray Train itself asks before it waits for workers.
    most = ray_state.get_max_resources_from_cluster_config()
    return Machine(int(most.get("CPU", 0)), int(most.get("GPU", 0))) if most else None


def granted_resources(resources: ResourceConfig) -> tuple[ResourceConfig, bool]:
    """What a trial gets on the connected cluster, and whether the cluster must grow for it.

    Raises:
        ResourceError: no trial can ever fit.
    """
    to_come = machines_to_come()
    try:
        return grant(resources, machines()), False
    except ResourceError:
        if to_come is None:
            raise
        return grant(resources, [to_come]), True


def places_now(resources: ResourceConfig) -> int:
    """Trials to have under way on the cluster as it is.

    One more than fit waits where trials have several workers, whose drivers take some seconds to
    start, and where the cluster can grow for it.
    """
    waits = resources.workers_per_trial > 1 or machines_to_come() is not None
    return num_places(resources, machines()) + waits


def on_each_node(function: Callable[[], T]) -> list[tuple[str, "ray.ObjectRef[T]"]]:
    """Have each node there is now run a function: names of nodes, and what is to come of it."""
    task = ray.remote(num_cpus=0)(lambda: function())  # which may be any callable
    asked = []
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked.append((node["NodeName"], task.options(scheduling_strategy=there).remote()))
    return asked


def check_shared(directory: Path, holds: str, remedy: str) -> None:
    """Check that every node sees a directory that its trials use.

    Args:
        holds: a file in it.

    Raises:
        StorageError: a node does not.
    """
    if len(machines()) == 1:
        return
    path = str(directory / holds)
    seen = on_each_node(lambda: Path(path).is_file())
    blind = [node for node, is_seen in seen if not ray.get(is_seen)]
    if blind:
        raise StorageError(
            f"{directory} is not seen from {len(blind)} of {len(seen)} nodes, e.g. {blind[0]}",
            "a directory that all nodes share, or s3://",
            remedy,
        )
