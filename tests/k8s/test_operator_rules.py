"""The operator would take these manifests, and each of these mistakes is one that it would not."""

from typing import Any

import pytest
from manifests import JOBS, SCENARIOS, build, of_kind
from operator_rules import DEFAULT_GATES, problems
from test_manifests import HEAD, change

WITH_TLS = DEFAULT_GATES | {"RayClusterMTLS"}
RAY = (*HEAD, "template", "spec", "containers", 0)
CPU, GPU = ("spec", "workerGroupSpecs", 0), ("spec", "workerGroupSpecs", 1)
REDIS = {"redisAddress": "redis:6379"}


def setting(name: str) -> list[dict[str, str]]:
    return [{"name": name, "value": "true"}]


@pytest.mark.parametrize("scenario", [*SCENARIOS, *JOBS])
def test_the_operator_refuses_nothing(scenario: str) -> None:
    gates = WITH_TLS if scenario in ("everything", "job-of-everything") else DEFAULT_GATES
    assert [line for each in build(scenario) for line in problems(each, gates)] == []


def test_mtls_needs_its_feature_gate() -> None:
    (cluster,) = of_kind(build("everything"), "RayCluster")
    assert problems(cluster) == ["tlsOptions needs the operator's feature gate RayClusterMTLS"]


# what is wrong -> what is said of it, and the changes that make it so
CLUSTER_MISTAKES: dict[str, tuple[Any, ...]] = {
    "long name": ("longer than 53", change("metadata", "name", to="c" * 54)),
    "name with a digit first": ("not a DNS label", change("metadata", "name", to="1st")),
    "no container": ("headgroup: no container", change(*RAY[:-1], to=[])),
    "resources in two places": (
        "both in rayStartParams",
        change(*HEAD, "resources", to={"CPU": "1"}),
    ),
    "labels as a parameter": ("instead of", change(*CPU, "rayStartParams", "labels", to="a=b")),
    "a label that is none": ("is no label", change(*CPU, "labels", to={"a b": "c"})),
    "negative replicas": ("cpu: negative", change(*CPU, "minReplicas", to=-1)),
    "more at least than at most": ("above maxReplicas", change(*CPU, "minReplicas", to=9)),
    "no bounds without autoscaling": (
        "needed without autoscaling",
        change("spec", "enableInTreeAutoscaling", to=False),
        change(*CPU, "maxReplicas", to=None),
    ),
    "negative idle timeout": (
        "idleTimeoutSeconds: negative",
        change("spec", "autoscalerOptions", "idleTimeoutSeconds", to=-1),
    ),
    "idle timeout of a group with v1": (
        "without autoscaler v2",
        change("spec", "autoscalerOptions", "version", to="v1"),
        change(*CPU, "idleTimeoutSeconds", to=60),
    ),
    "priority with an old Ray": (
        "priority needs Ray 2.56",
        change("spec", "rayVersion", to="2.55.1"),
        change(*GPU, "priority", to=1),
    ),
    "a suspended group": ("cannot be suspended", change(*CPU, "suspend", to=True)),
    "restarts with autoscaler v2": (
        "restartPolicy must be Never",
        change(*HEAD, "template", "spec", "restartPolicy", to="Always"),
    ),
    "v2 by variable and by field": (
        "both RAY_enable",
        change(*RAY, "env", to=setting("RAY_enable_autoscaler_v2")),
    ),
    "v2 without autoscaling": (
        "while autoscaling is off",
        change("spec", "enableInTreeAutoscaling", to=False),
        change(*RAY, "env", to=setting("RAY_enable_autoscaler_v2")),
    ),
    "the operator's own variable": (
        "sets what the operator sets",
        change("spec", "autoscalerOptions", "env", to=setting("KUBERAY_GEN_AUTOSCALER_START_CMD")),
    ),
    "token with an old Ray": ("needs a rayVersion", change("spec", "rayVersion", to="2.51.9")),
    "token without a version": ("needs a rayVersion", change("spec", "rayVersion", to=None)),
    "two ways to check tokens": (
        "no secretName",
        change(
            "spec",
            "authOptions",
            to={"mode": "token", "enableK8sTokenAuth": True, "secretName": "s"},
        ),
    ),
    "the cluster's tokens without mode": (
        "needs mode token",
        change("spec", "authOptions", to={"mode": "disabled", "enableK8sTokenAuth": True}),
    ),
    "policies by the operator": ("RayClusterNetworkPolicy", change("spec", "networkPolicy", to={})),
    "TLS by hand beside tlsOptions": (
        "sets TLS variables",
        change("spec", "tlsOptions", to={"enabled": True}),
        change(*RAY, "env", to=setting("RAY_USE_TLS")),
    ),
    "Redis without its options": (
        "without gcsFaultToleranceOptions",
        change(*RAY, "env", to=setting("RAY_REDIS_ADDRESS")),
    ),
    "Redis twice": (
        "beside gcsFaultToleranceOptions",
        change("spec", "gcsFaultToleranceOptions", to=REDIS),
        change(*HEAD, "rayStartParams", "redis-password", to="$P"),
    ),
    "Redis by annotation too": (
        "annotation ray.io/ft-enabled",
        change("spec", "gcsFaultToleranceOptions", to=REDIS),
        change("metadata", "annotations", to={"ray.io/ft-enabled": "true"}),
    ),
    "a disk for Redis": (
        "is for rocksdb",
        change("spec", "gcsFaultToleranceOptions", to=REDIS | {"storage": {"size": "1Gi"}}),
    ),
    "a user of Redis": (
        "Redis user name",
        change(*HEAD, "rayStartParams", "redis-username", to="u"),
    ),
    "two groups of one name": ("two groups of one name", change(*GPU, "groupName", to="cpu")),
    "a group with capitals": ("no DNS label", change(*GPU, "groupName", to="GPU")),
    "replicas out of bounds": ("replicas outside", change(*GPU, "replicas", to=5)),
}


@pytest.mark.parametrize("mistake", CLUSTER_MISTAKES)
def test_a_mistake_in_a_cluster_is_found(mistake: str) -> None:
    said, *changes = CLUSTER_MISTAKES[mistake]
    (cluster,) = of_kind(build("base"), "RayCluster")
    for apply in changes:
        apply(cluster)
    assert any(said in line for line in problems(cluster, WITH_TLS)), problems(cluster, WITH_TLS)


SPEC = ("spec",)
RULES = ("spec", "deletionStrategy", "deletionRules")
SUCCEEDED = {"jobStatus": "SUCCEEDED", "ttlSeconds": 9}
JOB_MISTAKES: dict[str, tuple[Any, ...]] = {
    "long name": ("longer than 47", change("metadata", "name", to="j" * 48)),
    "rules and shutdown": (
        "exclude shutdownAfterJobFinishes",
        change(*SPEC, "shutdownAfterJobFinishes", to=True),
    ),
    "rules and the old way": (
        "exclude onSuccess",
        change(*SPEC, "deletionStrategy", "onSuccess", to={"policy": "DeleteSelf"}),
    ),
    "an empty strategy": ("needs deletionRules", change(*SPEC, "deletionStrategy", to={})),
    "time to live without shutdown": (
        "without shutdownAfterJobFinishes",
        change(*SPEC, "ttlSecondsAfterFinished", to=60),
    ),
    "workers deleted under an autoscaler": (
        "does not go with autoscaling",
        change(*RULES, to=[{"policy": "DeleteWorkers", "condition": SUCCEEDED}]),
    ),
    "the job before its cluster": (
        "that before the job",
        change(*RULES, 1, "condition", "ttlSeconds", to=0),
    ),
    "one rule twice": (
        "two rules for DeleteSelf",
        change(*RULES, to=[{"policy": "DeleteSelf", "condition": SUCCEEDED}] * 2),
    ),
    "a rule of two conditions": (
        "one condition",
        change(*RULES, 0, "condition", to=SUCCEEDED | {"jobDeploymentStatus": "Failed"}),
    ),
    "suspended without shutdown": ("suspend needs", change(*SPEC, "suspend", to=True)),
    "no cluster at all": ("neither rayClusterSpec", change(*SPEC, "rayClusterSpec", to=None)),
    "retries on a cluster of others": (
        "clusterSelector goes neither",
        change(*SPEC, "clusterSelector", to={"ray.io/cluster": "tlrunner"}),
    ),
    "retries without a submitter": (
        "not go with InteractiveMode",
        change(*SPEC, "submissionMode", to="InteractiveMode"),
    ),
    "a sidecar with a pod of its own": (
        "SidecarMode takes neither",
        change(*SPEC, "submissionMode", to="SidecarMode"),
    ),
    "negative retries": ("backoffLimit below 0", change(*SPEC, "backoffLimit", to=-1)),
    "no time": ("activeDeadlineSeconds below 1", change(*SPEC, "activeDeadlineSeconds", to=0)),
    "no time to start": ("preRunningDeadline", change(*SPEC, "preRunningDeadlineSeconds", to=0)),
    "an environment that is no YAML": ("no YAML", change(*SPEC, "runtimeEnvYAML", to="a: [")),
    "a mistake in its cluster": (
        "needs a rayVersion",
        change(*SPEC, "rayClusterSpec", "rayVersion", to="2.51.0"),
    ),
}


@pytest.mark.parametrize("mistake", JOB_MISTAKES)
def test_a_mistake_in_a_job_is_found(mistake: str) -> None:
    said, *changes = JOB_MISTAKES[mistake]
    (job,) = build("jobs")
    for apply in changes:
        apply(job)
    assert any(said in line for line in problems(job)), problems(job)
