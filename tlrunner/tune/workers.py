"""One trial in several workers: a Ray Train run, driven from the trial's own process.

The workers tell each epoch to the driver and wait for its answer before the next, so that none runs
on while the search decides. They end by themselves when the answer is no, which frees their place
at once; if the driver is killed, Ray ends them.
"""

import fcntl
import os
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray
import torch
from ray import train
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer

from tlrunner.config import TrialConfig
from tlrunner.data.world import World
from tlrunner.errors import TlrunnerError
from tlrunner.train.trial import (
    once_each,
    out_of_memory,
    run_trial,
    with_smaller_micro_batches,
)
from tlrunner.train.trial_dir import EpochReport
from tlrunner.tune.abandoned import free_abandoned
from tlrunner.tune.mailbox import Mailbox

POLL_SECONDS = 0.5
GLOO = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # Linux: the address of an interface
END_SECONDS = 20.0  # that workers get to end after they were told to


class LostWorkerError(RayError):  # type: ignore[misc]  # ray is not typed
    """A worker of a trial has died, or cannot be reached any more."""


class _EndedError(Exception):
    """The search ended the trial."""


def run_in_workers(
    config: TrialConfig,
    report: Callable[[EpochReport], object],
    *,
    notes: tuple[str, ...] = (),
    **keeping: Any,
) -> None:
    """`run_trial` in `resources.workers_per_trial` processes, on one node or on several.

    Raises:
        What a worker raised, its own errors first; see `run_trial`.
    """
    report = once_each(report)
    try:
        _drive(config, report, {**keeping, "notes": notes})
        return
    except torch.OutOfMemoryError:
        smaller, note = with_smaller_micro_batches(config)
    try:
        _drive(smaller, report, {**keeping, "notes": (*notes, note)})
    except torch.OutOfMemoryError as err:
        raise out_of_memory(smaller) from err


def _drive(
    config: TrialConfig, report: Callable[[EpochReport], object], keeping: dict[str, Any]
) -> None:
    """Start the workers, pass on what they report, and see them end."""
    resources = config.resources
    # Not in this trial's placement group, which Tune removes before a stopped trial has ended.
    mailbox = ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")(Mailbox).remote()
    # Train keeps nothing there: trials have checkpoints of their own, in the run's directory.
    storage = tempfile.mkdtemp(prefix="tlrunner-train-")
    trainer = TorchTrainer(
        partial(_work, config, keeping, mailbox),
        scaling_config=train.ScalingConfig(
            num_workers=resources.workers_per_trial,
            use_gpu=bool(resources.gpus_per_worker),
            resources_per_worker={
                "CPU": resources.cpus_per_worker,
                **({"GPU": 1} if resources.gpus_per_worker else {}),
            },
        ),
        run_config=train.RunConfig(
            name="trial", storage_path=storage, worker_runtime_env=_network()
        ),
    )
    failure: list[BaseException] = []
    running = threading.Thread(target=_fit, args=(trainer, failure), daemon=True)
    running.start()
    has_begun = False
    try:
        while running.is_alive():
            if not has_begun:  # and may wait for room that is kept for one that was killed
                free_abandoned()
            finished = ray.get(mailbox.next.remote(POLL_SECONDS))
            if finished:
                has_begun = True
                report(finished)
                ray.get(mailbox.go_on.remote())
        if failure:
            raise _cause(failure[0])
    finally:  # also where the search ends the trial, by an exception in `report`
        with suppress(RayError):  # Ray may be faster than we are
            ray.get(mailbox.close.remote())
            running.join(END_SECONDS)
            ray.kill(mailbox)
        shutil.rmtree(storage, ignore_errors=True)


def _network() -> dict[str, Any]:
    """A runtime environment for gloo, where the name of the host does not lead to its address.

    It would take another for its own, mostly 127.0.0.1, and workers on other nodes would not find
    it. Interfaces are taken to have the same names on all nodes.
    """
    address = ray.util.get_node_ip_address()
    with suppress(OSError):
        if socket.gethostbyname(socket.gethostname()) == address:
            return {}
    names = [name for _, name in socket.if_nameindex() if _address_of(name) == address]
    return {"env_vars": {GLOO: names[0]}} if names and GLOO not in os.environ else {}


def _address_of(interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, suppress(OSError):
        answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)
        return socket.inet_ntoa(answer[20:24])
    return None


def _fit(trainer: TorchTrainer, failure: list[BaseException]) -> None:
    try:
        trainer.fit()
    except Exception as err:  # noqa: BLE001  (raised in the driver's own thread)
        failure.append(err)


def _work(config: TrialConfig, keeping: dict[str, Any], mailbox: Any) -> None:
    """What each worker runs."""
    context = train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    device = torch.device("cuda" if config.resources.gpus_per_worker else "cpu")

    def report(finished: EpochReport) -> None:
        goes_on = world.rank > 0 or ray.get(mailbox.tell.remote(finished))
        answer = torch.tensor(float(goes_on), device=device)
        torch.distributed.broadcast(answer, src=0)
        if not answer.item():
            raise _EndedError

    with suppress(_EndedError):
        run_trial(config, report, world=world, **keeping)


def _cause(failure: BaseException) -> BaseException:
    """The error that ended the workers: one of ours before others, and those before deaths.

    Where a worker dies, the others find their connection to it broken, perhaps before Ray does.
    """
    of_workers = getattr(failure, "worker_failures", {}).values()
    causes = [getattr(err, "_base_exc", err) for err in of_workers] or [failure]
    kinds = (TlrunnerError, torch.OutOfMemoryError)
    own = [err for err in causes if not _is_lost_connection(err)]
    found = next((err for err in causes if isinstance(err, kinds)), (own or causes)[0])
    if isinstance(found, RayError) or not _is_lost_connection(found):
        return found
    return LostWorkerError(str(found))


def _is_lost_connection(err: BaseException) -> bool:
    of_gloo = isinstance(err, RuntimeError) and "gloo/transport" in str(err)
    return isinstance(err, RayError | torch.distributed.DistError) or of_gloo
