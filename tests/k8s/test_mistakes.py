"""Mistakes in the manifests, planted one at a time: each is noticed."""

from typing import Any

import consistency
import pytest
from manifests import build, of_kind
from test_manifests import HEAD, change

RAY = (*HEAD, "template", "spec", "containers", 0)
POD = (*HEAD, "template", "spec")
CPU = ("spec", "workerGroupSpecs", 0)
# what is wrong -> what is said of it, the kind that is changed, and the change
MISTAKES: dict[str, tuple[str, str, Any]] = {
    "another Ray": ("rayVersion 2.59.0", "RayCluster", change("spec", "rayVersion", to="2.59.0")),
    "an image of another Ray": (
        "is not of tlrunner",
        "RayCluster",
        change(*RAY, "image", to="tlrunner:0.1.0-ray2.59.0-cpu"),
    ),
    "the latest image": (
        "names no version",
        "RayCluster",
        change(*RAY, "image", to="tlrunner:latest"),
    ),
    "an image without a tag": (
        "names no version",
        "RayCluster",
        change(*RAY, "image", to="tlrunner"),
    ),
    "a quota below the cluster": (
        "requests.memory 200Gi below",
        "ResourceQuota",
        change("spec", "hard", "requests.memory", to="200Gi"),
    ),
    "a quota that forgets the autoscaler": (
        "limits.cpu 66 below",
        "ResourceQuota",
        change("spec", "hard", "limits.cpu", to="66"),
    ),
    "no limit of GPUs": (
        "GPUs are not limited",
        "ResourceQuota",
        change("spec", "hard", "requests.nvidia.com/gpu", to=None),
    ),
    "too few pods": ("pods 9 below", "ResourceQuota", change("spec", "hard", "pods", to="9")),
    "more workers than the quota": (
        "requests.nvidia.com/gpu 4 below 40",
        "RayCluster",
        change("spec", "workerGroupSpecs", 1, "maxReplicas", to=40),
    ),
    "shared memory above the memory": (
        "more than half of its memory",
        "RayCluster",
        change(*POD, "volumes", 3, "emptyDir", "sizeLimit", to="9Gi"),
    ),
    "an object store above shared memory": (
        "object store above /dev/shm",
        "RayCluster",
        change(*CPU, "rayStartParams", "object-store-memory", to="9000000000"),
    ),
    "a volume without a limit": (
        "without sizeLimit",
        "RayCluster",
        change(*CPU, "template", "spec", "volumes", 0, "emptyDir", to={}),
    ),
    "volumes above the disk": (
        "larger than its ephemeral-storage",
        "RayCluster",
        change(*CPU, "template", "spec", "volumes", 0, "emptyDir", "sizeLimit", to="900Gi"),
    ),
    "an autoscaler that cannot write": (
        "autoscaler: not writable: ['/dev/shm', '/home/tlrunner', '/tmp']",
        "RayCluster",
        change("spec", "autoscalerOptions", "volumeMounts", to=[]),
    ),
    "a mount of nothing": (
        "no volume caches",
        "RayCluster",
        change(*RAY, "volumeMounts", 0, "name", to="caches"),
    ),
    "an autoscaler that may do anything": (
        "autoscaler: security context",
        "RayCluster",
        change("spec", "autoscalerOptions", "securityContext", to=None),
    ),
    "root": ("below 10000", "RayCluster", change(*POD, "securityContext", "runAsUser", to=0)),
    "the network of the node": (
        "shares something",
        "RayCluster",
        change(*POD, "hostNetwork", to=True),
    ),
    "a path of the node": (
        "mounts a path of its node",
        "RayCluster",
        change(*POD, "volumes", 0, to={"name": "tmp", "hostPath": {"path": "/tmp"}}),
    ),
    "a port of the node": (
        "a port of its node",
        "RayCluster",
        change(*RAY, "ports", 0, "hostPort", to=6379),
    ),
    "a load balancer": (
        "offered outside",
        "RayCluster",
        change(*HEAD, "serviceType", to="LoadBalancer"),
    ),
    "an ingress": ("has an ingress", "RayCluster", change(*HEAD, "enableIngress", to=True)),
    "a secret in git": ("is in git", "LimitRange", change("kind", to="Secret")),
    "a key in clear": (
        "AWS_SECRET_ACCESS_KEY in clear",
        "RayCluster",
        change(*RAY, "env", 0, to={"name": "AWS_SECRET_ACCESS_KEY", "value": "k"}),
    ),
    "the API server's token for jobs": (
        "has the autoscaler's token",
        "RayCluster",
        change(*RAY, "volumeMounts", 0, "name", to="api-token"),
    ),
    "a token by default": (
        "mounts a service account's token",
        "RayCluster",
        change(*POD, "automountServiceAccountToken", to=True),
    ),
    "no time to end": (
        "to end",
        "RayCluster",
        change(*POD, "terminationGracePeriodSeconds", to=30),
    ),
    "no time to stop a job": ("3 to stop a job", "RayCluster", change(*RAY, "env", to=[])),
    "ray stop before the end": (
        "preStop",
        "RayCluster",
        change(*RAY, "lifecycle", to={"preStop": {"exec": {"command": ["ray", "stop"]}}}),
    ),
    "a head that trains": (
        "takes work",
        "RayCluster",
        change(*HEAD, "rayStartParams", "num-cpus", to="2"),
    ),
    "requests below limits": (
        "requests are not limits",
        "RayCluster",
        change(*RAY, "resources", "requests", to={"cpu": "1"}),
    ),
    "an account that is not there": (
        "no service account nobody",
        "RayCluster",
        change(*POD, "serviceAccountName", to="nobody"),
    ),
    "a priority that is not there": (
        "no priority class high",
        "RayCluster",
        change(*POD, "priorityClassName", to="high"),
    ),
    "a namespace that lets anything in": (
        "Pod Security is not enforced",
        "Namespace",
        change("metadata", "labels", to={}),
    ),
    "a network without a wall": (
        "no network policy denies",
        "NetworkPolicy",
        change("spec", "policyTypes", to=["Ingress"]),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str) -> None:
    said, kind, apply = MISTAKES[mistake]
    objects, job = build("base"), build("jobs")
    for each in of_kind(objects, kind):
        apply(each)
    lines = consistency.everything(objects, job)
    assert any(said in line for line in lines), lines


JOB_MISTAKES = {
    "a run with another name": ("another name", change("metadata", "name", to="other")),
    "a submitter without its label": (
        "cannot reach the dashboard",
        change("spec", "submitterPodTemplate", "metadata", "labels", to={}),
    ),
    "a cache without a bound": (
        "does not leave room",
        change("spec", "entrypoint", to="python job.py --name tune-flowers --data d"),
    ),
    "another user": (
        "another user",
        change("spec", "submitterPodTemplate", "spec", "securityContext", "runAsUser", to=20000),
    ),
}


@pytest.mark.parametrize("mistake", JOB_MISTAKES)
def test_a_mistake_in_a_job_is_noticed(mistake: str) -> None:
    said, apply = JOB_MISTAKES[mistake]
    (job,) = build("jobs")
    apply(job)
    lines = consistency.problems([job])
    assert any(said in line for line in lines), lines
