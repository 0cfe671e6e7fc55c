"""Is this image what it should be? Run inside it: python /opt/tlrunner/smoke.py [--pod] [--quick]

One line for each thing wrong, and exit code 1; else a summary and 0. `--pod` also asks for what a
hardened pod adds: a read-only root, no capabilities, no new privileges. `--quick` trains nothing.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

HOME = Path("/opt/tlrunner")  # this file's, and that of what it reads
UID = 10001
MODULES = """
    torch torchvision timm accelerate safetensors pyarrow.parquet boto3 pydantic optuna simplejpeg
    cv2 rich numpy PIL yaml ray ray.tune ray.train.torch ray.dashboard.dashboard
    tlrunner.run tlrunner.tune.search tlrunner.data.store tlrunner.report.finish
"""
WEIGHTS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
COMPILERS = "cc gcc g++ c++ c99 clang tcc ld as nvcc ptxas make cargo rustc go"
RISES = "sudo doas pkexec"  # programs that make a user root
TRAINING = """
    --data sample:flowers --set data.limit=50 --set data.image_size=64 --set train.epochs=1
    --set train.batch_size=16 --set freeze.strategy=head
"""

Faults = Iterator[str]


def pins(lock: Path) -> dict[str, str]:
    """Name -> version of each line `name==version`."""
    return dict(re.findall(r"^([a-z0-9-]+)==([^ \\\n;]+)", lock.read_text(), re.MULTILINE))


def left_out(list_file: Path) -> list[str]:
    """Patterns of the metadata directories that a list for trim.py removes."""
    lines = list_file.read_text().split() if list_file.is_file() else []
    return [line for line in lines if line.endswith(".dist-info")]


def versions() -> Faults:
    """Every package of the lock is there, in its version, but for those left out on purpose."""
    absent = left_out(HOME / "left-out.txt")
    for name, version in pins(HOME / "requirements.lock").items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            directory = f"{name.replace('-', '_')}-{version}.dist-info"
            if not any(fnmatch(directory, pattern) for pattern in absent):
                yield f"{name} {version} is locked, and not installed"
            continue
        if found != version:
            yield f"{name} is {found}, and {version} is locked"
    for program in ("ray", "tlrunner"):
        if shutil.which(program) != f"/opt/venv/bin/{program}":
            yield f"`{program}` is {shutil.which(program)}, not /opt/venv/bin/{program}"


def imports() -> Faults:
    """What a job imports can be imported, and its bytecode lies beside it."""
    if "PYTHONDONTWRITEBYTECODE" in os.environ:
        yield "PYTHONDONTWRITEBYTECODE is set"
    for name in MODULES.split():
        try:
            importlib.import_module(name)
        except Exception as err:  # noqa: BLE001  (whatever an import may raise)
            yield f"import {name}: {type(err).__name__}: {err}"
    files = {str(getattr(module, "__file__", None)) for module in list(sys.modules.values())}
    # torch has modules without a file that name one all the same, without its directory.
    sources = sorted(file for file in files if file.endswith(".py") and Path(file).is_absolute())
    bare = [file for file in sources if not _is_compiled(file)]
    if bare:
        yield f"{len(bare)} modules have no bytecode, such as {bare[0]}"


def _is_compiled(source: str) -> bool:
    """Whether Python takes the bytecode beside a file, without compiling it anew."""
    bytecode = Path(importlib.util.cache_from_source(source))
    if not bytecode.is_file():
        return False
    with bytecode.open("rb") as file:  # PEP 552: magic number, flags, time and size of the source
        magic, flags, seconds, size = struct.unpack("<4sIII", file.read(16))
    written = Path(source).stat()
    is_of_source = (seconds, size) == (int(written.st_mtime), written.st_size)
    return magic == importlib.util.MAGIC_NUMBER and (bool(flags) or is_of_source)


def weights() -> Faults:
    """The ImageNet weights that come as packages are inside, bit by bit."""
    from tlrunner.files import sha256_file
    from tlrunner.model.from_timm import LITE_SHA256, packaged_file

    for name in WEIGHTS:
        path = packaged_file(name)
        if not path.is_file():
            yield f"the weights of {name} are not at {path}"
        elif sha256_file(path) != LITE_SHA256[name]:
            yield f"the weights of {name} are others than tlrunner knows"


def user() -> Faults:
    """Nobody special, who may write where pods write and nowhere else."""
    if (os.getuid(), os.getgid()) != (UID, UID):
        yield f"user and group are {os.getuid()}:{os.getgid()}, not {UID}:{UID}"
    if os.environ.get("HOME") != "/home/tlrunner":
        yield f"HOME is {os.environ.get('HOME')}, not /home/tlrunner"
    for path in ("/tmp", "/home/tlrunner", "/dev/shm"):
        if not os.access(path, os.W_OK):
            yield f"{path} cannot be written"
    for path in ("/", "/etc", "/usr", "/opt", "/opt/venv", "/opt/tlrunner"):
        if os.access(path, os.W_OK):
            yield f"{path} can be written"
    if Path("/home/tlrunner/.cache/pip").exists():
        yield "there is a cache of pip in /home/tlrunner"


def programs() -> Faults:
    """A shell for KubeRay, also as a login shell; nothing to compile with, nothing to rise with."""
    if not os.access("/bin/bash", os.X_OK):
        yield "there is no /bin/bash"
    else:
        found = subprocess.run(
            ["/bin/bash", "-lc", "command -v ray"], capture_output=True, text=True, check=False
        )
        if found.stdout.strip() != "/opt/venv/bin/ray":
            yield f"a login shell finds ray at '{found.stdout.strip()}', not in /opt/venv/bin"
    if not shutil.which("wget"):
        yield "there is no wget, which probes of KubeRay call"
    for program in f"{COMPILERS} {RISES}".split():
        if where := shutil.which(program):
            yield f"{where} is in the image"
    for path in _files_of_root():
        if path.lstat().st_mode & (stat.S_ISUID | stat.S_ISGID):
            yield f"{path} is setuid or setgid"


def _files_of_root() -> Iterator[Path]:
    """Regular files of the image that this user sees; other file systems are not the image's."""
    device = Path("/").stat().st_dev
    for directory, names, files in os.walk("/"):
        here = Path(directory)
        names[:] = [name for name in names if _device(here / name) == device]
        yield from (here / name for name in files if not (here / name).is_symlink())


def _device(path: Path) -> int | None:
    try:
        return path.lstat().st_dev
    except OSError:  # a process of /proc that ended meanwhile
        return None


def training() -> Faults:
    """A head is trained on flowers that tlrunner draws, from the packaged weights."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, f"{HOME}/jobs/train.py", *TRAINING.split(), "--name", "smoke"]
        command += ["--out", directory, "--set", f"data.cache_dir={directory}/cache"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
        if ended.returncode:
            last = (ended.stderr.strip() or ended.stdout.strip()).splitlines()[-1:]
            yield f"jobs/train.py ended with {ended.returncode}: {''.join(last)}"
        elif not Path(directory, "smoke", "_SUCCESS").is_file():
            yield "jobs/train.py ended with 0 and left no _SUCCESS"


def pod() -> Faults:
    """What the pod takes away from the image is gone."""
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(status[name], 16):
            yield f"{name} is {status[name]}: the pod has capabilities"
    if status["NoNewPrivs"] != "1":
        yield "the pod may gain privileges (allowPrivilegeEscalation)"
    if not os.statvfs("/").f_flag & os.ST_RDONLY:
        yield "the root file system can be written (readOnlyRootFilesystem)"


def main() -> int:
    """Run the checks, each of them whatever the others found."""
    parser = argparse.ArgumentParser(description="Check the image that this runs in.")
    parser.add_argument("--pod", action="store_true", help="ask for what a hardened pod adds")
    parser.add_argument("--quick", action="store_true", help="train nothing")
    flags = parser.parse_args()
    checks: list[Callable[[], Faults]] = [versions, imports, weights, user, programs]
    checks += [] if flags.quick else [training]
    checks += [pod] if flags.pod else []
    faults, told = 0, []
    for check in checks:
        started = time.monotonic()
        try:
            for fault in check():
                faults += 1
                print(f"{check.__name__}: {fault}")
        except Exception as err:  # noqa: BLE001  (a check that breaks is one more thing wrong)
            faults += 1
            print(f"{check.__name__}: {type(err).__name__}: {err}")
        told.append(f"{check.__name__} {time.monotonic() - started:.1f} s")
    print(f"{faults} things wrong" if faults else f"all well: {', '.join(told)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
