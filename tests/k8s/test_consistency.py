"""The manifests agree with themselves and with what is installed, and a mistake is noticed."""

import importlib.metadata
import re
import shutil
from pathlib import Path
from typing import Any

import consistency
import pytest
import yaml
from manifests import (
    CLUSTER_OF,
    JOBS,
    K8S,
    OVERLAYS,
    SCENARIOS,
    Object,
    all_pods,
    build,
    containers,
    kustomized,
    of_kind,
)
from ray._private import ray_constants
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.autoscaler._private.kuberay import node_provider
from ray.dashboard.consts import DASHBOARD_METRIC_PORT
from ray.dashboard.modules.job import job_supervisor
from test_manifests import HEAD, change

CLUSTERS = tuple(SCENARIOS)
LOCK = K8S.parent / "docker" / "requirements.lock"


def version(package: str) -> str:
    return importlib.metadata.version(package)


@pytest.mark.parametrize("scenario", [*SCENARIOS, *JOBS])
def test_all_of_it_agrees(scenario: str) -> None:
    objects = build(scenario)
    cluster = build(CLUSTER_OF[scenario]) if scenario in JOBS else []
    assert consistency.problems(objects) == []
    assert list(consistency.versions(objects, version("ray"), version("tlrunner"))) == []
    assert list(consistency.referred(objects, cluster)) == []


@pytest.mark.parametrize("scenario", CLUSTERS)
def test_the_quota_covers_the_largest_cluster_and_a_job_beside_it(scenario: str) -> None:
    job = build(f"job-of-{scenario}" if f"job-of-{scenario}" in JOBS else "jobs")
    objects = build(scenario)
    assert list(consistency.quota(objects, job)) == []
    assert list(consistency.enforced(objects)) == []


def test_the_image_installs_the_ray_of_the_manifests() -> None:
    if not LOCK.is_file():
        pytest.skip("needs docker/requirements.lock")
    (locked,) = re.findall(r"^ray(?:\[[a-z,]+\])?==([0-9.]+)", LOCK.read_text(), re.MULTILINE)
    (cluster,) = of_kind(build("base"), "RayCluster")
    assert locked == cluster["spec"]["rayVersion"]


@pytest.mark.parametrize("scenario", JOBS)
def test_a_job_is_all_that_its_directory_makes(scenario: str) -> None:
    assert [each["kind"] for each in build(scenario)] == ["RayJob"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_job_has_the_cluster_of_its_overlay(overlay: str) -> None:
    (cluster,) = of_kind(build(overlay), "RayCluster")
    (job,) = build(f"job-of-{overlay}")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_a_queued_job_waits_with_a_cluster_of_fixed_size() -> None:
    (job,) = build("job-in-queue")
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tlrunner"}
    assert job["spec"]["suspend"] is True
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def test_spot_pods_are_the_gpu_pods_on_other_nodes() -> None:
    (cluster,) = of_kind(build("keys-and-spot"), "RayCluster")
    groups = {each["groupName"]: each["template"] for each in cluster["spec"]["workerGroupSpecs"]}
    spot, gpu = groups["gpu-spot"]["spec"], groups["gpu"]["spec"]
    differing = {key for key in {*spot, *gpu} if spot.get(key) != gpu.get(key)}
    assert differing == {"priorityClassName", "tolerations", "nodeSelector"}
    assert spot["containers"][0]["envFrom"] == [{"secretRef": {"name": "tlrunner-s3"}}]
    worth = {
        e["metadata"]["name"]: e["value"] for e in of_kind(build("everything"), "PriorityClass")
    }
    assert worth["tlrunner-spot"] < worth["tlrunner-worker"] < worth["tlrunner-head"]


def test_the_parts_that_prod_eks_offers_in_comments_fit(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s" / "overlays" / "prod-eks" / "kustomization.yaml"
    text = file.read_text()
    assert text.count("  # - ../../components/") == 5
    file.write_text(text.replace("  # - ../../components/", "  - ../../components/"))

    objects = kustomized(file.parent)
    (cluster,) = of_kind(objects, "RayCluster")
    nodes = [
        each["template"]["spec"].get("nodeSelector", {}).get("karpenter.sh/capacity-type")
        for each in cluster["spec"]["workerGroupSpecs"]
    ]
    assert nodes == [None, "on-demand", "spot"]
    assert everything_said(objects, build("jobs")) == []
    assert [e["kind"] for e in kustomized(tmp_path / "k8s" / "jobs")] == ["RayJob"]


def test_an_overlays_images_are_those_of_its_registry() -> None:
    for scenario in ("prod-eks", "jobs"):
        for made in all_pods(build(scenario)):
            for container in containers(made.spec):
                assert container["image"].startswith("111122223333.dkr.ecr."), made.name


def test_ray_reads_and_listens_where_the_manifests_say() -> None:
    (cluster,) = of_kind(build("base"), "RayCluster")
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    ports = {port["name"]: port["containerPort"] for port in head["containers"][0]["ports"]}
    assert ports["gcs-server"] == ray_constants.DEFAULT_PORT
    assert ports["dashboard"] == ray_constants.DEFAULT_DASHBOARD_PORT
    assert ports["as-metrics"] == AUTOSCALER_METRIC_PORT
    assert ports["dash-metrics"] == DASHBOARD_METRIC_PORT
    (mount,) = [
        each
        for each in cluster["spec"]["autoscalerOptions"]["volumeMounts"]
        if each["name"] == "api-token"
    ]
    (volume,) = [each for each in head["volumes"] if each["name"] == "api-token"]
    token, authority = volume["projected"]["sources"]
    read = {f"{mount['mountPath']}/{token['serviceAccountToken']['path']}"}
    read |= {f"{mount['mountPath']}/{each['path']}" for each in authority["configMap"]["items"]}
    assert read == {node_provider.IN_CLUSTER_TOKEN_PATH, node_provider.IN_CLUSTER_CA_CERT_PATH}
    heeded = Path(job_supervisor.__file__).read_text() + Path(ray_constants.__file__).read_text()
    for each in head["containers"][0]["env"]:
        assert each["name"] == "RAY_USAGE_STATS_ENABLED" or f'"{each["name"]}"' in heeded


def test_no_file_in_the_directory_holds_a_secret() -> None:
    files = [*K8S.rglob("*.yaml")]
    assert len(files) > 20
    for file in files:
        text = file.read_text()
        assert "PRIVATE KEY" not in text
        assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b", text), file
        kinds = [each.get("kind") for each in yaml.safe_load_all(text) if each]
        assert "Secret" not in kinds, file


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


def everything_said(objects: list[Object], job: list[Object]) -> list[str]:
    return [
        *consistency.problems(objects),
        *consistency.versions(objects, version("ray"), version("tlrunner")),
        *consistency.quota(objects, job),
        *consistency.enforced(objects),
        *consistency.referred(objects, []),
    ]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str) -> None:
    said, kind, apply = MISTAKES[mistake]
    objects, job = build("base"), build("jobs")
    for each in of_kind(objects, kind):
        apply(each)
    lines = everything_said(objects, job)
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
