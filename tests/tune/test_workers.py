"""The driver of a trial in several workers, without the workers."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.errors import DataError, ResourceError
from tlrunner.train.trial_dir import EpochReport
from tlrunner.tune import workers
from tlrunner.tune.mailbox import Mailbox
from tlrunner.tune.workers import GLOO, run_in_workers

REPORT = EpochReport(1, 0.5, 1.0, 2.0, 50.0, 10, 20, 0.01, 1.5, None)
Drive = Callable[[TrialConfig, Callable[[EpochReport], object], dict[str, Any]], None]


@pytest.fixture
def shared(tiny_trial: TrialConfig) -> TrialConfig:
    return with_values(tiny_trial, {"resources.workers_per_trial": 2, "train.batch_size": 8})


def running_out(times: int, driven: list[tuple[int, tuple[str, ...]]]) -> Drive:
    """Workers that report an epoch and run out of memory in the next, so many times."""

    def drive(
        config: TrialConfig, report: Callable[[EpochReport], object], keeping: dict[str, Any]
    ) -> None:
        driven.append((config.train.gradient_accumulation_steps, keeping["notes"]))
        report(REPORT)
        if len(driven) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        report(replace(REPORT, epoch=2))

    return drive


def test_workers_that_ran_out_of_memory_start_once_more_with_half_the_micro_batch(
    shared: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven: list[tuple[int, tuple[str, ...]]] = []
    monkeypatch.setattr(workers, "_drive", running_out(1, driven))
    told: list[int] = []
    run_in_workers(shared, lambda report: told.append(report.epoch), notes=("a note",))
    assert told == [1, 2], "no epoch is told twice"
    note = "out of GPU memory: each batch is computed in 2 micro-batches"
    assert driven == [(1, ("a note",)), (2, ("a note", note))]


def test_workers_that_run_out_of_memory_twice_fail_with_what_would_help(
    shared: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_drive", running_out(2, []))
    with pytest.raises(ResourceError, match=r"in 2 micro-batches.*more workers"):
        run_in_workers(shared, lambda report: None)


def test_the_error_of_one_worker_counts_more_than_the_deaths_it_caused() -> None:
    ours, death = DataError("shard 3 is damaged"), RuntimeError("the connection was closed")
    wrapped = SimpleNamespace(_base_exc=ours)
    failed = SimpleNamespace(worker_failures={0: death, 1: wrapped})
    assert workers._cause(failed) is ours  # type: ignore[arg-type]
    assert workers._cause(SimpleNamespace(worker_failures={0: death})) is death  # type: ignore[arg-type]
    assert workers._cause(death) is death


def test_a_broken_connection_between_workers_is_no_error_of_the_trial() -> None:
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer")
    own = ValueError("in the program")
    of_both = SimpleNamespace(worker_failures={0: broken, 1: own})
    assert workers._cause(of_both) is own  # type: ignore[arg-type]
    of_one = SimpleNamespace(worker_failures={0: broken})
    assert isinstance(workers._cause(of_one), workers.LostWorkerError)  # type: ignore[arg-type]


def test_gloo_is_told_the_interface_where_the_hosts_name_leads_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(GLOO, raising=False)
    loopback = next(name for _, name in socket.if_nameindex() if workers._address_of(name))
    address = workers._address_of(loopback)
    monkeypatch.setattr(workers.ray.util, "get_node_ip_address", lambda: address)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    assert workers._network() == {}
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "192.0.2.77")
    assert workers._network() == {"env_vars": {GLOO: loopback}}
    monkeypatch.setenv(GLOO, "mine")
    assert workers._network() == {}


def test_what_is_told_is_answered_before_the_next() -> None:
    async def play() -> list[Any]:
        mailbox = Mailbox()
        first = asyncio.create_task(mailbox.tell("one"))
        said: list[Any] = [await mailbox.next(1.0)]
        assert not first.done(), "the worker waits for the answer"
        await mailbox.go_on()
        said += [await first, await mailbox.next(0.01)]
        second = asyncio.create_task(mailbox.tell("two"))
        said.append(await mailbox.next(1.0))
        await mailbox.close()
        return [*said, await second, await mailbox.tell("three")]

    assert asyncio.run(play()) == ["one", True, None, "two", False, False]
