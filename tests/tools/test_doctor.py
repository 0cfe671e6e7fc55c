"""`tlrunner doctor`: what it finds, what it says to do, and its exit code."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.s3_servers import Bucket
from tlrunner.cli import main
from tlrunner.tools import checkup, doctor
from tlrunner.tools.checkup import Check, Facts, check_alike, check_machine, check_packages
from tlrunner.tools.doctor import check_place

Captured = pytest.CaptureFixture[str]

FIT = Facts(
    host="node",
    python="3.11.7",
    versions={"ray": "2.60.0", "torch": "2.14.1"},
    num_cpus=8,
    memory_bytes=32 << 30,
    gpus=[("NVIDIA H100", 80 << 30)],
    has_gpu_device=True,
    disk_bytes={"/cache": 100 << 30},
    shm_bytes=8 << 30,
)


def faults(checks: list[Check]) -> list[str]:
    return [check.what for check in checks if check.remedy]


def test_this_machine_is_fit(capsys: Captured, tmp_path: Path) -> None:
    assert main(["doctor", "--out", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith(": ok") for line in lines)
    whats = [line.partition(":")[0] for line in lines]
    assert whats[:5] == ["python", "packages", "torch", "GPUs", "memory"]
    assert whats[-2:] == ["/dev/shm", f"place {tmp_path / 'runs'}"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"gpus": []}, "GPUs"),
        ({"memory_bytes": 2 << 30}, "memory"),
        ({"disk_bytes": {"/cache": 1 << 30}}, "disk /cache"),
        ({"shm_bytes": 64 << 20}, "/dev/shm"),
    ],
)
def test_what_a_machine_lacks_is_named(change: dict[str, object], what: str) -> None:
    assert faults(check_machine(FIT)) == []
    assert faults(check_machine(replace(FIT, **change))) == [what]


def test_a_machine_without_gpus_is_fit() -> None:
    assert faults(check_machine(replace(FIT, gpus=[], has_gpu_device=False))) == []


def test_versions_that_differ_are_named() -> None:
    assert not check_alike(FIT, FIT).remedy
    other = check_alike(FIT, replace(FIT, python="3.12.1", versions={"ray": "2.58.0"}))
    assert other.found == (
        "ray 2.58.0, not 2.60.0; torch is not installed, not 2.14.1; python 3.12.1, not 3.11.7"
    )
    assert other.remedy


def test_a_package_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = checkup.metadata.version
    monkeypatch.setattr(
        checkup.metadata, "version", lambda name: "2.58.0" if name == "ray" else version(name)
    )
    [packages] = [check for check in check_packages() if check.remedy]
    assert packages.found == "ray 2.58.0, not ==2.60.*"


def test_a_place_that_cannot_be_written_ends_with_73(capsys: Captured) -> None:
    assert main(["doctor", "--out", "/proc/runs"]) == 73
    assert "place /proc/runs: " in capsys.readouterr().out


def test_the_first_fault_decides_the_exit_code(monkeypatch, capsys: Captured) -> None:
    monkeypatch.setattr(doctor, "facts_of_this_machine", lambda: replace(FIT, shm_bytes=1))
    assert main(["doctor", "--out", "/proc/runs"]) == 69
    assert "/dev/shm: 0.0 GiB: NOT OK, mount a larger one" in capsys.readouterr().out


# -- S3 ------------------------------------------------------------------------------------------


def test_a_bucket_is_tried_and_left_as_it_was(moto_bucket: Bucket, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(doctor, "CACHE_DIR", str(tmp_path))
    moto_bucket.client.put_object(Bucket=moto_bucket.name, Key="runs/mine", Body=b"mine")
    assert not check_place(f"{moto_bucket.uri}/runs").remedy
    listed = moto_bucket.client.list_objects_v2(Bucket=moto_bucket.name)["Contents"]
    assert [entry["Key"] for entry in listed] == ["runs/mine"]


def test_a_bucket_that_is_not_there_or_refuses_is_said(moto_bucket: Bucket, monkeypatch) -> None:
    absent = check_place(f"{moto_bucket.uri}-not/runs")
    assert (absent.exit_code, "there is no such bucket" in absent.found) == (73, True)
    assert absent.remedy
    assert check_place("ftp://host/runs").exit_code == 73


@pytest.mark.slow
def test_a_store_without_conditions_is_told(rclone_bucket: Bucket, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(doctor, "CACHE_DIR", str(tmp_path))
    assert "it ignores If-None-Match" in check_place(f"{rclone_bucket.uri}/runs").remedy
