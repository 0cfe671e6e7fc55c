"""A RayCluster in Kubernetes, as kubectl sees it: which there are, their token, a way in.

kubectl knows the user's clusters, logins and rights; no other client would need less.
"""

import base64
import binascii
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tlrunner.errors import ConfigError, ResourceError

NAMESPACE = "tlrunner"  # of the manifests in k8s/
DASHBOARD_PORT = 8265
ANSWER_SECONDS = 30  # of the API server; then kubectl is ended


@dataclass(frozen=True)
class Kubectl:
    """kubectl for one context (None: the current one) and namespace."""

    context: str | None
    namespace: str

    def command(self, *words: str) -> list[str]:
        """The command line.

        Raises:
            ConfigError: kubectl is not installed.
        """
        program = shutil.which("kubectl")
        if program is None:
            raise ConfigError("kubectl is not installed", "", "install it, or give --address")
        context = ["--context", self.context] if self.context else []
        return [program, *context, "--namespace", self.namespace, *words]

    def get(self, *words: str) -> Any:
        """What `kubectl get ... -o json` says.

        Raises:
            ResourceError: it fails.
        """
        command = self.command("get", *words, "-o", "json")
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise _unanswered(words, f"no answer for {ANSWER_SECONDS} s") from None
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise _unanswered(words, said[-1])
        return json.loads(done.stdout)


@dataclass(frozen=True)
class RayCluster:
    """`service`: of its head. `secret`: that of its token; None where it asks for none."""

    kubectl: Kubectl
    name: str
    service: str
    secret: str | None

    def token(self) -> str | None:
        """The token that its dashboard asks for.

        Raises:
            ResourceError: the Secret cannot be read, or holds none.
        """
        if self.secret is None:
            return None
        data = self.kubectl.get("secret", self.secret).get("data") or {}
        try:
            return base64.b64decode(data["auth_token"], validate=True).decode()
        except (KeyError, binascii.Error, UnicodeDecodeError) as err:
            raise ResourceError(
                f"the Secret {self.secret} has no token", "a key auth_token", "look at the operator"
            ) from err

    @contextmanager
    def forwarded(self) -> Iterator[str]:
        """An address on this machine that leads to its dashboard, inside this block.

        Raises:
            ResourceError: kubectl cannot forward the port.
        """
        words = ("port-forward", "--address", "127.0.0.1", f"service/{self.service}")
        command = self.kubectl.command(*words, f":{DASHBOARD_PORT}")
        # Not of the terminal's process group, or Ctrl-C would take the way to say what goes on.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout and process.stderr
        try:
            found = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
            if not found:
                process.terminate()
                said = process.stderr.read().strip().splitlines() or ["it ended"]
                raise _unanswered(words[:1], said[-1])
            yield f"http://127.0.0.1:{found[1]}"
        finally:
            process.terminate()
            process.communicate()


def find_cluster(kubectl: Kubectl, name: str | None) -> RayCluster:
    """The RayCluster of that name, or the only one; those of RayJobs are theirs alone.

    Raises:
        ConfigError: there is none, or which one is meant cannot be told.
        ResourceError: the API server cannot be asked.
    """
    items = kubectl.get("rayclusters.ray.io")["items"]
    clusters = {item["metadata"]["name"]: item for item in items if not _is_of_a_job(item)}
    chosen = name or (next(iter(clusters)) if len(clusters) == 1 else "")
    if chosen not in clusters:
        asked = f"there is no RayCluster '{name}'" if name else f"there are {len(clusters)}"
        raise ConfigError(
            f"namespace {kubectl.namespace}: {asked}" + ("" if name else " RayClusters"),
            ", ".join(sorted(clusters)) or "kubectl apply -k k8s/overlays/... makes one",
            "choose one with --cluster, or another --namespace",
        )
    item = clusters[chosen]
    auth = item["spec"].get("authOptions") or {}
    head = (item.get("status") or {}).get("head") or {}
    return RayCluster(
        kubectl,
        chosen,
        head.get("serviceName") or f"{chosen}-head-svc",
        auth.get("secretName") or chosen if auth.get("mode") == "token" else None,
    )


def _is_of_a_job(item: Any) -> bool:
    owners = item["metadata"].get("ownerReferences") or ()
    return any(owner.get("kind") == "RayJob" for owner in owners)


def _unanswered(words: tuple[str, ...], why: str) -> ResourceError:
    return ResourceError(
        f"kubectl {' '.join(words)} failed: {why}",
        "",
        "check --context, --namespace and your rights there",
    )
