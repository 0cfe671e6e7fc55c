"""The files of a repository that a job on a cluster needs: its own, and nothing that lies beside.

What git tracks is the repository's own. What it does not track yet is taken from `jobs/` and
`tlrunner/` alone, and there only code and config that it does not ignore: data, runs and secrets
stay where they are.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tlrunner.errors import ConfigError

NEW_IN = ("jobs", "tlrunner")
NEW_SUFFIXES = (".py", ".yaml", ".yml", ".json")
IGNORING = (".gitignore", ".rayignore")  # by which Ray would leave out what was chosen here
MOST_BYTES = 100 << 20  # Ray refuses 500 MiB, and takes a while until then


@dataclass(frozen=True)
class Bundle:
    """Files below `root`, by their path from there. `new`: those that are not tracked yet."""

    root: Path
    files: tuple[Path, ...]
    new: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return sum((self.root / file).stat().st_size for file in self.files)

    def copy_to(self, directory: Path) -> None:
        for file in self.files:
            target = directory / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.root / file, target)


def bundle_of(job: Path) -> Bundle:
    """The files of the repository that a job file belongs to.

    Raises:
        ConfigError: it is in no repository of tlrunner jobs, or that is too large to be sent.
    """
    if not job.is_file():
        raise ConfigError(f"there is no job file {job}", "", "e.g. jobs/tune_flowers.py")
    job = job.resolve()
    root = next((path for path in job.parents if (path / "pyproject.toml").is_file()), None)
    if root is None:
        raise ConfigError(
            f"{job} is in no repository", "a job file below a pyproject.toml", "e.g. in jobs/"
        )
    tracked = _known_to_git(root, "--cached")
    new = _new_code(root, has_git=bool(tracked))
    # A link could lead anywhere; what was removed and is tracked still is not there.
    there = [f for f in (*tracked, *new) if (root / f).is_file() and not (root / f).is_symlink()]
    files = [file for file in there if file.name not in IGNORING]
    bundle = Bundle(root, tuple(sorted(files)), tuple(new) if tracked else ())
    if job.relative_to(root) not in bundle.files:
        raise ConfigError(f"{job} is not of the repository {root}", "", "put it into jobs/")
    if bundle.num_bytes > MOST_BYTES:
        largest = max(files, key=lambda file: (root / file).stat().st_size)
        raise ConfigError(
            f"the repository's files have {bundle.num_bytes >> 20} MiB, e.g. {largest}",
            f"at most {MOST_BYTES >> 20} MiB",
            "keep data out of it: images are read from --data",
        )
    return bundle


def _known_to_git(root: Path, *which: str) -> list[Path]:
    """What git lists below a directory; nothing where there is no git, or none is installed."""
    command = ["git", "-C", str(root), "ls-files", "-z", *which]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return []
    names = done.stdout.decode(errors="surrogateescape").split("\0") if done.returncode == 0 else ()
    return [Path(name) for name in names if name]


def _new_code(root: Path, *, has_git: bool) -> list[Path]:
    if has_git:
        found = _known_to_git(root, "--others", "--exclude-standard", "--", *NEW_IN)
    else:
        found = [p.relative_to(root) for folder in NEW_IN for p in (root / folder).rglob("*")]
    return sorted(path for path in found if path.suffix in NEW_SUFFIXES)
