"""Which files of a repository go to a cluster."""

import subprocess
from pathlib import Path

import pytest

from tlrunner.errors import ConfigError
from tlrunner.tools import bundle
from tlrunner.tools.bundle import bundle_of


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two tracked files, and around them what a working directory has as well."""
    for name in (
        *("pyproject.toml", "jobs/tune.py", "jobs/new.py", "jobs/notes.txt", "tlrunner/run.py"),
        *(".env", "photos/rose/1.jpg", "runs/first/summary.json"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "jobs" / "link.py").symlink_to("/etc/hostname")
    return tmp_path


def track(root: Path, *names: str) -> None:
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    subprocess.run(["git", "-C", str(root), "add", *names], check=True)


def sent(root: Path, job: str = "jobs/tune.py") -> set[str]:
    return {file.as_posix() for file in bundle_of(root / job).files}


def test_what_is_tracked_goes_and_new_code_beside_it(repository: Path, tmp_path: Path) -> None:
    track(repository, "pyproject.toml", "jobs/tune.py", "tlrunner/run.py")
    code = {"jobs/tune.py", "jobs/new.py", "tlrunner/run.py"}
    assert sent(repository) == {"pyproject.toml", *code}
    found = bundle_of(repository / "jobs" / "new.py")
    assert found.new == (Path("jobs/link.py"), Path("jobs/new.py"))
    found.copy_to(tmp_path / "copy")
    copied = {p.relative_to(tmp_path / "copy") for p in (tmp_path / "copy").rglob("*")}
    assert {path for path in copied if path.suffix} == set(found.files)
    assert (tmp_path / "copy" / "jobs" / "new.py").read_text() == "jobs/new.py"


def test_what_git_ignores_stays_and_what_it_tracks_nevertheless_goes(repository: Path) -> None:
    (repository / ".gitignore").write_text("new.py\nrun.py\n")
    track(repository, ".gitignore", "pyproject.toml", "jobs/tune.py")
    track(repository, "-f", "tlrunner/run.py")
    assert sent(repository) == {"pyproject.toml", "jobs/tune.py", "tlrunner/run.py"}


def test_a_file_that_was_removed_is_not_missed(repository: Path) -> None:
    track(repository, "pyproject.toml", "jobs")
    (repository / "jobs" / "notes.txt").unlink()
    assert "jobs/notes.txt" not in sent(repository)


def test_without_git_the_code_goes(repository: Path) -> None:
    assert sent(repository) == {"jobs/tune.py", "jobs/new.py", "tlrunner/run.py"}
    assert bundle_of(repository / "jobs" / "tune.py").new == ()


def test_what_is_no_job_of_a_repository_is_refused(repository: Path) -> None:
    with pytest.raises(ConfigError, match="there is no job file"):
        bundle_of(repository / "jobs" / "tun.py")
    track(repository, "jobs/tune.py")
    (repository / "photos" / "job.py").write_text("")
    with pytest.raises(ConfigError, match="is not of the repository"):
        bundle_of(repository / "photos" / "job.py")
    (repository / "pyproject.toml").unlink()
    with pytest.raises(ConfigError, match="is in no repository"):
        bundle_of(repository / "jobs" / "tune.py")


def test_a_repository_full_of_data_is_refused(repository: Path, monkeypatch) -> None:
    (repository / "photos" / "all.tar").write_text(1000 * "x")
    track(repository, ".")
    monkeypatch.setattr(bundle, "MOST_BYTES", 900)
    with pytest.raises(ConfigError, match=r"e\.g\. photos/all\.tar"):
        bundle_of(repository / "jobs" / "tune.py")
