"""The main job as a cluster's users start it: `ray start`, then `ray job submit`."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tools.fake_kubectl import cluster, install

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The environment of a submitter to a head node of our own, with authentication by `param`."""
    port, dashboard = free_port(), free_port()
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 2)
    path = os.pathsep.join([str(RAY.parent), os.environ["PATH"]])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": request.param,
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": path,
    }
    place = Path("/tmp") / f"tlr{os.getpid()}"  # Ray's sockets need a short path
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", f"--temp-dir={place}"]
    started = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    address = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    try:
        for _ in range(120):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            time.sleep(0.5)
        yield environment | address
    finally:
        started.terminate()
        started.wait(30)
        shutil.rmtree(place, ignore_errors=True)


TREE = {"algorithm": "grid", "space": {"optim.lr": {"grid": [0.001, 0.003]}}}


def flags_of(tree: dict[str, Any], tmp_path: Path, **sections: Any) -> list[str]:
    config = tmp_path / "job.json"
    config.write_text(json.dumps({**tree, "search": TREE, **sections}))
    return ["--config", str(config), "--out", str(tmp_path / "runs"), "--name", "submitted"]


def ray_job(environment: dict[str, str], *words: str) -> str:
    """What `ray job ...` says."""
    command = [str(RAY), "job", *words]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def submit(
    environment: dict[str, str], *flags: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [str(RAY), "job", "submit", *options, "--working-dir", ".", "--"]
    for _ in range(30):
        ended = subprocess.run(
            [*command, "python", "jobs/tune_flowers.py", *flags],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        if "No available agent" not in ended.stderr:  # the head is still starting
            break
        time.sleep(2)
    return ended


def tlrunner_submit(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(RAY.with_name("tlrunner")), "submit", "jobs/tune_flowers.py", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize("head", ["token"], indirect=True)
def test_a_submitted_search_is_followed_and_its_exit_code_arrives(
    head: dict[str, str], tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    flags = flags_of(tiny_tree, tmp_path)
    ended = submit(head, *flags)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "best: squeezenet1_1, full" in ended.stdout
    assert (tmp_path / "runs" / "submitted" / "_SUCCESS").exists()

    ended = submit(head, *flags, "--set", "train.epoch=2")
    assert ended.returncode != 0
    said = ended.stdout + ended.stderr
    assert "exit code 64" in said
    assert "unknown key 'train.epoch'" in said

    unknown = head | {"RAY_AUTH_MODE": "disabled"}
    ended = submit(unknown, *flags)
    assert ended.returncode != 0
    assert "Authentication" in ended.stdout + ended.stderr

    # By tlrunner's own command, from the Secret of a cluster that it finds, to the job's own code.
    port = int(head["RAY_API_SERVER_ADDRESS"].rpartition(":")[2])
    token = base64.b64encode(Path(head["RAY_AUTH_TOKEN_PATH"]).read_bytes()).decode()
    answers = {"items": [cluster("tlrunner")]}
    secret = {"data": {"auth_token": token}}
    install(tmp_path / "bin", {"rayclusters.ray.io": answers, "secret": secret, "port": port})
    found = unknown | {"PATH": os.pathsep.join([str(tmp_path / "bin"), head["PATH"]])}
    found |= {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9", "RAY_ADDRESS": "http://127.0.0.1:9"}
    wrong = ["--set", "train.epoch=2"]
    ended = tlrunner_submit(found, "--context", "prod", "--", *wrong)
    assert ended.returncode == 64, ended.stdout + ended.stderr
    assert "unknown key 'train.epoch'" in ended.stdout
    ended = tlrunner_submit(unknown, "--", *wrong)
    assert ended.returncode == 69
    assert "asks for a token" in ended.stderr


@pytest.mark.parametrize("head", ["disabled"], indirect=True)
def test_a_submitted_search_can_be_left_looked_at_stopped_and_continued(
    head: dict[str, str], tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    # The second trial lasts until it is stopped.
    space = {"train.epochs": {"grid": [1, 10_000]}}
    search = {"algorithm": "grid", "space": space, "max_concurrent_trials": 1}
    flags = flags_of(tiny_tree, tmp_path, search=search)
    options = ("--no-wait", "--submission-id", "first")
    ended = submit(head, *flags, options=options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    deadline = time.monotonic() + 120
    while "epoch 2/10000" not in ray_job(head, "logs", "first"):
        assert time.monotonic() < deadline, ray_job(head, "logs", "first")
        time.sleep(1)
    assert "RUNNING" in ray_job(head, "status", "first")
    ray_job(head, "stop", "first")
    assert "was stopped" in ray_job(head, "status", "first")

    run = tmp_path / "runs" / "submitted"
    assert not (run / "_SUCCESS").exists()
    ended = submit(head, *flags, options=("--no-wait", "--submission-id", "second"))
    deadline = time.monotonic() + 120
    while "epoch 2/10000" not in (logs := ray_job(head, "logs", "second")):
        assert time.monotonic() < deadline, logs
        time.sleep(1)
    assert "1 trials are done already" in logs
    ray_job(head, "stop", "second")
