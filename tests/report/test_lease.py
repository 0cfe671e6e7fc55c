"""Who may write a run: one process at a time, and nothing that an earlier one left running."""

import errno
import json
import logging
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
from fault_proxy import FaultProxy
from s3_servers import Bucket, use_endpoint

from tlrunner.config import TrialConfig
from tlrunner.data.s3 import S3Store
from tlrunner.errors import InterruptedRun, StorageError
from tlrunner.files import write_json
from tlrunner.report import lease as module
from tlrunner.report.lease import Claim, held
from tlrunner.report.rundir import RunDir
from tlrunner.signals import halting
from tlrunner.train.attempts import note_attempt
from tlrunner.train.images import Images
from tlrunner.train.place import LEASE, Fence, Place
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import EpochReport, TrialDir

REPORT = EpochReport(1, 0.5, 1.0, 2.0, 50.0, 10, 20, 0.01, 1.5, None)
DEAD = Claim(4, "process 1 on elsewhere", "ab" * 16, renewals=7)
WAIT_SECONDS = 30  # longer than anything here takes

quickly = partial(held, renew_seconds=0.1, lease_seconds=1.0)


def wait_for(happens: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def said(run: Place) -> dict[str, Any]:
    """What the lease of a run says."""
    return json.loads(run.store.read(LEASE))


def take_over(run: Place, number: int = 9) -> None:
    """Make another process the holder, as far as the run itself can tell."""
    claim = replace(DEAD, fence=number, token="cd" * 16)
    if run.uri:
        store = run.store
        assert isinstance(store, S3Store)
        store.write(LEASE, json.dumps(asdict(claim)).encode())
    else:
        write_json(run.path / LEASE, {"fence": claim.fence, "holder": claim.holder})


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return Place(tmp_path / "runs" / "mine")


@pytest.fixture
def kept(moto_bucket: Bucket, tmp_path: Path) -> Place:
    """A run in S3, as one machine has it."""
    return Place(tmp_path / "here" / "mine", f"{moto_bucket.uri}/runs/mine")


@pytest.fixture
def proxy(
    kept: Place, moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """Between every machine and the store."""
    with FaultProxy(moto_bucket.endpoint, {}) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)
        yield proxy


@pytest.fixture
def unconditional(rclone_bucket: Bucket, tmp_path: Path) -> Place:
    """A run in a store that ignores conditions."""
    return Place(tmp_path / "here" / "mine", f"{rclone_bucket.uri}/runs/mine")


def hold(run: Place) -> None:
    with held(run):
        time.sleep(WAIT_SECONDS)


def on_another_machine(run: Place) -> Place:
    return Place(run.path.parents[1] / "there" / run.path.name, run.uri)


@pytest.fixture(params=["local", pytest.param("kept", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest) -> Place:
    run: Place = request.getfixturevalue(request.param)
    return run


# -- Of either kind --------------------------------------------------------------------------------


def test_each_holder_has_the_next_number(run: Place) -> None:
    for number in (1, 2, 3):
        with quickly(run) as lease:
            assert lease.fence == Fence(run, number)
            lease.check()
            assert said(run)["fence"] == number
            assert said(run)["holder"].startswith("process ")


def test_a_second_start_on_a_machine_is_told_who_writes_the_run(run: Place) -> None:
    with quickly(run), pytest.raises(InterruptedRun) as caught, quickly(run):
        pass
    line = (
        r"run 'mine' is being written by process \d+ on .*; wait for it, or choose another --name"
    )
    assert caught.match(line)
    assert caught.value.exit_code == 75


def test_a_run_whose_holder_failed_is_free_at_once(run: Place) -> None:
    with pytest.raises(ZeroDivisionError), quickly(run):
        raise ZeroDivisionError
    with held(run) as lease:
        assert lease.fence.number == 2


def test_a_file_system_without_locks_is_named(
    local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", none)
    with pytest.raises(StorageError, match="cannot be written: No locks available"):
        quickly(local).__enter__()


def test_a_lease_that_is_none_is_named(run: Place) -> None:
    with quickly(run) as lease:
        if run.uri:
            run.store.write(LEASE, b"[]")  # type: ignore[attr-defined]
        else:
            (run.path / LEASE).write_text("[]")
        with pytest.raises(StorageError, match=r"mine/\.lease\.json is no lease"):
            lease.fence.check()


WRITES: dict[str, Callable[[TrialDir, TrialConfig], object]] = {
    "begin": lambda trial, config: trial.begin(config),
    "note": lambda trial, config: trial.note("a note"),
    "attempt": lambda trial, config: note_attempt(trial.place, "halted", 3),
    "append": lambda trial, config: trial.append(REPORT),
    "keep": lambda trial, config: trial.keep(trial.checkpoints / "00000004-0"),
    "keep_only": lambda trial, config: trial.keep_only(None),
    "keep_weights": lambda trial, config: trial.keep_weights(),
    "end": lambda trial, config: trial.end("stopped"),
    "fail": lambda trial, config: trial.fail(RuntimeError("should be gone"), config),
}


def content_of(run: Place) -> dict[str, bytes]:
    files = [path for path in run.path.rglob("*") if path.is_file()]
    local = {str(path): path.read_bytes() for path in files}
    kept = {entry.name: run.store.read(entry.name) for entry in run.store.list()}
    return local | kept


@pytest.mark.parametrize("write", WRITES)
def test_what_an_earlier_holder_left_running_writes_nothing(
    run: Place, tiny_trial: TrialConfig, write: str
) -> None:
    with held(run) as lease:
        place = replace(run, fence=lease.fence).below("trials").below("0000-abcdef")
    trial = pickle.loads(pickle.dumps(TrialDir(place)))  # noqa: S301  (as it comes to an actor)
    trial.begin(tiny_trial)
    for name in ("COMMIT.json", "state.safetensors", "state.json"):
        write_json(trial.checkpoints / "00000004-0" / name, {})
    trial.append(replace(REPORT, checkpoint="00000004-0"))
    with held(run):
        before = content_of(run)
        with pytest.raises(InterruptedRun, match=r"run 'mine' was taken over by process \d+ on"):
            WRITES[write](trial, tiny_trial)
        assert content_of(run) == before


def test_a_checkpoint_tells_its_holder_and_is_not_committed_for_an_earlier_one(
    local: Place, tmp_path: Path, tiny_trial: TrialConfig, colour_images: Images
) -> None:
    trial = TrialDir(replace(local, fence=Fence(local, 3)).below("trials").below("0000-abcdef"))
    taken_after: list[int] = []

    def report(finished: EpochReport) -> None:
        taken_after.append(finished.epoch)
        take_over(local)

    with pytest.raises(InterruptedRun, match="taken over by process 1 on elsewhere"):
        run_trial(tiny_trial, report, trial_dir=trial.place, images=colour_images)
    assert taken_after == [1]
    states = [json.loads(path.read_text()) for path in trial.checkpoints.glob("*/state.json")]
    assert [(state["epoch"], state["fence"]) for state in states] == [(1, 3)]


# -- In S3 -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_start_elsewhere_is_refused_as_soon_as_a_renewal_is_seen(kept: Place) -> None:
    with held(kept, renew_seconds=0.1, lease_seconds=1000):
        there = held(on_another_machine(kept), renew_seconds=0.1, lease_seconds=1000)
        with pytest.raises(InterruptedRun, match="is being written by process"), there:
            pass
        assert said(kept)["renewals"] > 0
    assert said(kept)["released"]


@pytest.mark.slow
def test_what_a_dead_holder_held_is_taken_over_after_a_while(
    kept: Place, caplog: pytest.LogCaptureFixture
) -> None:
    take_over(kept, number=4)
    with caplog.at_level(logging.INFO, "tlrunner"), quickly(kept) as lease:
        assert lease.fence.number == 5
        assert "was not given back by process 1 on elsewhere" in caplog.text


@pytest.mark.slow
def test_what_a_process_of_this_machine_held_that_was_killed_is_free_at_once(
    kept: Place, caplog: pytest.LogCaptureFixture
) -> None:
    holding = get_context("spawn").Process(target=hold, args=(kept,))
    holding.start()
    wait_for(lambda: kept.store.size(LEASE) is not None)
    with pytest.raises(InterruptedRun, match=f"is being written by process {holding.pid} on"):
        quickly(kept).__enter__()
    holding.kill()
    holding.join()
    assert not said(kept)["released"]
    with caplog.at_level(logging.INFO, "tlrunner"), held(kept, lease_seconds=1000) as lease:
        assert lease.fence.number == 2
    assert "looking if that lives" not in caplog.text


@pytest.mark.slow
def test_a_run_that_is_given_back_while_somebody_waits_is_theirs(kept: Place) -> None:
    with ThreadPoolExecutor(1) as pool:
        take_over(kept, number=4)

        def start() -> int:
            with held(kept, renew_seconds=0.1, lease_seconds=1000) as lease:
                return lease.fence.number

        waiting = pool.submit(start)
        time.sleep(0.3)
        assert not waiting.done()
        kept.store.write(LEASE, json.dumps(asdict(replace(DEAD, released=True))).encode())  # type: ignore[attr-defined]
        assert waiting.result(WAIT_SECONDS) == 5


@pytest.mark.slow
def test_of_two_that_find_a_dead_holder_one_takes_over(kept: Place, proxy: FaultProxy) -> None:
    take_over(kept, number=4)
    both_tried = Barrier(2, timeout=WAIT_SECONDS)

    def start(place: Place) -> str:
        try:
            with quickly(place) as lease:
                both_tried.wait()
                return f"number {lease.fence.number}"
        except InterruptedRun as err:
            both_tried.wait()
            return str(err)

    with ThreadPoolExecutor(2) as pool:
        loser, winner = sorted(
            pool.map(start, [kept, on_another_machine(kept)]), key=lambda text: "number" in text
        )
    assert winner == "number 5"
    assert loser.startswith("run 'mine' is being written by process")


@pytest.mark.slow
def test_a_holder_finds_out_that_its_run_was_taken_over(kept: Place) -> None:
    with quickly(kept) as lease:
        run = RunDir(kept.path, "", uri=kept.uri, lease=lease)
        with halting(has_reason=run.is_lost) as is_halted:
            assert not is_halted()
            take_over(kept)
            wait_for(is_halted)
        with pytest.raises(InterruptedRun, match="was taken over by process 1 on elsewhere"):
            run.check_held()
    assert said(kept)["fence"] == 9 and not said(kept)["released"], "it is not ours to give back"


@pytest.mark.slow
def test_a_holder_whose_lease_was_removed_has_lost_the_run(kept: Place) -> None:
    with quickly(kept) as lease:
        kept.store.delete(LEASE)
        wait_for(lambda: lease.lost)
        with pytest.raises(InterruptedRun, match="was taken over by whoever removed its lease"):
            lease.check()
    assert kept.store.size(LEASE) is None


@pytest.mark.slow
def test_a_holder_that_cannot_renew_commits_nothing_until_it_can(
    kept: Place, proxy: FaultProxy
) -> None:
    with quickly(kept) as lease:
        proxy.rates = {"500": 1}
        wait_for(lambda: time.monotonic() - lease.renewed_at > lease.seconds)
        with pytest.raises(InterruptedRun, match="could not be renewed for 1 s"):
            lease.check()
        proxy.rates = {}
        wait_for(lambda: time.monotonic() - lease.renewed_at < lease.seconds)
        lease.check()


@pytest.mark.slow
def test_a_lease_outlives_faults_of_the_store(kept: Place, proxy: FaultProxy) -> None:
    with held(kept, renew_seconds=0.1, lease_seconds=20) as lease:
        proxy.rates = {"500": 0.1, "reset": 0.1, "lost": 0.2}
        wait_for(lambda: proxy.injected["lost"] > 10 and proxy.injected["500"] > 3)
        lease.check()
        proxy.rates = {}
    assert said(kept)["released"]
    with held(on_another_machine(kept)) as lease:
        assert lease.fence.number == 2


@pytest.mark.slow
def test_a_store_that_honours_conditions_is_known_as_one_and_left_as_it_was(
    kept: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with quickly(kept):
        assert [entry.name for entry in kept.store.list()] == [LEASE]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.slow
def test_a_store_that_ignores_conditions_is_warned_of_and_still_keeps_a_late_start_out(
    unconditional: Place, caplog: pytest.LogCaptureFixture
) -> None:
    run = unconditional
    with quickly(run) as lease:
        assert [r.getMessage() for r in caplog.records] == [
            f"{run} is in a store without conditional writes: a start on another machine at the "
            "same moment may not be kept out"
        ]
        there = held(on_another_machine(run), renew_seconds=0.1, lease_seconds=1000)
        with pytest.raises(InterruptedRun, match="is being written by process"), there:
            pass
        assert [entry.name for entry in run.store.list()] == [LEASE]
        take_over(run)
        wait_for(lambda: lease.lost)
    assert said(run)["fence"] == 9
    with quickly(run) as lease:
        assert lease.fence.number == 10


@pytest.mark.slow
def test_a_store_that_refuses_conditions_is_used_without(
    kept: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(store: S3Store, name: str, content: bytes, *, etag: str | None) -> str | None:
        raise StorageError("NotImplemented (HTTP 501)")

    monkeypatch.setattr(S3Store, "put_if", refuse)
    with quickly(kept) as lease:
        lease.check()
    assert "without conditional writes" in caplog.text
    assert said(kept)["released"]


@pytest.mark.slow
def test_of_two_starts_where_conditions_are_ignored_the_last_to_write_wins(
    unconditional: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        take_over(unconditional)

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    refused = pytest.raises(InterruptedRun, match="by process 1 on elsewhere")
    with refused, quickly(unconditional):
        pass
