"""The files of a repository that a job on a cluster needs: its own, and nothing that lies beside.

What git tracks is the repository's own. What it does not track yet is taken from `jobs/` and
`tlrunner/` alone, and there only code and config: data, runs and secrets stay where they are.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tlrunner.errors import ConfigError

NEW_IN = ("jobs", "tlrunner")
NEW_SUFFIXES = (".py", ".yaml", ".yml", ".json")
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
    tracked = _tracked(root)
    new = [path for path in _new_code(root) if path not in tracked]
    # A link could lead anywhere; what was removed and is tracked still is not there.
    files = [f for f in (*tracked, *new) if (root / f).is_file() and not (root / f).is_symlink()]
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


def _tracked(root: Path) -> list[Path]:
    """What git tracks below a directory; nothing where there is no git, or none is installed."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return []
    names = done.stdout.decode(errors="surrogateescape").split("\0") if done.returncode == 0 else ()
    return [Path(name) for name in names if name]


def _new_code(root: Path) -> list[Path]:
    return [
        path.relative_to(root)
        for folder in NEW_IN
        for path in sorted((root / folder).rglob("*"))
        if path.suffix in NEW_SUFFIXES
    ]
