"""Secrets of the environment: in no file, log or traceback, whatever an error repeats."""

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from s3_servers import Bucket

from tlrunner.secrets import Redacting, redacted

JOBS = Path(__file__).resolve().parents[2] / "jobs"
CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary/of+aws",
    "AWS_SESSION_TOKEN": "canary-of-the-session",
    "WANDB_API_KEY": "canary-of-wandb",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-mlflow",
    "RAY_AUTH_TOKEN": "canary-of-ray",
    "HTTPS_PROXY": "http://user:canary-of-the-proxy@127.0.0.1:9",
}
SECRETS = [value.rpartition("@")[0].rpartition(":")[2] or value for value in CANARIES.values()]

# Each job meets an error that repeats every canary; its exit code is printed.
RUN_ALL = """
import json, os, sys
import tlrunner.run as jobs
from tlrunner.cli import run_job
from tlrunner.errors import StorageError
from tlrunner.jobconfig import TrainJob

canaries = json.loads(sys.argv[1])
said = " ".join(os.environ[name] for name in canaries)

def raising(kind):
    def fail(*_, **__):
        raise kind(f"refused: {said}")
    return fail

def run(name, *flags):
    code = run_job("train", TrainJob, jobs.train, argv=[*sys.argv[2:], "--name", name, *flags])
    print(name, code)

run("good")
run_trial, finish = jobs.run_trial, jobs._finish
jobs.run_trial = raising(RuntimeError)
run("failed_trial")
jobs.run_trial = raising(StorageError)
run("storage")
run("debug", "--set", "log.level=debug")
jobs.run_trial, jobs._finish = run_trial, raising(KeyError)
run("bug")
jobs._finish = finish
run("s3", "--out", os.environ["TEST_BUCKET"] + "/none")
"""


@pytest.fixture
def config(tiny_tree: dict[str, Any], tmp_path: Path) -> Path:
    """The tiny trial, whose caches are below `tmp_path` as well."""
    data = {**tiny_tree["data"], "cache_dir": str(tmp_path / "cache")}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**tiny_tree, "data": data, "train": {"epochs": 1}}))
    return path


def files_with_a_secret(root: Path) -> list[str]:
    return [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in SECRETS)
    ]


def test_no_secret_is_shown_or_kept_whatever_an_error_says(
    config: Path, tmp_path: Path, moto_bucket: Bucket
) -> None:
    flags = ["--config", str(config), "--out", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(list(CANARIES)), *flags],
        env=os.environ | CANARIES | {"TEST_BUCKET": "s3://no-such-bucket"},
        capture_output=True,
        text=True,
        check=True,
    )
    ends = [line.split() for line in done.stdout.splitlines() if line[-1:].isdigit()]
    codes = {words[0]: int(words[1]) for words in ends if len(words) == 2}
    assert codes == {"good": 0, "failed_trial": 3, "storage": 73, "debug": 73, "bug": 70, "s3": 73}
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS)
    assert files_with_a_secret(tmp_path) == []

    # -- Those errors were told ------------------------------------------------------------------
    hidden = "refused: " + " ".join(["***"] * 5)
    assert done.stderr.count(hidden) > 5
    (failed,) = (tmp_path / "runs" / "failed_trial" / "trials").iterdir()
    kept = [failed / "error.txt", failed / "end.json", tmp_path / "runs" / "bug" / "log.txt"]
    for path in (*kept, tmp_path / "runs" / "failed_trial" / "log.txt"):
        assert hidden in path.read_text(), path


@pytest.mark.slow
def test_no_secret_is_shown_or_kept_by_a_search(config: Path, tmp_path: Path) -> None:
    header = {"a": {"dtype": " ".join(SECRETS), "shape": [1], "data_offsets": [0, 4]}}
    content = json.dumps(header).encode()
    weights = tmp_path / "broken.safetensors"  # the reader's error names what it cannot read
    weights.write_bytes(struct.pack("<Q", len(content)) + content + bytes(4))
    space = {"backbone.weights": {"grid": ["none", str(weights)]}}
    search = {"search": {"algorithm": "grid", "space": space}}
    config.write_text(json.dumps(json.loads(config.read_text()) | search))
    ray_dir = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a socket's path must be short
    try:
        flags = ["--config", str(config), "--out", str(tmp_path / "runs"), "--name", "mine"]
        done = subprocess.run(
            [sys.executable, JOBS / "tune_flowers.py", *flags],
            env=os.environ | CANARIES | {"RAY_ADDRESS": "local", "RAY_TMPDIR": ray_dir},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        weights.unlink()
        assert not any(secret in done.stdout + done.stderr for secret in SECRETS)
        assert files_with_a_secret(tmp_path) == []
        assert files_with_a_secret(Path(ray_dir)) == []
    finally:
        shutil.rmtree(ray_dir, ignore_errors=True)
    (error,) = (tmp_path / "runs" / "mine" / "trials").glob("*/error.txt")
    assert "unknown variant `*** ***" in error.read_text()


# -- Text ------------------------------------------------------------------------------------------


@pytest.fixture
def _canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_canaries")
@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_hidden_wherever_it_stands(secret: str) -> None:
    assert redacted(f"a{secret}b {secret}") == "a***b ***"
    assert redacted("canary%2Fof%2Baws") == "***"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token"),
        ("TOKENIZERS_PARALLELISM", "disabled"),
        ("MONKEY", "chimpanzee"),
        ("HF_TOKEN", "1"),
        ("HTTP_PROXY", "http://proxy.example:3128"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9000"),
    ],
)
def test_what_is_no_secret_can_be_read(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert redacted(f"see {value}") == f"see {value}"


def test_of_two_secrets_the_longer_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "secret")
    monkeypatch.setenv("B_TOKEN", "secret-and-more")
    assert redacted("secret-and-more") == "***"


@pytest.mark.usefixtures("_canaries")
def test_a_log_record_loses_secrets_in_arguments_and_traceback() -> None:
    try:
        raise ValueError(SECRETS[0])
    except ValueError:
        record = logging.LogRecord(
            "tlrunner", logging.ERROR, __file__, 1, "so: %s", (SECRETS[1],), sys.exc_info()
        )
    assert Redacting().filter(record)
    text = logging.Formatter().format(record)
    assert "so: ***" in text
    assert "ValueError: ***" in text
    assert not any(secret in text for secret in SECRETS)
