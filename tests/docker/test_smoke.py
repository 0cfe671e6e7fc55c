"""smoke.py finds what is wrong with an image: here with this machine, which is none."""

import py_compile
from pathlib import Path

import pytest
import smoke


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /opt/tlrunner; its lock is that of numpy alone."""
    monkeypatch.setattr(smoke, "HOME", tmp_path)
    monkeypatch.setattr(smoke.shutil, "which", lambda program: f"/opt/venv/bin/{program}")
    (tmp_path / "requirements.lock").write_text(
        f"numpy=={smoke.importlib.metadata.version('numpy')} \\\n    --hash=sha256:0\n"
    )
    return tmp_path


def add_pin(inside: Path, pin: str) -> None:
    with (inside / "requirements.lock").open("a") as file:
        file.write(f"{pin} \\\n    --hash=sha256:0\n    # via something\n")


def test_packages_as_locked_are_well(inside: Path) -> None:
    assert list(smoke.versions()) == []


def test_another_version_than_locked_is_found(inside: Path) -> None:
    add_pin(inside, "pillow==0.0.1")
    (fault,) = smoke.versions()
    assert fault.endswith("and 0.0.1 is locked")


def test_a_package_that_is_missing_is_found_unless_it_was_left_out(inside: Path) -> None:
    add_pin(inside, "no-such-package==1.0")
    assert list(smoke.versions()) == ["no-such-package 1.0 is locked, and not installed"]
    (inside / "left-out.txt").write_text("# why\nno_such_package\nno_such_package-*.dist-info\n")
    assert list(smoke.versions()) == []


def test_bytecode_counts_where_python_would_take_it(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text("x = 1\n")
    assert not smoke._is_compiled(str(source))
    py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
    assert smoke._is_compiled(str(source))
    source.write_text("x = 12\n")
    assert not smoke._is_compiled(str(source))


def test_root_is_not_the_user_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke.os, "getuid", lambda: 0)
    monkeypatch.setattr(smoke.os, "getgid", lambda: 0)
    assert "user and group are 0:0, not 10001:10001" in list(smoke.user())


def test_each_fault_is_a_line_and_a_check_that_breaks_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> smoke.Faults:
        yield "one thing"
        raise OSError("and no more")

    for name in ("versions", "imports", "weights", "user", "programs"):
        monkeypatch.setattr(smoke, name, lambda: iter(()))
    monkeypatch.setattr(smoke, "weights", broken)
    monkeypatch.setattr(smoke.sys, "argv", ["smoke.py", "--quick"])
    assert smoke.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        "broken: one thing",
        "broken: OSError: and no more",
        "2 things wrong",
    ]
    monkeypatch.setattr(smoke, "weights", lambda: iter(()))
    assert smoke.main() == 0
    assert capsys.readouterr().out.startswith("all well: ")
