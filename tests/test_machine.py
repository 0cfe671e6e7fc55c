import os
from pathlib import Path

import pytest

from tlrunner import machine
from tlrunner.machine import memory_bytes, num_cpus


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    return tmp_path


def test_without_a_container_all_of_the_machine_is_ours(cgroup: Path) -> None:
    assert 1 <= num_cpus() <= (os.cpu_count() or 1)
    whole = memory_bytes()
    (cgroup / "cpu.max").write_text("max 100000\n")
    (cgroup / "memory.max").write_text("max\n")
    assert memory_bytes() == whole


@pytest.mark.parametrize(("quota", "cpus"), [("100000", 1), ("50000", 1), ("199999", 1)])
def test_a_container_has_the_cpus_it_was_granted(cgroup: Path, quota: str, cpus: int) -> None:
    (cgroup / "cpu.max").write_text(f"{quota} 100000\n")
    assert num_cpus() == cpus


def test_a_container_has_the_memory_it_was_granted(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("12345678\n")
    assert memory_bytes() == 12345678
