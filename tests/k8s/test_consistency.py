"""The manifests agree with themselves and with what is installed, and a mistake is noticed."""

import importlib.metadata
import re
import shutil
from pathlib import Path

import consistency
import pytest
import yaml
from manifests import (
    CLUSTER_OF,
    JOBS,
    K8S,
    OVERLAYS,
    SCENARIOS,
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
    assert consistency.everything(objects, build("jobs")) == []
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
