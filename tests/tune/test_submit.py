"""The main job as a cluster's users start it: `ray start`, then `ray job submit`."""

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

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a submitter to a head node of our own, with token authentication."""
    port, dashboard = free_port(), free_port()
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 2)
    path = os.pathsep.join([str(RAY.parent), os.environ["PATH"]])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
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


def submit(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(RAY), "job", "submit", "--working-dir", ".", "--"]
    return subprocess.run(
        [*command, "python", "jobs/tune_flowers.py", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_submitted_search_is_followed_and_its_exit_code_arrives(
    head: dict[str, str], tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    config = tmp_path / "job.json"
    space = {"optim.lr": {"grid": [0.001, 0.003]}}
    config.write_text(json.dumps(tiny_tree | {"search": {"algorithm": "grid", "space": space}}))
    flags = ["--config", str(config), "--out", str(tmp_path / "runs"), "--name", "submitted"]
    ended = submit(head, *flags)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "best: squeezenet1_1, full" in ended.stdout
    assert (tmp_path / "runs" / "submitted" / "_SUCCESS").exists()

    ended = submit(head, *flags, "--set", "train.epoch=2")
    assert ended.returncode != 0
    said = ended.stdout + ended.stderr
    assert "exit code 64" in said
    assert "unknown key 'train.epoch'" in said

    ended = submit(head | {"RAY_AUTH_MODE": "disabled"}, *flags)
    assert ended.returncode != 0
    assert "Authentication" in ended.stdout + ended.stderr
