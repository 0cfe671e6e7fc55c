"""`kubectl apply`, `diff` and `delete`, against a stand-in for the API server.

The stand-in has the schemas of Kubernetes 1.34 and KubeRay and keeps objects in memory; it has no
controllers, no CEL, and does not know the kinds of `manifests.OTHERS`, which are left out.
"""

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from manifests import JOBS, K8S, OTHERS, OVERLAYS, SHARED, build

# kubectl sends a PodDisruptionBudget's selector at each apply; a real server finds it the same.
PATCHED = "poddisruptionbudget.policy/"
Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a stand-in API server, run by the interpreter of kubernetes-validate."""
    validate = shutil.which("kubernetes-validate")
    if not SHARED.is_dir() or validate is None or shutil.which("kubectl") is None:
        pytest.skip("needs kubectl, kubernetes-validate and ../shared/k8s")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = Path(validate).resolve().parent / "python"
    with subprocess.Popen([python, SHARED / "fakeapi.py", str(port)]) as process:
        for _ in range(200):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.fixture
def kubectl(server: str, tmp_path: Path) -> Kubectl:
    """kubectl that talks to the stand-in and to nothing else."""
    config = tmp_path / "kubeconfig"
    named = {"name": "fake", "cluster": {"server": server}}
    context = {"name": "fake", "context": {"cluster": "fake", "user": ""}}
    config.write_text(
        yaml.safe_dump({"clusters": [named], "contexts": [context], "current-context": "fake"})
    )

    def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = ["kubectl", f"--kubeconfig={config}", f"--cache-dir={tmp_path / 'cache'}"]
        command += [*map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def applied_unchanged_deleted(kubectl: Kubectl, *what: str | Path) -> int:
    """How many objects were applied, found unchanged and without a difference, and deleted."""
    first = kubectl("apply", "--validate=false", *what)
    assert first.returncode == 0, first.stderr
    made = first.stdout.splitlines()
    assert all(line.endswith((" created", " serverside-applied")) for line in made), first.stdout

    second = kubectl("apply", "--validate=false", *what).stdout.splitlines()
    assert [e for e in second if not e.endswith(" unchanged") and not e.startswith(PATCHED)] == []
    assert len(second) == len(made)

    difference = kubectl("diff", *what)
    changed = [line for line in difference.stdout.splitlines() if re.match(r"[+-] ", line)]
    assert [line for line in changed if "resourceVersion" not in line] == []
    assert difference.stderr == ""

    gone = kubectl("delete", "--wait=false", *what)
    assert gone.returncode == 0, gone.stderr
    assert len(gone.stdout.splitlines()) == len(made)
    return len(made)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_applied_once_and_deleted(kubectl: Kubectl, overlay: str) -> None:
    there = len(build(overlay))
    assert applied_unchanged_deleted(kubectl, "-k", K8S / "overlays" / overlay) == there


@pytest.mark.parametrize("scenario", ["everything", "jobs", "job-in-queue"])
def test_what_components_add_up_to_is_applied_too(
    kubectl: Kubectl, scenario: str, tmp_path: Path
) -> None:
    namespace = tmp_path / "namespace.yaml"
    namespace.write_text(yaml.safe_dump(build("base")[0]))
    objects = [each for each in build(scenario) if each["kind"] not in OTHERS]
    if scenario in JOBS:
        assert kubectl("apply", "--validate=false", "-f", namespace).returncode == 0
    file = tmp_path / "objects.yaml"
    file.write_text(yaml.safe_dump_all(objects))
    assert applied_unchanged_deleted(kubectl, "-f", file) == len(objects)
    kubectl("delete", "--wait=false", "--ignore-not-found", "-f", namespace)


def test_the_server_refuses_a_mistake(kubectl: Kubectl, tmp_path: Path) -> None:
    namespace, *others = build("base")
    cluster = next(each for each in others if each["kind"] == "RayCluster")
    cluster["spec"]["workerGroupSpec"] = []
    file = tmp_path / "objects.yaml"
    file.write_text(yaml.safe_dump_all([namespace, cluster]))
    done = kubectl("apply", "--validate=false", "-f", file)
    assert done.returncode != 0
    assert "workerGroupSpec" in done.stderr
    kubectl("delete", "--wait=false", "--ignore-not-found", "-f", file)
