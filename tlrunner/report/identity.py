"""What a run is by its own account, `run.json`, and what may lie in its directory."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tlrunner.errors import StorageError

TRIAL_ID = re.compile(r"[0-9]{4,}-[a-z0-9]+(-e[0-9]+)?")


@dataclass(frozen=True)
class _Images:
    manifest_sha256: str


@dataclass(frozen=True)
class _Settled:
    streaming: Literal["auto", "on", "off"]
    decoded_cache: Literal["auto", "on", "off"]


@dataclass(frozen=True)
class _Job:
    data: _Settled


@dataclass(frozen=True)
class Identity:
    """`run.json`, as far as it is read back."""

    config_hash: str
    config: _Job
    data: _Images


def check_inside(directory: Path) -> None:
    """Refuse links that lead out of a run, to where its files would be written and removed.

    The run's own directory may be a link, which is its owner's choice, and trackers make their own.
    """
    root = os.path.realpath(directory)
    for parent, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(parent) / name
            leads_to = os.path.realpath(path) if path.is_symlink() else parent
            if not Path(leads_to).is_relative_to(root):
                raise StorageError(
                    f"{path} is a link to {leads_to}, outside of the run",
                    "files and directories, and links among them",
                    "remove the link, or put what it leads to in its place",
                )
        if parent == root:
            names[:] = [name for name in names if name in ("trials", "best")]
