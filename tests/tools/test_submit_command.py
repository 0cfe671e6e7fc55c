"""`tlrunner submit` but for the cluster: what it would send, where to, and what it makes of it."""

import argparse
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.dashboard.utils as ray_utils
from ray.job_submission import JobStatus

from tlrunner.cli import main
from tlrunner.errors import ConfigError, ResourceError
from tlrunner.tools import submit as tool
from tlrunner.tools.bundle import Bundle
from tlrunner.tune import submission
from tlrunner.tune.submission import Door, Ended, follow

Captured = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]


class FakeClient:
    """A cluster with one job; each item of `tails` is what one connection to its log gives."""

    def __init__(self, tails: list[list[str]], status: JobStatus, code: int | None) -> None:
        self.tails, self.end = (
            tails,
            SimpleNamespace(status=status, driver_exit_code=code, message="said"),
        )

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        return SimpleNamespace(status=JobStatus.RUNNING) if self.tails else self.end

    def get_job_logs(self, job_id: str) -> str:
        return "one\ntwo\nthree\n"

    async def tail_job_logs(self, job_id: str):
        for text in self.tails.pop(0):
            if text == "broken":
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield text


@pytest.fixture
def followed(monkeypatch):
    def _followed(client: object) -> tuple[str, Ended]:
        shown: list[str] = []
        monkeypatch.setattr(submission, "AGAIN_SECONDS", 0.0)
        monkeypatch.setattr(submission, "JobSubmissionClient", lambda *_, **__: client)
        ended = follow(Door(lambda: nullcontext("http://h:1"), None), "first", shown.append)
        return "".join(shown), ended

    return _followed


TAILS = [["on", "e\ntw", "broken"], ["one\n", "two\nth", "broken"], ["one\ntwo\nthree"]]


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 64, 64),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 70),
        (JobStatus.STOPPED, None, 75),
    ],
)
def test_a_log_is_shown_once_however_often_the_way_breaks(followed, status, code, exit_code):
    shown, ended = followed(FakeClient([*TAILS], status, code))
    assert shown == "one\ntwo\nthree\n"
    assert ended == Ended(exit_code, "said")


def test_a_job_that_the_cluster_forgot_can_be_continued(followed):
    client = FakeClient([[]], JobStatus.RUNNING, None)

    def forgotten(job_id: str) -> None:
        raise RuntimeError("Request failed with status code 404: Job first does not exist.")

    client.get_job_info = forgotten
    assert followed(client)[1].exit_code == 75


@pytest.mark.parametrize("num_refusals", [0, 2])
def test_a_head_that_is_still_starting_is_waited_for(monkeypatch, tmp_path, num_refusals):
    refusals = ["No available agent to submit job, please try again later."] * num_refusals

    class Starting:
        def submit_job(self, **asked: object) -> object:
            if refusals:
                raise RuntimeError(f"Request failed with status code 500: {refusals.pop()}")
            return asked["submission_id"]

    monkeypatch.setattr(submission, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(submission, "JobSubmissionClient", lambda *_, **__: Starting())
    door = Door(lambda: nullcontext("http://h:1"), None)
    submission.submit(door, "python job.py", tmp_path, "first")
    assert not refusals


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("Job with submission_id first already exists", ConfigError),
        ("runtime_env is wrong", ResourceError),
        ("No available agent to submit job", ResourceError),
    ],
)
def test_what_a_cluster_refuses_is_said(monkeypatch, tmp_path, said, error):
    class Refusing:
        def submit_job(self, **asked: object) -> object:
            raise RuntimeError(said)

    monkeypatch.setattr(submission, "START_SECONDS", -1.0)
    monkeypatch.setattr(submission, "JobSubmissionClient", lambda *_, **__: Refusing())
    door = Door(lambda: nullcontext("http://h:1"), None)
    with pytest.raises(error, match=r"first' on the cluster already|refuses the job"):
        submission.submit(door, "python job.py", tmp_path, "first")


def test_a_cluster_that_is_gone_ends_the_following(monkeypatch):
    monkeypatch.setattr(submission, "LOST_SECONDS", 0.05)
    monkeypatch.setattr(submission, "HELD_SECONDS", 0.0)

    def no_client(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(submission, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(submission, "JobSubmissionClient", no_client)
    with pytest.raises(ResourceError, match="job first may go on: ray job logs --follow first"):
        follow(Door(lambda: nullcontext("http://h:1"), None), "first", print)


def test_a_head_that_answers_for_a_job_whose_node_is_gone_is_not_asked_for_ever(
    followed, monkeypatch
):
    class Broken(FakeClient):
        async def tail_job_logs(self, job_id: str):
            raise RuntimeError("Cannot connect to host 10.0.0.9:52365")
            yield ""

        def get_job_logs(self, job_id: str) -> str:
            raise RuntimeError("Request failed with status code 500")

    monkeypatch.setattr(submission, "LOST_SECONDS", 0.05)
    with pytest.raises(ResourceError, match="job first may go on"):
        followed(Broken([[]], JobStatus.FAILED, 1))
    assert followed(Broken([], JobStatus.FAILED, 1)) == ("", Ended(1, "said"))


def test_a_reader_that_goes_ends_the_following(monkeypatch):
    client = FakeClient([*TAILS], JobStatus.SUCCEEDED, 0)
    monkeypatch.setattr(submission, "JobSubmissionClient", lambda *_, **__: client)

    def closed(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        follow(Door(lambda: nullcontext("http://h:1"), None), "first", closed)


def test_the_cluster_is_the_one_that_was_named_whatever_ray_is_told(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://another:1")
    monkeypatch.setenv("RAY_ADDRESS", "http://a-third:1")
    taken: list[str] = []
    resolved = ray_utils.get_address_for_submission_client
    monkeypatch.setattr(
        submission, "JobSubmissionClient", lambda address, **_: taken.append(resolved(address))
    )
    with Door(lambda: nullcontext("http://named:1"), "token").client():
        pass
    assert taken == ["http://named:1"]
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://another:1"


@pytest.mark.parametrize(
    ("flags", "environment", "address"),
    [
        ([], {}, "http://127.0.0.1:8265"),
        ([], {"RAY_ADDRESS": "http://a:1"}, "http://a:1"),
        ([], {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:1"}, "http://b:1"),
        (["--address", "c:8265"], {"RAY_ADDRESS": "http://a:1"}, "http://c:8265"),
    ],
)
def test_the_address_is_of_the_flags_or_else_where_ray_looks(
    monkeypatch, flags, environment, address
):
    for name in tool.ADDRESSES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    tool.arguments(parser)
    with tool._door(parser.parse_args([*flags, "jobs/tune_flowers.py"])).way() as found:
        assert found == address


def test_what_is_no_cluster_is_said_to_be_none(monkeypatch):
    def no_cluster(*_: object, **__: object) -> None:
        raise RuntimeError("Version check returned 404: Not Found")

    monkeypatch.setattr(submission, "JobSubmissionClient", no_cluster)
    door = Door(lambda: nullcontext("http://h:1"), None)
    with pytest.raises(ResourceError, match="no Ray cluster answers at http://h:1"):
        submission.submit(door, "python job.py", ROOT, "first")


@pytest.mark.parametrize(
    ("ends_in", "signum", "says"),
    [
        ("follow", signal.SIGINT, "goes on; ray job logs --follow "),
        ("follow", signal.SIGHUP, "goes on; ray job logs --follow "),
        ("submit", signal.SIGINT, "may have been submitted: ray job status "),
    ],
)
def test_ctrl_c_and_a_terminal_that_closes_leave_the_job_and_say_its_name(
    monkeypatch, capsys: Captured, ends_in, signum, says
):
    def ended(*_: object) -> None:
        signal.raise_signal(signum)

    for name in ("submit", "follow"):
        monkeypatch.setattr(submission, name, ended if name == ends_in else lambda *_: None)
    before = signal.getsignal(signal.SIGHUP)
    assert main(["submit", str(ROOT / "jobs" / "tune_flowers.py")]) == 130
    assert signal.getsignal(signal.SIGHUP) is before
    assert re.search(rf"job (tune-flowers-\w+) {says}\1", capsys.readouterr().out)


def test_the_config_file_goes_by_its_place_in_the_repository(monkeypatch):
    bundle = Bundle(ROOT, (Path("jobs/tune_flowers.yaml"),), ())
    monkeypatch.chdir(ROOT / "jobs")
    flags = ["--config", "tune_flowers.yaml", "--name", "first", "--config=tune_flowers.yaml"]
    assert tool._portable(flags, bundle) == [
        *("--config", "jobs/tune_flowers.yaml", "--name", "first"),
        "--config=jobs/tune_flowers.yaml",
    ]
    for elsewhere in ("/etc/hostname", str(ROOT / "README.md")):
        with pytest.raises(ConfigError, match="is not sent to the cluster"):
            tool._portable(["--config", elsewhere], bundle)


def test_the_users_token_is_where_ray_looks_for_it(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tool._own_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-home\n")
    assert tool._own_token() == "of-home"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH .* cannot be read"):
        tool._own_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-env")
    assert tool._own_token() == "of-env"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert tool._own_token() is None


def test_mistakes_are_told_before_anything_is_sent(capsys: Captured):
    job = str(ROOT / "jobs" / "tune_flowers.py")
    assert main(["submit", str(ROOT / "jobs" / "none.py")]) == 64
    assert main(["submit", "--address", "http://127.0.0.1:9", job]) == 69
    assert "no Ray cluster answers at http://127.0.0.1:9" in capsys.readouterr().err
    for flags in (["--id", "A B", job], [job, "--data", "x"], []):
        with pytest.raises(SystemExit, match="64"):
            main(["submit", *flags])
    with pytest.raises(SystemExit, match="64"):
        main(["backbones", "--", "x"])


def test_help_names_every_way(capsys: Captured):
    with pytest.raises(SystemExit, match="0"):
        main(["submit", "--help"])
    said = capsys.readouterr().out
    assert "--context" in said
    assert "Ctrl-C ends the following" in said


def test_help_needs_neither_torch_nor_ray():
    script = "import sys, tlrunner.cli; sys.exit(any(n in sys.modules for n in ('ray', 'torch')))"
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=ROOT).returncode == 0


def test_what_is_sent_is_the_job_with_its_flags(monkeypatch, capsys: Captured):
    sent: list[object] = []
    monkeypatch.setattr(submission, "submit", lambda _door, *asked: sent.extend(asked))
    job = str(ROOT / "jobs" / "tune_flowers.py")
    flags = ("--address", "http://h:1", "--id", "first", "--no-wait")
    assert main(["submit", *flags, job, "--", "--name", "a b"]) == 0
    assert sent[::2] == ["python jobs/tune_flowers.py --name 'a b'", "first"]
    assert "job first: python" in capsys.readouterr().out
