"""The files in docker/ are programs, no package: tests import them from there."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docker"))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def lock(root: Path) -> Path:
    return root / "docker" / "requirements.lock"


@pytest.fixture(scope="session")
def project(root: Path) -> dict[str, Any]:
    """[project] of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    tree: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())
    return tree["project"]
