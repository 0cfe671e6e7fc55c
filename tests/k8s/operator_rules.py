"""What the KubeRay 1.7 operator refuses when it looks at a RayCluster or RayJob.

The API server takes such an object, for its schema does not know these rules; the operator then
reports an event and makes no pod. The rules are those of `ValidateRayClusterSpec` and
`ValidateRayJobSpec` (ray-operator/controllers/ray/utils/validation.go), in words of our own; those
about the history server's collector and about RayService are left out, as nothing here uses them.
At the end are rules that nobody checks and that go wrong later.

`problems(found)` gives a line for each broken rule. `gates` are those of the operator's feature
gates that are on; the default is that of KubeRay 1.7.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

Object = dict[str, Any]
Problems = Iterator[str]
DEFAULT_GATES = frozenset(
    {"RayClusterStatusConditions", "RayJobDeletionPolicy", "RayMultiHostIndexing"}
)
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47}  # suffixes of services and clusters still fit
V2_SWITCH = "RAY_enable_autoscaler_v2"
TLS_ENV = {"RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"}
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_KEY = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def problems(found: Object, gates: frozenset[str] = DEFAULT_GATES) -> list[str]:
    """A line for each rule that a RayCluster or RayJob breaks; none for other kinds."""
    kind = found["kind"]
    if kind not in LONGEST_NAME:
        return []
    said = list(_name(found))
    marks = found["metadata"].get("annotations") or {}
    if kind == "RayJob":
        said += [line for rule in JOB_RULES for line in rule(found["spec"], gates)]
        spec = found["spec"].get("rayClusterSpec")
    else:
        spec = found["spec"]
    if spec:
        said += [line for rule in CLUSTER_RULES for line in rule(spec, gates)]
        said += _fault_tolerance(spec, marks)
    return said


def _name(found: Object) -> Problems:
    name, longest = found["metadata"]["name"], LONGEST_NAME[found["kind"]]
    if len(name) > longest:
        yield f"name: longer than {longest} characters"
    if not DNS_LABEL.fullmatch(name):
        yield "name: not a DNS label that starts with a letter"


# --- parts of a spec ---


def _groups(spec: Object) -> list[tuple[str, Object]]:
    """Head and worker groups, each with its name."""
    workers = [(group["groupName"], group) for group in spec.get("workerGroupSpecs", [])]
    return [("headgroup", spec["headGroupSpec"]), *workers]


def _ray(group: Object) -> Object:
    """The container that runs Ray: the first."""
    found: Object = (group["template"]["spec"].get("containers") or [{}])[0]
    return found


def _env(container: Object) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container.get("env", [])}


def _version(text: str) -> tuple[int, ...] | None:
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text or "")
    return tuple(int(part or 0) for part in found.groups()) if found else None


def _older(spec: Object, least: tuple[int, ...]) -> bool:
    version = _version(spec.get("rayVersion", ""))
    return version is None or version < least


def _autoscales(spec: Object) -> bool:
    return bool(spec.get("enableInTreeAutoscaling"))


def _autoscales_v2(spec: Object) -> bool:
    return spec.get("autoscalerOptions", {}).get("version") == "v2"


def _v2_in_any_way(spec: Object) -> bool:
    return _autoscales_v2(spec) or _env(_ray(spec["headGroupSpec"])).get(V2_SWITCH) in ("1", "true")


# --- rules of a cluster ---


def _containers(spec: Object, gates: frozenset[str]) -> Problems:
    for name, group in _groups(spec):
        if not group["template"]["spec"].get("containers"):
            yield f"{name}: no container"


def _resources_twice(spec: Object, gates: frozenset[str]) -> Problems:
    for name, group in _groups(spec):
        params = group.get("rayStartParams") or {}
        given = {"num-cpus", "num-gpus", "memory", "resources"} & {
            k for k, v in params.items() if v
        }
        if given and group.get("resources"):
            yield f"{name}: resources both in rayStartParams and in `resources`"


def _labels(spec: Object, gates: frozenset[str]) -> Problems:
    for name, group in _groups(spec):
        if "labels" in (group.get("rayStartParams") or {}):
            yield f"{name}: rayStartParams.labels instead of `labels`"
        for key, value in (group.get("labels") or {}).items():
            if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
                yield f"{name}: {key}={value} is no label"


def _replicas(spec: Object, gates: frozenset[str]) -> Problems:
    for name, group in _groups(spec)[1:]:
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if not _autoscales(spec) and (least is None or most is None):
            yield f"{name}: minReplicas and maxReplicas are needed without autoscaling"
        if any(number is not None and number < 0 for number in (least, most)):
            yield f"{name}: negative replicas"
        if least is not None and most is not None and least > most:
            yield f"{name}: minReplicas above maxReplicas"


def _idle_timeouts(spec: Object, gates: frozenset[str]) -> Problems:
    seconds = spec.get("autoscalerOptions", {}).get("idleTimeoutSeconds")
    if seconds is not None and seconds < 0:
        yield "autoscalerOptions.idleTimeoutSeconds: negative"
    for name, group in _groups(spec)[1:]:
        seconds = group.get("idleTimeoutSeconds")
        if seconds is not None and (seconds < 0 or not _v2_in_any_way(spec)):
            yield f"{name}: idleTimeoutSeconds is negative, or without autoscaler v2"


def _priorities(spec: Object, gates: frozenset[str]) -> Problems:
    for name, group in _groups(spec)[1:]:
        if group.get("priority") and (_older(spec, (2, 56, 0)) or not _v2_in_any_way(spec)):
            yield f"{name}: priority needs Ray 2.56 and autoscaler v2"


def _suspended_groups(spec: Object, gates: frozenset[str]) -> Problems:
    for name, group in _groups(spec)[1:]:
        if group.get("suspend") and (_autoscales(spec) or "RayJobDeletionPolicy" not in gates):
            yield f"{name}: a group cannot be suspended while the autoscaler is on"


def _autoscaler(spec: Object, gates: frozenset[str]) -> Problems:
    switch = _env(_ray(spec["headGroupSpec"])).get(V2_SWITCH)
    options = spec.get("autoscalerOptions", {})
    if switch in ("1", "true") and not _autoscales(spec):
        yield f"{V2_SWITCH} is set while autoscaling is off"
    if switch is not None and _autoscales(spec) and options.get("version"):
        yield f"both {V2_SWITCH} and autoscalerOptions.version are set"
    if "KUBERAY_GEN_AUTOSCALER_START_CMD" in _env(options):
        yield "autoscalerOptions.env sets what the operator sets itself"
    if _autoscales(spec) and _autoscales_v2(spec):
        for name, group in _groups(spec):
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield f"{name}: restartPolicy must be Never with autoscaler v2"


def _authentication(spec: Object, gates: frozenset[str]) -> Problems:
    options = spec.get("authOptions") or {}
    by_cluster = options.get("enableK8sTokenAuth", False)
    if options and options.get("mode", "token") == "token":
        if _older(spec, (2, 52, 0)):
            yield "authOptions.mode token needs a rayVersion of 2.52.0 or newer"
        if by_cluster and (_older(spec, (2, 55, 0)) or options.get("secretName")):
            yield "enableK8sTokenAuth needs Ray 2.55.0 and no secretName"
    elif by_cluster:
        yield "enableK8sTokenAuth needs mode token"


def _gated(spec: Object, gates: frozenset[str]) -> Problems:
    asked = {
        "networkPolicy": "RayClusterNetworkPolicy",
        "tlsOptions": "RayClusterMTLS",
        "historyServerOptions": "RayClusterHistoryServer",
    }
    for field, gate in asked.items():
        if spec.get(field) is not None and gate not in gates:
            yield f"{field} needs the operator's feature gate {gate}"


def _tls(spec: Object, gates: frozenset[str]) -> Problems:
    if not (spec.get("tlsOptions") or {}).get("enabled"):
        return
    places = [(name, _ray(group)) for name, group in _groups(spec)]
    for name, container in [*places, ("autoscaler", spec.get("autoscalerOptions", {}))]:
        if TLS_ENV & set(_env(container)):
            yield f"{name}: sets TLS variables that the operator sets itself"
        if any(mount["name"] == "ray-tls" for mount in container.get("volumeMounts", [])):
            yield f"{name}: mounts ray-tls, which is the operator's"


def _fault_tolerance(spec: Object, marks: dict[str, str]) -> Problems:
    options = spec.get("gcsFaultToleranceOptions")
    head = spec["headGroupSpec"]
    params, env = head.get("rayStartParams") or {}, _env(_ray(head))
    if params.get("redis-username") or "REDIS_USERNAME" in env:
        yield "a Redis user name belongs into gcsFaultToleranceOptions"
    if options is None:
        if "RAY_REDIS_ADDRESS" in env and marks.get("ray.io/ft-enabled") != "true":
            yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    if marks.get("ray.io/ft-enabled"):
        yield "the annotation ray.io/ft-enabled beside gcsFaultToleranceOptions"
    if marks.get("ray.io/external-storage-namespace"):
        yield "the annotation ray.io/external-storage-namespace beside gcsFaultToleranceOptions"
    if params.get("redis-password") or {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & set(env):
        yield "Redis in parameters or variables of the head beside gcsFaultToleranceOptions"
    if options.get("backend", "redis") == "redis" and options.get("storage"):
        yield "gcsFaultToleranceOptions.storage is for rocksdb"


# --- rules of a job ---


def _deletion(spec: Object, gates: frozenset[str]) -> Problems:
    strategy, stops = spec.get("deletionStrategy"), spec.get("shutdownAfterJobFinishes", False)
    ttl = spec.get("ttlSecondsAfterFinished", 0)
    if ttl < 0 or (ttl > 0 and not stops):
        yield "ttlSecondsAfterFinished is negative, or without shutdownAfterJobFinishes"
    if strategy is None:
        return
    rules = strategy.get("deletionRules") or []
    legacy = [strategy.get("onSuccess"), strategy.get("onFailure")]
    if rules and stops:
        yield "deletionRules exclude shutdownAfterJobFinishes"
    if rules and any(legacy):
        yield "deletionRules exclude onSuccess and onFailure"
    if not rules and not all(legacy):
        yield "deletionStrategy needs deletionRules, or onSuccess and onFailure"
    yield from _deletion_rules(spec, rules)


def _deletion_rules(spec: Object, rules: list[Object]) -> Problems:
    seconds: dict[tuple[str, str], dict[str, int]] = {}
    for rule in rules:
        condition, policy = rule["condition"], rule["policy"]
        given = [
            (key, condition[key])
            for key in ("jobStatus", "jobDeploymentStatus")
            if key in condition
        ]
        if len(given) != 1 or condition.get("ttlSeconds", 0) < 0:
            yield "a deletion rule has one condition and no negative ttlSeconds"
            continue
        if policy == "DeleteWorkers" and _autoscales(spec.get("rayClusterSpec", {})):
            yield "DeleteWorkers does not go with autoscaling"
        if policy in ("DeleteWorkers", "DeleteCluster") and spec.get("clusterSelector"):
            yield f"{policy} does not go with clusterSelector"
        times = seconds.setdefault(given[0], {})
        if policy in times:
            yield f"two rules for {policy} at the same condition"
        times[policy] = condition.get("ttlSeconds", 0)
    for times in seconds.values():
        order = [times[p] for p in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if p in times]
        if order != sorted(order):
            yield "workers go before their cluster, and that before the job"


def _suspension(spec: Object, gates: frozenset[str]) -> Problems:
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("suspend") and spec.get("clusterSelector"):
        yield "suspend does not go with clusterSelector"


def _selection(spec: Object, gates: frozenset[str]) -> Problems:
    selector = spec.get("clusterSelector")
    if not selector:
        if not spec.get("rayClusterSpec"):
            yield "neither rayClusterSpec nor clusterSelector"
        return
    if not selector.get("ray.io/cluster"):
        yield "clusterSelector names no ray.io/cluster"
    if spec.get("submissionMode") == "SidecarMode" or spec.get("backoffLimit", 0) > 0:
        yield "clusterSelector goes neither with SidecarMode nor with backoffLimit"


def _submission(spec: Object, gates: frozenset[str]) -> Problems:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit does not go with InteractiveMode"
    if mode == "SidecarMode" and (spec.get("submitterPodTemplate") or spec.get("submitterConfig")):
        yield "SidecarMode takes neither submitterPodTemplate nor submitterConfig"


def _limits(spec: Object, gates: frozenset[str]) -> Problems:
    for field, least in (
        ("backoffLimit", 0),
        ("activeDeadlineSeconds", 1),
        ("preRunningDeadlineSeconds", 1),
    ):
        if spec.get(field, least) < least:
            yield f"{field} below {least}"
    if ((spec.get("rayClusterSpec") or {}).get("authOptions") or {}).get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth does not go with a RayJob"
    try:
        yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    except yaml.YAMLError:
        yield "runtimeEnvYAML is no YAML"


# --- what nobody checks ---


def _groups_apart(spec: Object, gates: frozenset[str]) -> Problems:
    names = [name for name, _ in _groups(spec)]
    for name in {name for name in names if names.count(name) > 1}:
        yield f"{name}: two groups of one name, of which the autoscaler sees one"
    for name, group in _groups(spec)[1:]:
        if not DNS_LABEL.fullmatch(name) or len(name) > 40:
            yield f"{name}: no DNS label of 40 characters, and names of pods are cut"
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 0)
        if not least <= group.get("replicas", 0) <= most:
            yield f"{name}: replicas outside minReplicas and maxReplicas"


Rule = Callable[[Object, frozenset[str]], Problems]
CLUSTER_RULES: tuple[Rule, ...] = (
    _containers,
    _resources_twice,
    _labels,
    _replicas,
    _idle_timeouts,
    _priorities,
    _suspended_groups,
    _autoscaler,
    _authentication,
    _gated,
    _tls,
    _groups_apart,
)
JOB_RULES: tuple[Rule, ...] = (_deletion, _suspension, _selection, _submission, _limits)
