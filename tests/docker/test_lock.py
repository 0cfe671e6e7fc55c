"""docker/requirements.lock: complete, within pyproject's ranges, hashed, and of no address."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
import smoke
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
IMAGE = {  # what markers see in the image
    "python_version": "3.11",
    "python_full_version": "3.11.14",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
}


@pytest.fixture(scope="module")
def pins(lock: Path) -> dict[str, str]:
    return smoke.pins(lock)


@pytest.fixture(scope="module")
def wanted(project: dict[str, Any]) -> list[Requirement]:
    return [Requirement(text) for text in project["dependencies"]]


def holds(requirement: Requirement, pins: dict[str, str]) -> bool:
    version = pins.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def test_each_dependency_is_pinned_within_its_range(
    wanted: list[Requirement], pins: dict[str, str]
) -> None:
    assert [str(requirement) for requirement in wanted if not holds(requirement, pins)] == []


def test_what_the_pinned_packages_need_is_pinned(
    wanted: list[Requirement], pins: dict[str, str]
) -> None:
    """As far as they are installed here in the pinned versions, whose metadata tells it."""
    missing, seen, todo = [], set(), [(r.name, frozenset(r.extras)) for r in wanted]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen or not _is_installed(name, pins):
            continue
        seen.add((name, extras))
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if not any(_applies(needed, extra) for extra in (*extras, "")):
                continue
            if not holds(needed, pins):
                missing.append(f"{name} needs {needed}")
            todo.append((needed.name, frozenset(needed.extras)))
    assert missing == []
    assert len(seen) > 1


def _is_installed(name: str, pins: dict[str, str]) -> bool:
    try:
        return importlib.metadata.version(name) == pins.get(canonicalize_name(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**IMAGE, "extra": extra})


def test_every_pin_has_hashes_and_there_is_no_address(lock: Path, pins: dict[str, str]) -> None:
    text = lock.read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    blocks = re.split(r"\n(?=\S)", "\n".join(lines).strip())
    shape = re.compile(r"[a-z0-9-]+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+")
    assert [block for block in blocks if not shape.fullmatch(block)] == []
    assert len(blocks) == len(pins)
    assert "://" not in text
    assert "index" not in text


def test_ray_is_the_version_that_is_tested_here(pins: dict[str, str]) -> None:
    """Clients and nodes of a cluster must be of one version."""
    assert pins["ray"] == importlib.metadata.version("ray")


def test_the_lock_is_of_the_pins_that_its_script_names(pins: dict[str, str]) -> None:
    script = (ROOT / "docker" / "lock.sh").read_text()
    named = dict(re.findall(r"^([a-z]+)==(\S+)$", script, re.MULTILINE))
    assert set(named) == {"ray", "torch", "torchvision"}
    assert {name: pins[name] for name in named} == named
    assert "://" not in script


def test_the_packaged_weights_are_in_it(pins: dict[str, str]) -> None:
    for name in smoke.WEIGHTS:
        assert canonicalize_name(f"{name}_pytorch_model") in pins
