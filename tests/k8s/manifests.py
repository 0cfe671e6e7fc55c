"""Manifests as kustomize gives them: each overlay, the RayJob, and what components add up to.

A scenario is a list of what is built together; `build` gives its objects. `operator_pods` gives the
pods that KubeRay 1.7 makes of a RayCluster or RayJob, with the containers that it adds.
"""

import copy
import os
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

K8S = Path(__file__).resolve().parents[2] / "k8s"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "k8s"
Object = dict[str, Any]

OVERLAYS = ("dev-kind", "single-node-gpu", "prod-eks")
EXTRAS = ("monitoring", "kueue", "gcs-ft-redis", "mtls", "spot")
SCENARIOS: dict[str, tuple[str, ...]] = {
    "base": ("base",),
    **{name: (f"overlays/{name}",) for name in OVERLAYS},
    "everything": ("overlays/prod-eks", *(f"components/{name}" for name in EXTRAS)),
    "keys-and-spot": ("base", "components/s3-static", "components/spot"),
}
JOBS: dict[str, tuple[str, ...]] = {
    "jobs": ("jobs",),
    **{
        f"job-of-{name}": (*SCENARIOS[name], "jobs/rayjob.yaml", "components/job")
        for name in (*OVERLAYS, "everything")
    },
    "job-in-queue": (
        "overlays/prod-eks",
        "jobs/rayjob.yaml",
        "components/job",
        "components/kueue-job",
    ),
}
CLUSTER_OF = {  # whose namespace a job runs in
    "jobs": "prod-eks",
    "job-in-queue": "prod-eks",
    **{name: name.removeprefix("job-of-") for name in JOBS if name.startswith("job-of-")},
}
OTHERS = {  # kinds of others' CRDs, whose schemas are not here: not checked, and not applied
    "PodMonitor": "Prometheus operator",
    "PrometheusRule": "Prometheus operator",
    "ResourceFlavor": "Kueue",
    "ClusterQueue": "Kueue",
    "LocalQueue": "Kueue",
}


def _kustomize(directory: str | Path) -> str:
    # The restriction is on files above a kustomization, which `_built` names.
    command = ["kubectl", "kustomize", "--load-restrictor=LoadRestrictionsNone", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kustomized(directory: str | Path) -> list[Object]:
    """The objects of a directory with a kustomization."""
    return [found for found in yaml.safe_load_all(_kustomize(directory)) if found]


@cache
def _built(parts: tuple[str, ...]) -> str:
    with tempfile.TemporaryDirectory() as made:
        at = {part: os.path.relpath(K8S / part, made) for part in parts}
        components = [at[part] for part in parts if part.startswith("components/")]
        resources = [path for path in at.values() if path not in components]
        file = Path(made) / "kustomization.yaml"
        file.write_text(yaml.safe_dump({"resources": resources, "components": components}))
        return _kustomize(made)


def build(scenario: str) -> list[Object]:
    """The objects of a scenario, anew each time: tests change them."""
    parts = {**SCENARIOS, **JOBS}[scenario]
    return [found for found in yaml.safe_load_all(_built(parts)) if found]


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [found for found in objects if found["kind"] == kind]


def cluster_spec(found: Object) -> Object:
    """The spec of a RayCluster, or of the cluster that a RayJob makes."""
    spec: Object = found["spec"]
    return spec if found["kind"] == "RayCluster" else spec.get("rayClusterSpec", {})


class Made(NamedTuple):
    """A pod as the operator or a controller makes it, and how many there may be of it."""

    name: str
    role: str  # head, worker, submitter, other
    spec: Object
    most: int


def operator_pods(found: Object) -> Iterator[Made]:
    """The pods of a RayCluster or RayJob, with what the operator adds to them."""
    spec = cluster_spec(found)
    name = found["metadata"]["name"]
    if "headGroupSpec" in spec:
        yield Made(f"{name}-head", "head", _head(spec), 1)
    for group in spec.get("workerGroupSpecs", []):
        most = group["maxReplicas"] * group.get("numOfHosts", 1)
        yield Made(f"{name}-{group['groupName']}", "worker", _worker(group, spec), most)
    if template := found["spec"].get("submitterPodTemplate"):
        yield Made(f"{name}-submitter", "submitter", copy.deepcopy(template["spec"]), 1)


def all_pods(objects: list[Object]) -> Iterator[Made]:
    for found in objects:
        if found["kind"] in ("RayCluster", "RayJob"):
            yield from operator_pods(found)
        elif found["kind"] in ("Deployment", "StatefulSet"):
            spec = found["spec"]
            template = copy.deepcopy(spec["template"]["spec"])
            for claim in spec.get("volumeClaimTemplates", []):
                volume = {"persistentVolumeClaim": {}, "name": claim["metadata"]["name"]}
                template.setdefault("volumes", []).append(volume)
            yield Made(found["metadata"]["name"], "other", template, spec["replicas"])


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def _head(spec: Object) -> Object:
    pod: Object = copy.deepcopy(spec["headGroupSpec"]["template"]["spec"])
    if spec.get("enableInTreeAutoscaling"):
        options = copy.deepcopy(spec.get("autoscalerOptions", {}))
        half = {"cpu": "500m", "memory": "512Mi"}
        added = {
            "name": "autoscaler",
            "image": options.get("image", pod["containers"][0]["image"]),
            "imagePullPolicy": options.get("imagePullPolicy", "IfNotPresent"),
            "resources": options.get("resources", {"requests": half, "limits": half}),
            "volumeMounts": options.get("volumeMounts", []),
            "securityContext": options.get("securityContext", {}),
            "env": options.get("env", []),
        }
        pod["containers"].append(added)
    return _with_tls_wait(pod, spec)


def _worker(group: Object, spec: Object) -> Object:
    pod: Object = copy.deepcopy(group["template"]["spec"])
    little = {"cpu": "200m", "memory": "256Mi"}
    added = copy.deepcopy(pod["containers"][0])
    added |= {"name": "wait-gcs-ready", "resources": {"requests": little, "limits": little}}
    added.pop("envFrom", None)
    pod.setdefault("initContainers", []).append(added)
    return _with_tls_wait(pod, spec)


def _with_tls_wait(pod: Object, spec: Object) -> Object:
    if spec.get("tlsOptions", {}).get("enabled"):
        least = {"cpu": "50m", "memory": "64Mi"}
        kept = ("image", "imagePullPolicy", "securityContext")
        added = {key: pod["containers"][0][key] for key in kept}
        added |= {"name": "wait-for-tls-ip-san", "resources": {"requests": least, "limits": least}}
        added["volumeMounts"] = [{"name": "ray-tls", "mountPath": "/tls", "readOnly": True}]
        pod.setdefault("volumes", []).append({"name": "ray-tls", "secret": {"secretName": "made"}})
        pod["initContainers"] = [added, *pod.get("initContainers", [])]
    return pod
