"""trim.py removes what a list names; cpu-unused.txt names what is there."""

import importlib.metadata
import platform
import sysconfig
from pathlib import Path

import pytest
import trim

LIST = "# of no use\n\nbig\nlib/*.a  # for compilers\n"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    for name in ("big/a/b.py", "lib/one.a", "lib/two.a", "lib/three.so"):
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1_000_000))
    return tmp_path / "packages"


@pytest.fixture
def list_file(tmp_path: Path) -> Path:
    path = tmp_path / "list.txt"
    path.write_text(LIST)
    return path


def test_files_and_directories_that_match_are_removed(
    list_file: Path, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trim.trim(list_file, packages) == []
    assert [path.name for path in packages.rglob("*") if path.is_file()] == ["three.so"]
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["1.0", "MB", "big"],
        ["2.0", "MB", "lib/*.a"],
        ["3.0", "MB", "in", "all"],
    ]


def test_a_pattern_that_matches_nothing_is_told(list_file: Path, packages: Path) -> None:
    list_file.write_text(f"{LIST}gone-*\n")
    assert trim.trim(list_file, packages) == ["gone-*"]


def test_where_nothing_matches_there_is_nothing_to_leave_out(
    list_file: Path, packages: Path
) -> None:
    list_file.write_text("nvidia\ntriton\n")
    assert trim.trim(list_file, packages) == []


def test_what_a_link_leads_to_stays(list_file: Path, packages: Path) -> None:
    kept = packages.parent / "kept"
    (packages / "big").rename(kept)
    (packages / "big").symlink_to(kept)
    trim.trim(list_file, packages)
    assert (kept / "a" / "b.py").is_file()
    assert not (packages / "big").is_symlink()


def test_every_pattern_of_the_cpu_image_matches_what_is_installed(root: Path) -> None:
    packages = Path(sysconfig.get_path("purelib"))
    if platform.machine() != "x86_64" or not (packages / "triton").is_dir():
        pytest.skip("torch is no CUDA build here")
    patterns = trim.patterns(root / "docker" / "cpu-unused.txt")
    absent = [pattern for pattern in patterns if not any(packages.glob(pattern))]
    assert absent == [], f"with torch {importlib.metadata.version('torch')}"
