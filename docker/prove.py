#!/usr/bin/env python3
"""The long proof of the image: it builds, it is what it says, and two pods of it run a job.

    python3 docker/prove.py [WORK_DIR] [--target cpu]

As root on a Debian with buildah, mmdebstrap, crun, iproute2 and 25 GB of disk; no engine, registry
or cluster. The base is a Debian of the same release as the one that docker/Dockerfile names. It
removes all that it made, but for the logs in a WORK_DIR. Exit code 0 says that everything held.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import images
import pods
from images import ROOT, Images
from pods import USER, Network, Pod, wait_until

HEAD = "tlrunner-head-svc"
DASHBOARD = f"http://{HEAD}:8265"
SMALL = (
    "--data sample:flowers --out /data/runs --set data.limit=100 --set data.image_size=64"
    " --set train.epochs=2 --set search.budget.num_trials=2"
)
START_SECONDS, JOB_SECONDS = 120, 900

times: dict[str, float] = {}
faults: list[str] = []


@contextmanager
def step(name: str) -> Iterator[None]:
    """Say what is done and how long it took."""
    print(f"\n== {name}", flush=True)
    started = time.monotonic()
    yield
    times[name] = time.monotonic() - started
    print(f"   {times[name]:.1f} s", flush=True)


def expect(is_so: bool, what: str) -> None:
    """One thing that must hold. The others are looked at all the same."""
    print(f"   {'ok  ' if is_so else 'FAIL'}  {what}", flush=True)
    if not is_so:
        faults.append(what)


# -- The image ------------------------------------------------------------------------------------


def build(store: Images, target: str, tag: str) -> None:
    """Base and image."""
    with step(f"base: Debian by mmdebstrap, storage by {store.driver}"):
        store.make_base()
    log = store.work / "build.log"
    with step(f"build of target {target}"):
        try:
            store.build(target, tag, log)
        except subprocess.CalledProcessError:
            sys.exit(f"it does not build:\n{log.read_text()[-3000:]}")
    told = [line for line in log.read_text().splitlines() if line.startswith("all well")]
    expect(bool(told), f"smoke.py in the build: {''.join(told)}")
    for line in log.read_text().splitlines():
        if "MB  " in line:
            print(f"   left out {line}")


def inspect(store: Images, tag: str, root: Path) -> None:
    """What the image says of itself, and what is in it as root sees it."""
    config = store.config(tag)
    expect(config["User"] == f"{USER}:{USER}", f"user {config['User']}")
    expect(config.get("WorkingDir") == "/home/tlrunner", f"workdir {config.get('WorkingDir')}")
    expect(not config.get("Entrypoint"), f"entrypoint {config.get('Entrypoint')}")
    labels = config.get("Labels") or {}
    for name in ("title", "description", "version", "licenses"):
        label = f"org.opencontainers.image.{name}"
        expect(bool(labels.get(label)), f"label {label}={labels.get(label)!r}")
    expect(
        bool(labels.get("io.ray.version")), f"label io.ray.version={labels.get('io.ray.version')!r}"
    )
    for variable in config["Env"]:
        print(f"         {variable}")
    rises = _output(
        ["find", root, "-xdev", "-type", "f", "-perm", "/6000", "-printf", "%P\\n"]
    ).split()
    expect(not rises, f"setuid and setgid files: {rises or 'none'}")
    left = [
        path
        for path in ("root/.cache", "home/tlrunner/.cache", "build", "package", "var/lib/apt/lists")
        if (root / path).exists() and any((root / path).iterdir())
    ]
    left += [str(p.relative_to(root)) for p in (root / "tmp").iterdir()]
    left += [str(p.relative_to(root)) for p in (root / "home/tlrunner").iterdir()]
    expect(not left, f"caches and leavings: {left or 'none'}")
    secret = root / "etc/pip.conf"
    expect(not secret.exists() or not secret.stat().st_size, "no settings of pip in it")
    programs = ("bin", "usr/bin", "usr/local/bin", "opt/venv/bin")
    found = [p for d in programs for p in (root / d).glob("*") if p.name in ("gcc", "cc", "sudo")]
    expect(not found, f"compilers and sudo: {found or 'none'}")


def measure(store: Images, tag: str, root: Path) -> None:
    """Sizes: by layer, on disk and as it is pulled, and of what is large in the tree."""
    layers, pulled = store.layers(tag), store.compressed_bytes(tag)
    print("    on disk     pulled")
    for layer, size in zip(layers, pulled, strict=True):
        made_by = " ".join(layer.made_by.split())[:90]
        print(f"   {layer.size_bytes / 1e6:8.1f}   {size / 1e6:8.1f} MB  {made_by}")
    on_disk = sum(layer.size_bytes for layer in layers)
    print(f"   {on_disk / 1e6:8.1f}   {sum(pulled) / 1e6:8.1f} MB  all layers\n")
    packages = "opt/venv/lib/python3.11/site-packages"
    large = ("nvidia", "torch", "triton", "ray", "pyarrow", "pandas", "cv2", "tlrunner")
    for part in ("usr", "var", "opt/venv", *(f"{packages}/{name}" for name in large)):
        if (root / part).exists():
            told = _output(["du", "--summarize", "--bytes", root / part])
            print(f"   {int(told.split()[0]) / 1e6:8.1f} MB  /{part}")


# -- The pods -------------------------------------------------------------------------------------


class Cluster:
    """A head without CPUs for work, a worker, and a host outside that submits."""

    def __init__(self, work: Path, root: Path, environment: list[str], held: ExitStack) -> None:
        self.work, self.root, self.held = work, root, held
        self.token = secrets.token_hex(32)
        self.env = dict(variable.split("=", 1) for variable in environment)
        self.network = Network([HEAD, "worker", "outside"])
        held.callback(self.network.close)
        self.data = work / "data"  # a volume that all pods see
        (self.data / "runs").mkdir(parents=True)
        for path in (self.data, self.data / "runs"):
            os.chown(path, USER, USER)
        self.number = 0

    def pod(self, host: str, command: str, *, env: dict[str, str], **mounts: Path) -> Pod:
        """Start a pod; its output is in WORK_DIR/NUMBER-HOST.log."""
        self.number += 1
        name = f"{self.number}-{host}"
        at = {"/data": self.data, **{f"/{inside}": path for inside, path in mounts.items()}}
        pod = Pod(host, self.network, self.root, self.work / name, {**self.env, **env}, at)
        self.held.callback(pod.stop)
        with (self.work / f"{name}.log").open("wb") as log:
            pod.start(command, log)
        return pod

    def run(self, host: str, command: str, *, token: str, **mounts: Path) -> tuple[int, str]:
        """Exit code and output of a pod that ends by itself."""
        pod = self.pod(host, command, env=self.credentials(token), **mounts)
        code = pod.wait(JOB_SECONDS)
        return code, (self.work / f"{pod.work.name}.log").read_text(errors="replace")

    def credentials(self, token: str) -> dict[str, str]:
        """The environment by which KubeRay gives pods the token; without one, of a stranger."""
        known = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        return known if token else {"RAY_AUTH_MODE": "disabled"}

    def start(self) -> None:
        """Head and worker, until the one knows of the other."""
        ray = "ulimit -n 65536; exec ray start --block --object-store-memory=200000000"
        head = f"{ray} --head --port=6379 --dashboard-host=0.0.0.0 --num-cpus=0"
        worker = f"{ray} --address={HEAD}:6379 --num-cpus=2"
        env = {**self.credentials(self.token), "RAY_JOB_STOP_WAIT_TIME_S": "30"}
        nodes = [self.pod(HEAD, head, env=env)]
        url = f"http://{self.network.addresses[HEAD]}:8265/nodes?view=summary"

        def num_alive() -> int:
            status, text = self.network.request("outside", url, token=self.token)
            for node in nodes:
                if not node.is_up():
                    sys.exit(f"{node.name} ended: {self.log_of(node)}")
            summary = json.loads(text)["data"]["summary"] if status == 200 else []
            return sum(node["raylet"].get("state") == "ALIVE" for node in summary)

        wait_until(lambda: num_alive() == 1, "the head", START_SECONDS)
        nodes.append(self.pod("worker", worker, env=env))
        wait_until(lambda: num_alive() == 2, "the worker", START_SECONDS)

    def log_of(self, pod: Pod) -> str:
        return (self.work / f"{pod.work.name}.log").read_text(errors="replace")[-3000:]


def submit(cluster: Cluster, job: str, options: str = "", **mounts: Path) -> None:
    """A job from outside, to its end: code 0, all trials completed, on the worker."""
    name = job.split("--name ")[1].split()[0]
    command = f"ray job submit --address {DASHBOARD} --submission-id {name} {options} -- {job}"
    code, output = cluster.run("outside", command, token=cluster.token, **mounts)
    expect(code == 0, f"`{command}` ended with {code}")
    tail = output.strip().splitlines()[-200 if code else -6 :]
    print("\n".join(f"      | {line}" for line in tail))
    run = cluster.data / "runs" / name
    if not (run / "_SUCCESS").is_file():
        expect(False, f"{run} has _SUCCESS")
        return
    summary = json.loads((run / "summary.json").read_text())
    expect(summary["status"] == "ok", f"status {summary['status']}, trials {summary['trials']}")


def refuse(cluster: Cluster) -> None:
    """Who has no token, or another, submits nothing; probes need none."""
    url = f"http://{cluster.network.addresses[HEAD]}"
    jobs = f"{url}:8265/api/jobs/"
    body = json.dumps({"entrypoint": "id"})
    for token, expected, who in (("", 401, "without a token"), ("0" * 64, 403, "with another's")):
        status, text = cluster.network.request("outside", jobs, token=token, body=body)
        expect(status == expected, f"POST {jobs} {who}: {status} {text.strip()[:80]}")
    code, output = cluster.run("outside", f"ray job submit --address {DASHBOARD} -- id", token="")
    last = "".join(output.strip().splitlines()[-1:])
    expect(code != 0, f"`ray job submit` without a token ended with {code}: {last[:160]}")
    status, text = cluster.network.request("outside", f"{url}:52365/api/healthz")
    expect(status == 200, f"GET :52365/api/healthz, the probe of KubeRay: {status} {text.strip()}")
    status, text = cluster.network.request("outside", jobs, token=cluster.token)
    ids = {job["submission_id"] for job in json.loads(text)} if status == 200 else set()
    expect(ids == {"image", "outside"}, f"jobs that the cluster knows of: {sorted(map(str, ids))}")


def run_pods(work: Path, root: Path, environment: list[str]) -> None:
    """Everything that takes a cluster."""
    source = work / "source"  # as a user has it: jobs and package, no installation
    for name in ("jobs", "tlrunner"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    with ExitStack() as held:
        held.callback(shutil.rmtree, source)
        held.callback(keep_logs, work / "pods")
        cluster = Cluster(work / "pods", root, environment, held)
        with step("smoke.py in a hardened pod"):
            code, output = cluster.run("worker", "python /opt/tlrunner/smoke.py --pod", token="")
            expect(code == 0, output.strip())
        with step("head and worker, token authentication"):
            cluster.start()
        with step("a job of the image, submitted from outside"):
            job = "python /opt/tlrunner/jobs/tune_flowers.py"
            submit(cluster, f"{job} {SMALL} --name image")
        with step("a job of a working directory, submitted from outside"):
            job = f"python jobs/tune_flowers.py {SMALL} --name outside"
            submit(cluster, job, "--working-dir /source", source=source)
        with step("requests without the token"):
            refuse(cluster)
        stopping = time.monotonic()
    print(f"\n   pods and networks removed in {time.monotonic() - stopping:.1f} s")


def main() -> int:
    """All steps; faults at the end."""
    parser = argparse.ArgumentParser(description="Build, inspect and run the image.")
    parser.add_argument("work", nargs="?", type=Path, help="a new directory; logs stay in it")
    parser.add_argument("--target", default="cpu", choices=["cpu", "gpu"])
    flags = parser.parse_args()
    if os.geteuid() or (lacking := images.missing([*images.NEEDED, *pods.NEEDED])):
        sys.exit("run it as root" if os.geteuid() else f"install {' '.join(lacking)}")
    signal.signal(signal.SIGTERM, _leave)
    work = flags.work or Path(tempfile.mkdtemp(prefix="tlrunner-image-", dir="/var/tmp"))
    tag = f"tlrunner:proof-{flags.target}"
    with ExitStack() as held:
        if not flags.work:
            held.callback(shutil.rmtree, work)
        store = Images(work)
        held.callback(store.close)
        build(store, flags.target, tag)
        container, root = store.mount(tag)
        held.callback(store.buildah, "rm", container)
        with step("inspect"):
            inspect(store, tag, root)
        with step("sizes"):
            measure(store, tag, root)
        run_pods(work, root, store.config(tag)["Env"])
    print("\n== times")
    for name, seconds in times.items():
        print(f"   {seconds:8.1f} s  {name}")
    print(f"\n{len(faults)} things wrong" if faults else "\neverything held")
    return 1 if faults else 0


def keep_logs(directory: Path) -> None:
    """Remove what pods left, such as their tokens, but for what they said."""
    for path in directory.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)


def _output(command: list[object]) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def _leave(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)  # what was made is removed on the way


if __name__ == "__main__":
    sys.exit(main())
