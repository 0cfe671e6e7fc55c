"""Pods without a cluster: network namespaces on a switch of their own, and crun in each.

A pod is what the hardened manifests ask for: user 10001, no capabilities, no new privileges, the
image's file system read-only, memory on /tmp, /home/tlrunner and /dev/shm, names of the others in
/etc/hosts. The switch is a namespace as well: this machine's own network is not touched.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

NEEDED = ("crun", "ip", "unshare")
SUBNET = "10.77.0"
USER = 10001
STOP_SECONDS = 15
# crun 1.8 refuses machines with both versions of control groups, such as an old kernel's default.
CRUN = "mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null; exec crun --cgroup-manager=disabled"


class Network:
    """Hosts on a switch. `names` are theirs; the first is SUBNET.1. Close it when done."""

    def __init__(self, names: Sequence[str]) -> None:
        self.prefix = f"tl{os.getpid()}-"
        self.addresses = {name: f"{SUBNET}.{n}" for n, name in enumerate(names, start=1)}
        switch = f"{self.prefix}switch"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, (name, address) in enumerate(self.addresses.items(), start=1):
            space, port = self.space(name), f"port{number}"
            _ip("netns", "add", space)
            peer = ("type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", switch, "link", "add", port, *peer)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def space(self, name: str) -> str:
        """The network namespace of a host."""
        return f"{self.prefix}{name}"

    def request(self, host: str, url: str, *, token: str = "", body: str = "") -> tuple[int, str]:
        """Status and text of an HTTP answer that `host` gets; status 0 where there is none."""
        command = ["ip", "netns", "exec", self.space(host), sys.executable, "-c", _ASK, url]
        asked = json.dumps({"token": token, "body": body})
        ended = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
        status, _, text = ended.stdout.partition("\n")
        return (int(status), text) if status.isdecimal() else (0, ended.stderr[-200:])

    def close(self) -> None:
        """Remove every namespace; what links them goes with them."""
        for name in (*self.addresses, "switch"):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", self.space(name))


@dataclass
class Pod:
    """A container of the image on a host of the network."""

    host: str
    network: Network
    root: Path  # the image's file system; may be shared, since nobody writes it
    work: Path
    env: Mapping[str, str]
    mounts: Mapping[str, Path] = field(default_factory=dict)  # path inside -> directory outside
    _crun: "subprocess.Popen[bytes] | None" = None

    @property
    def name(self) -> str:
        return f"{self.network.prefix}{self.work.name}"

    def start(self, command: str, log: IO[bytes]) -> None:
        """Run a command of bash as the pod's first process, as KubeRay does."""
        self.work.mkdir(parents=True)
        (self.work / "hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{address} {name}\n" for name, address in self.network.addresses.items())
        )
        (self.work / "config.json").write_text(json.dumps(self._spec(command)))
        (self.work / "config.json").chmod(0o600)  # a token may be in it
        # Its input is a pipe that ends, since crun hands its files over to the pod's user.
        arguments = [*self._crun_command("run"), "--bundle", str(self.work), self.name]
        self._crun = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=log, stderr=log)
        assert self._crun.stdin is not None
        self._crun.stdin.close()

    def is_up(self) -> bool:
        """Whether its first process runs."""
        return self._crun is not None and self._crun.poll() is None

    def wait(self, timeout_seconds: float) -> int:
        """Its exit code."""
        assert self._crun is not None, "the pod was not started"
        return self._crun.wait(timeout_seconds)

    def stop(self) -> None:
        """End it as a node does: SIGTERM, and SIGKILL where that does not help."""
        for signal in ("TERM", "KILL"):
            if not self.is_up():
                break
            subprocess.run(
                [*self._crun_command("kill"), self.name, signal], check=False, capture_output=True
            )
            with suppress(subprocess.TimeoutExpired):
                self.wait(STOP_SECONDS)
        forced = [*self._crun_command("delete"), "--force", self.name]
        subprocess.run(forced, check=False, capture_output=True)

    def _crun_command(self, verb: str) -> list[str]:
        state = self.work.parent / "crun"
        script = f'{CRUN} --root "$0" "$@"'
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        return [*command, str(state), verb]

    def _spec(self, command: str) -> dict[str, object]:
        """The pod in the words of the OCI runtime specification."""
        memory = {"type": "tmpfs", "source": "tmpfs"}
        own = f"uid={USER},gid={USER}".split(",")
        mounts: list[dict[str, object]] = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", **memory, "options": ["nosuid", "mode=755", "size=64k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
            {"destination": "/dev/shm", **memory, "options": ["nosuid", "nodev", "mode=1777"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
            {"destination": "/tmp", **memory, "options": ["nosuid", "nodev", "mode=1777"]},
            {"destination": "/home/tlrunner", **memory, "options": ["nosuid", "nodev", *own]},
            _bind("/etc/hosts", self.work / "hosts", "ro"),
            *(_bind(inside, outside) for inside, outside in self.mounts.items()),
        ]
        spaces: list[dict[str, str]] = [{"type": t} for t in ("pid", "mount", "ipc", "uts")]
        path = f"/run/netns/{self.network.space(self.host)}"
        none: list[str] = []
        kinds = ("bounding", "effective", "permitted", "inheritable", "ambient")
        return {
            "ociVersion": "1.0.2",
            "hostname": self.host,
            "root": {"path": str(self.root), "readonly": True},
            "mounts": mounts,
            "linux": {"namespaces": [*spaces, {"type": "network", "path": path}]},
            "process": {
                "args": ["/bin/bash", "-c", "--", command],
                "env": [f"{name}={value}" for name, value in self.env.items()],
                "cwd": "/home/tlrunner",
                "user": {"uid": USER, "gid": USER},
                "capabilities": dict.fromkeys(kinds, none),
                "noNewPrivileges": True,
            },
        }


def wait_until(is_so: Callable[[], bool], what: str, timeout_seconds: float) -> None:
    """Ask again and again.

    Raises:
        TimeoutError: it did not come about.
    """
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_seconds:.0f} s")
        time.sleep(0.5)


def _bind(inside: str, outside: Path, *options: str) -> dict[str, object]:
    kind = {"destination": inside, "type": "bind", "source": str(outside)}
    return {**kind, "options": ["bind", "nosuid", "nodev", *options]}


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


_ASK = """
import json, sys, urllib.error, urllib.request
asked = json.load(sys.stdin)
headers = {"Content-Type": "application/json"}
if asked["token"]:
    headers["Authorization"] = "Bearer " + asked["token"]
request = urllib.request.Request(sys.argv[1], asked["body"].encode() or None, headers)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    with opener.open(request, timeout=10) as answer:
        print(answer.status, answer.read().decode(), sep="\\n")
except urllib.error.HTTPError as err:
    print(err.code, err.read().decode(), sep="\\n")
"""
