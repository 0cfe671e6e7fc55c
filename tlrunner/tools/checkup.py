"""What a machine has, and whether that will do: facts first, which a node of a cluster can tell of
itself, then a line for each, ok or with what to do.
"""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tlrunner.config import CACHE_DIR
from tlrunner.errors import ResourceError
from tlrunner.machine import memory_bytes, num_cpus
from tlrunner.uris import local_path

LEAST_MEMORY_BYTES = 4 << 30
LEAST_DISK_BYTES = 5 << 30
LEAST_SHM_BYTES = 1 << 30  # a container has 64 MiB where nobody asked for more
ABSENT = "is not installed"
MEASURED = ("ray", "torch", "torchvision", "timm", "accelerate", "pyarrow", "pydantic", "tlrunner")


@dataclass(frozen=True)
class Check:
    """A line: what was looked at, what was found, and what to do about it; nothing if it is ok."""

    what: str
    found: str
    remedy: str = ""
    exit_code: int = ResourceError.exit_code

    def __str__(self) -> str:
        mark = f"NOT OK, {self.remedy}" if self.remedy else "ok"
        return f"{self.what}: {self.found}: {mark}"


@dataclass(frozen=True)
class Facts:
    """Of one machine. `versions`: of the packages that are MEASURED; `gpus`: name and bytes."""

    host: str
    python: str
    versions: dict[str, str]
    num_cpus: int
    memory_bytes: int
    gpus: list[tuple[str, int]]
    has_gpu_device: bool
    disk_bytes: dict[str, int]
    shm_bytes: int | None


def facts_of_this_machine() -> Facts:
    import torch

    is_usable = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(g) for g in range(torch.cuda.device_count())]
    shm = Path("/dev/shm")
    return Facts(
        host=platform.node(),
        python=platform.python_version(),
        versions={name: _version(name) for name in MEASURED},
        num_cpus=num_cpus(),
        memory_bytes=memory_bytes(),
        gpus=[(gpu.name, gpu.total_memory) for gpu in gpus] if is_usable else [],
        has_gpu_device=Path("/dev/nvidia0").exists(),
        disk_bytes={str(p): _free(p) for p in (local_path(CACHE_DIR), Path(os.sep, "tmp"))},
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
    )


def check_packages() -> list[Check]:
    """Python and the packages that this machine's tlrunner needs."""
    about = metadata.metadata("tlrunner")
    wanted = SpecifierSet(about["Requires-Python"])
    python = platform.python_version()
    remedy = "" if python in wanted else f"use Python {wanted}"
    needed = [Requirement(text) for text in metadata.requires("tlrunner") or ()]
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [f"{r.name} {_version(r.name)}, not {r.specifier}" for r in needed if not _fits(r)]
    return [
        Check("python", f"{python} in {sys.prefix}", remedy),
        Check(
            "packages",
            "; ".join(wrong) or f"{len(needed)} as tlrunner needs them",
            "pip install -e ." if wrong else "",
        ),
        _check_torchvision(),
    ]


def check_machine(facts: Facts) -> list[Check]:
    """What a machine has for trials."""
    gpus = ", ".join(f"{name} ({_gib(size)})" for name, size in facts.gpus)
    is_blind = facts.has_gpu_device and not facts.gpus
    low = facts.memory_bytes < LEAST_MEMORY_BYTES
    checks = [
        Check(
            "GPUs",
            gpus or ("one that torch cannot use" if is_blind else "none, trials run on CPUs"),
            "install the driver that this build of torch needs" if is_blind else "",
        ),
        Check(
            "memory",
            f"{_gib(facts.memory_bytes)}, {facts.num_cpus} CPUs",
            f"give it {_gib(LEAST_MEMORY_BYTES)} or more" if low else "",
        ),
    ]
    for place, free in facts.disk_bytes.items():
        few = free < LEAST_DISK_BYTES
        remedy = f"free {_gib(LEAST_DISK_BYTES)}, or choose another place" if few else ""
        checks.append(Check(f"disk {place}", f"{_gib(free)} free", remedy))
    if facts.shm_bytes is not None:
        small = facts.shm_bytes < LEAST_SHM_BYTES
        remedy = "mount a larger one: docker --shm-size, or an emptyDir of medium Memory"
        checks.append(Check("/dev/shm", _gib(facts.shm_bytes), remedy if small else ""))
    return checks


def check_alike(here: Facts, node: Facts) -> Check:
    """Whether a node runs what this machine runs."""
    ours, theirs = (dict(f.versions, python=f.python) for f in (here, node))
    others = [
        f"{name} {theirs.get(name, ABSENT)}, not {ours[name]}"
        for name in ours
        if theirs.get(name) != ours[name]
    ]
    return Check(
        "versions",
        "; ".join(others) or "as here",
        "use one image for all nodes and for whoever submits" if others else "",
    )


def _check_torchvision() -> Check:
    """Torch and torchvision of two builds install, and do not work together."""
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as err:  # noqa: BLE001  (a border: whatever the import of another build raises)
        first = (str(err).strip().splitlines() or [type(err).__name__])[0][:200]
        return Check("torch", first, "install torch and torchvision of one build")
    return Check("torch", f"{torch.__version__} and torchvision {torchvision.__version__} fit")


def _fits(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ABSENT


def _free(path: Path) -> int:
    """Bytes free where a directory is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
