"""Images built, mounted and measured with buildah, in a storage of their own below a directory.

No engine and no registry: the base is a Debian that mmdebstrap makes, under the name that
docker/Dockerfile gives in BASE. The settings of pip on this machine (index, certificates, folders
with wheels) are lent to the build as a secret and read-only mounts; they are in no layer.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BASE = "docker.io/library/python:3.11-slim-bookworm"
BASE_PACKAGES = "python3,python3-pip,ca-certificates"  # what Debian lacks of that image
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Of pip's settings, those that say where files come from; the lock decides the rest.
PIP_SETTINGS = """
    index-url extra-index-url find-links no-index cert client-cert proxy trusted-host
    default-timeout timeout retries
"""
NEEDED = ("buildah", "mmdebstrap")


@dataclass(frozen=True)
class Layer:
    """One layer of an image: the instruction that made it and its size unpacked."""

    made_by: str
    size_bytes: int


def missing(programs: Sequence[str]) -> list[str]:
    """Those of the programs that this machine lacks."""
    return [program for program in programs if not shutil.which(program)]


def pip_settings() -> dict[str, str]:
    """What pip is told on this machine, by files and by PIP_*, of where packages come from."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings: dict[str, str] = {}
    for line in listed.splitlines():  # section.name='value'; PIP_* come first, and count more
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in PIP_SETTINGS.split():
            settings.setdefault(name, " ".join(str(ast.literal_eval(value)).split()))
    return settings


def local_paths(settings: dict[str, str]) -> list[Path]:
    """Files and directories of this machine that pip's settings name.

    The pages of an index on disk link to files beside its own directory, so it is the parent's.
    """
    paths = []
    for value in " ".join(settings.values()).split():
        path = Path(value.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            paths.append(path.parent if value.startswith("file://") else path)
    return sorted(set(paths))


class Images:
    """A storage of images below `work`, and the context that they are built from."""

    def __init__(self, work: Path, context: Path = ROOT) -> None:
        self.work, self.context = work, context
        for name in ("store", "run", "tmp"):
            (work / name).mkdir(parents=True, exist_ok=True)
        self.driver = "overlay" if _has_overlay(work) else "vfs"
        self.policy = work / "tmp" / "policy.json"
        self.policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        storage = {"driver": self.driver, "graphroot": work / "store", "runroot": work / "run"}
        lines = [f'{key} = "{value}"' for key, value in storage.items()]
        conf = work / "tmp" / "storage.conf"
        conf.write_text("\n".join(["[storage]", *lines, ""]))
        self._env = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(conf),
            "TMPDIR": str(work / "tmp"),
        }

    def buildah(self, *args: object, log: Path | None = None) -> str:
        """Run buildah; gives what it prints, or writes that to `log`."""
        command = ["buildah", *map(str, args)]
        if log is None:
            return subprocess.run(
                command, env=self._env, check=True, stdout=subprocess.PIPE, text=True
            ).stdout.strip()
        with log.open("wb") as file:
            subprocess.run(command, env=self._env, check=True, stdout=file, stderr=file)
        return ""

    def make_base(self, suite: str = "bookworm") -> None:
        """A Debian with Python under the name of the base."""
        tar = self.work / "base.tar"
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={BASE_PACKAGES}"]
        subprocess.run([*command, suite, tar], check=True, env=self._env)
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, tar, "/")
        self.buildah("config", "--env", f"PATH={PATH}", container)
        self.buildah("commit", "--quiet", "--signature-policy", self.policy, container, BASE)
        self.buildah("rm", container)
        tar.unlink()

    def build(self, target: str, tag: str, log: Path) -> None:
        """Build a target of docker/Dockerfile from the base, as Docker would layer it.

        Raises:
            subprocess.CalledProcessError: it did not build; `log` says why.
        """
        settings = pip_settings()
        conf = self.work / "tmp" / "pip.conf"
        conf.touch(0o600)  # a password may be in it
        conf.write_text("\n".join(["[global]", *(f"{k} = {v}" for k, v in settings.items()), ""]))
        mounts = [f"--volume={path}:{path}:ro" for path in local_paths(settings)]
        # vfs copies the whole tree for each layer, so there a stage is one layer.
        layers = f"--layers={str(self.driver == 'overlay').lower()}"
        options = [
            "--isolation=chroot",
            "--pull-never",
            "--network=host",
            "--format=docker",
            layers,
        ]
        options += ["--signature-policy", str(self.policy), "--secret", f"id=pip.conf,src={conf}"]
        file = self.context / "docker" / "Dockerfile"
        self.buildah(
            *("bud", *options, *mounts, "--target", target, "--tag", tag, "--file", file),
            self.context,
            log=log,
        )

    def config(self, image: str) -> dict[str, Any]:
        """What the image says of itself: User, Env, Labels, Cmd, WorkingDir, history."""
        inspected = json.loads(self.buildah("inspect", "--type", "image", image))
        return {**inspected["Docker"]["config"], "history": inspected["Docker"]["history"]}

    def layers(self, image: str) -> list[Layer]:
        """Its layers from the base up."""
        by_id = {layer["id"]: layer for layer in self._stored("layers")}
        (top,) = (
            stored["layer"]
            for stored in self._stored("images")
            if any(name.partition("/")[2] == image for name in stored.get("names", []))
        )
        sizes = []
        while top:
            sizes.append(by_id[top].get("diff-size", 0))
            top = by_id[top].get("parent", "")
        steps = [step for step in self.config(image)["history"] if not step.get("empty_layer")]
        names = [step.get("created_by", "").strip() or "base" for step in steps]
        names = names if len(names) == len(sizes) else [""] * len(sizes)
        return [Layer(name, size) for name, size in zip(names, reversed(sizes), strict=True)]

    def compressed_bytes(self, image: str) -> list[int]:
        """What a node pulls: its layers as a registry keeps them, gzipped, from the base up."""
        place = self.work / "tmp" / "pushed"
        self.buildah("push", "--quiet", "--signature-policy", self.policy, image, f"oci:{place}")
        (entry,) = json.loads((place / "index.json").read_text())["manifests"]
        manifest = (place / "blobs" / entry["digest"].replace(":", "/")).read_text()
        shutil.rmtree(place)
        return [layer["size"] for layer in json.loads(manifest)["layers"]]

    def mount(self, image: str) -> tuple[str, Path]:
        """A container of the image, and where its file system is mounted."""
        container = self.buildah("from", "--pull-never", image)
        return container, Path(self.buildah("mount", container))

    def close(self) -> None:
        """Remove the storage, and whatever of it is mounted."""
        mounted = [
            line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()
        ]
        for path in sorted(mounted, reverse=True):  # what is mounted within comes first
            if path.startswith(f"{self.work.resolve()}/"):
                subprocess.run(["umount", path], check=False)
        for name in ("store", "run", "tmp"):
            shutil.rmtree(self.work / name)

    def _stored(self, what: str) -> list[dict[str, Any]]:
        path = self.work / "store" / f"{self.driver}-{what}" / f"{what}.json"
        stored: list[dict[str, Any]] = json.loads(path.read_text())
        return stored


def _has_overlay(work: Path) -> bool:
    """Whether the kernel mounts an overlay below this directory; it does not on an overlay."""
    parts = {name: work / "tmp" / "overlay" / name for name in ("lower", "upper", "inner", "top")}
    for path in parts.values():
        path.mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['inner']}"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(parts["top"])]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if mounted:
        subprocess.run(["umount", parts["top"]], check=True)
    shutil.rmtree(work / "tmp" / "overlay")
    return mounted
