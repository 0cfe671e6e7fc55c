"""What must agree within the manifests, and between them and what is installed.

Each rule takes the objects of a scenario and gives a line for each thing that does not agree. Sizes
are compared as Kubernetes counts them: an init container counts where it is larger than the
containers together, and a volume in memory counts as its container's memory.
"""

import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from manifests import Object, all_pods, cluster_spec, containers, of_kind, operator_pods

from tlrunner.signals import GRACE_SECONDS

Problems = Iterator[str]
WRITTEN = {"/tmp", "/home/tlrunner", "/dev/shm"}
UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{letter}i": 1024**power for power, letter in enumerate("KMGT", start=1)
}
COUNTED = ("cpu", "memory", "nvidia.com/gpu")
OUR_IDS = ("runAsUser", "runAsGroup", "fsGroup")
RUN_BY_RAY = ("head", "worker", "submitter")


def quantity(text: Any) -> float:
    """A number of Kubernetes: 500m, 2Gi, 1.5."""
    found = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    assert found is not None, text
    return float(found[1]) * UNITS[found[2]]


def need(pod: Object, resource: str) -> float:
    """What the scheduler and a quota count for a pod."""

    def requested(container: Object) -> float:
        return quantity(container["resources"].get("requests", {}).get(resource, 0))

    together = sum(requested(each) for each in pod["containers"])
    return max([together, *(requested(each) for each in pod.get("initContainers", []))])


def versions(objects: list[Object], ray: str, tlrunner: str) -> Problems:
    """Image and cluster are of the Ray and the tlrunner that are tested."""
    for found in objects:
        spec = cluster_spec(found) if found["kind"] in ("RayCluster", "RayJob") else {}
        if spec and spec.get("rayVersion") != ray:
            yield f"rayVersion {spec.get('rayVersion')}, but Ray {ray} is installed"
    for made in all_pods(objects):
        for container in containers(made.spec):
            image = container["image"]
            wanted = f":{tlrunner}-ray{ray}-"
            if made.role in RUN_BY_RAY and f"tlrunner{wanted}" not in image:
                yield f"{made.name}: {image} is not of tlrunner{wanted}"


def quota(objects: list[Object], job: list[Object]) -> Problems:
    """The namespace may take the whole cluster, and a RayJob's head and submitter beside it."""
    hard = of_kind(objects, "ResourceQuota")[0]["spec"]["hard"]
    beside = [made for found in job for made in operator_pods(found) if made.role != "worker"]
    pods = [*all_pods(objects), *beside]
    for resource in COUNTED:
        wanted = sum(made.most * need(made.spec, resource) for made in pods)
        for way in ("requests", "limits"):
            allowed = hard.get(f"{way}.{resource}")
            if allowed is not None and quantity(allowed) < wanted:
                yield f"quota: {way}.{resource} {allowed} below {wanted:g}"
    if f"requests.{COUNTED[2]}" not in hard:
        yield "quota: GPUs are not limited"
    count = sum(made.most for made in pods)
    if quantity(hard["pods"]) < count:
        yield f"quota: pods {hard['pods']} below {count}"
    claims = sum(
        len(each["spec"]["volumeClaimTemplates"]) for each in of_kind(objects, "StatefulSet")
    )
    if quantity(hard["persistentvolumeclaims"]) < claims:
        yield f"quota: persistentvolumeclaims below {claims}"


def sizes(objects: list[Object]) -> Problems:
    """Requests are limits; volumes are limited, and fit into memory and disk of their pod."""
    for made in all_pods(objects):
        for container in containers(made.spec):
            given = container["resources"]
            if given.get("requests") != given.get("limits") or not given.get("limits"):
                yield f"{made.name}/{container['name']}: requests are not limits"
        empty = [each["emptyDir"] for each in made.spec.get("volumes", []) if "emptyDir" in each]
        if any("sizeLimit" not in each for each in empty):
            yield f"{made.name}: a volume without sizeLimit"
            continue
        in_memory = sum(quantity(e["sizeLimit"]) for e in empty if e.get("medium") == "Memory")
        on_disk = sum(quantity(e["sizeLimit"]) for e in empty if e.get("medium") != "Memory")
        limits = made.spec["containers"][0]["resources"].get("limits", {})
        if in_memory > 0.5 * quantity(limits.get("memory", 0)):
            yield f"{made.name}: volumes in memory take more than half of its memory"
        if on_disk > need(made.spec, "ephemeral-storage"):
            yield f"{made.name}: volumes are larger than its ephemeral-storage"


def object_store(objects: list[Object]) -> Problems:
    """Ray's object store fits into /dev/shm, or Ray puts it on disk and is slow."""
    for found in objects:
        if found["kind"] not in ("RayCluster", "RayJob"):
            continue
        spec = cluster_spec(found)
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            volumes = group["template"]["spec"]["volumes"]
            shm = [each["emptyDir"] for each in volumes if each["name"] == "shared-mem"]
            store = quantity(group["rayStartParams"]["object-store-memory"])
            if not shm or shm[0].get("medium") != "Memory" or store > quantity(shm[0]["sizeLimit"]):
                yield f"{group.get('groupName', 'head')}: object store above /dev/shm"


def writable(objects: list[Object]) -> Problems:
    """With a root that cannot be written, what is written is a volume, in every container."""
    for made in all_pods(objects):
        names = {each["name"] for each in made.spec.get("volumes", [])}
        for container in containers(made.spec):
            mounts = container.get("volumeMounts", [])
            for missing in {each["name"] for each in mounts} - names:
                yield f"{made.name}/{container['name']}: no volume {missing}"
            paths = {each["mountPath"] for each in mounts if not each.get("readOnly")}
            reads_only = container["name"] == "wait-for-tls-ip-san"
            if made.role in RUN_BY_RAY and not reads_only and not paths >= WRITTEN:
                yield f"{made.name}/{container['name']}: not writable: {sorted(WRITTEN - paths)}"


def locked(objects: list[Object]) -> Problems:
    """What Pod Security calls restricted, a read-only root, a user that is nobody else's."""
    for made in all_pods(objects):
        pod, user = made.spec, made.spec.get("securityContext", {})
        if user.get("runAsNonRoot") is not True or user.get("runAsUser", 0) < 10000:
            yield f"{made.name}: runs as a user below 10000"
        if user.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{made.name}: no seccomp profile"
        if made.role in RUN_BY_RAY and {user.get(key) for key in OUR_IDS} != {10001}:
            yield f"{made.name}: another user than the image's"
        if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC", "hostUsers")):
            yield f"{made.name}: shares something with its node"
        if any("hostPath" in volume for volume in pod.get("volumes", [])):
            yield f"{made.name}: mounts a path of its node"
        for container in containers(pod):
            wanted = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            if container.get("securityContext") != wanted:
                yield f"{made.name}/{container['name']}: security context is not {wanted}"
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{made.name}/{container['name']}: a port of its node"


def enforced(objects: list[Object]) -> Problems:
    """The API server holds every pod of the namespace to that, and the network to its policies."""
    for namespace in of_kind(objects, "Namespace"):
        if (
            namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce")
            != "restricted"
        ):
            yield f"namespace {namespace['metadata']['name']}: Pod Security is not enforced"
    denied = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    if all(each["spec"] != denied for each in of_kind(objects, "NetworkPolicy")):
        yield "no network policy denies everything"


def exposed(objects: list[Object]) -> Problems:
    """Nothing is offered outside the cluster."""
    for found in objects:
        spec = found.get("spec", {})
        if found["kind"] in ("Ingress", "Gateway", "HTTPRoute"):
            yield f"{found['kind']}: offered outside"
        if found["kind"] == "Service" and spec.get("type", "ClusterIP") != "ClusterIP":
            yield f"service {found['metadata']['name']}: {spec['type']}"
        if found["kind"] in ("RayCluster", "RayJob"):
            head = cluster_spec(found)["headGroupSpec"]
            service = head.get("headService", {}).get("spec", {}).get("type", "ClusterIP")
            if {head.get("serviceType", "ClusterIP"), service} != {"ClusterIP"}:
                yield "the head's service is offered outside"
            if head.get("enableIngress"):
                yield "the head has an ingress"


def secret(objects: list[Object]) -> Problems:
    """No secret stands in a manifest; no job's code gets a token for the API server."""
    for found in objects:
        if found["kind"] == "Secret":
            yield f"secret {found['metadata']['name']} is in git"
        if found["kind"] == "ServiceAccount" and found.get("automountServiceAccountToken", True):
            yield f"service account {found['metadata']['name']} mounts its token"
    for made in all_pods(objects):
        if made.spec.get("automountServiceAccountToken", True):
            yield f"{made.name}: mounts a service account's token"
        projected = {v["name"] for v in made.spec.get("volumes", []) if "projected" in v}
        for container in containers(made.spec):
            mounted = {each["name"] for each in container.get("volumeMounts", [])}
            if mounted & projected and container["name"] != "autoscaler":
                yield f"{made.name}/{container['name']}: has the autoscaler's token"
            for each in container.get("env", []):
                is_secret = re.search("KEY|SECRET|PASSWORD|TOKEN", each["name"])
                if is_secret and "$(" not in each.get("value", "$("):
                    yield f"{made.name}/{container['name']}: {each['name']} in clear"


def images(objects: list[Object]) -> Problems:
    """An image is named by a version."""
    for made in all_pods(objects):
        for container in containers(made.spec):
            name, _, tag = container["image"].rpartition(":")
            if not name or "/" in tag or tag == "latest":
                yield f"{made.name}/{container['name']}: {container['image']} names no version"


def referred(objects: list[Object], cluster: list[Object]) -> Problems:
    """Accounts and priority classes exist, here or in the overlay that a job runs in."""
    there = {(each["kind"], each["metadata"]["name"]) for each in [*objects, *cluster]}
    for made in all_pods(objects):
        account = made.spec.get("serviceAccountName", "default")
        priority = made.spec.get("priorityClassName")
        if ("ServiceAccount", account) not in there:
            yield f"{made.name}: no service account {account}"
        if priority and ("PriorityClass", priority) not in there:
            yield f"{made.name}: no priority class {priority}"


def grace(objects: list[Object]) -> Problems:
    """A job has the time that it needs to leave its checkpoints."""
    for made in all_pods(objects):
        if made.role not in ("head", "worker"):
            continue
        seconds = made.spec.get("terminationGracePeriodSeconds", 30)
        ray = made.spec["containers"][0]
        env = {each["name"]: each.get("value") for each in ray.get("env", [])}
        stop = int(env.get("RAY_JOB_STOP_WAIT_TIME_S") or 3)
        drain = int(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
        if stop <= GRACE_SECONDS:
            yield f"{made.name}: {GRACE_SECONDS} s to halt, but {stop} to stop a job"
        if seconds < max(60, drain + 20):
            yield f"{made.name}: {seconds} s to end, of which {drain} to drain"
        if "preStop" in ray.get("lifecycle", {}):
            yield f"{made.name}: a preStop hook ends Ray before its jobs know"


def idle_head(objects: list[Object]) -> Problems:
    """No trial runs on the head."""
    for found in objects:
        if found["kind"] in ("RayCluster", "RayJob"):
            group = cluster_spec(found)["headGroupSpec"]
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            if group["rayStartParams"].get("num-cpus") != "0" or "nvidia.com/gpu" in limits:
                yield "the head takes work"


def job(objects: list[Object]) -> Problems:
    """A further try continues the run; the submitter reaches the dashboard; the cache fits."""
    for found in of_kind(objects, "RayJob"):
        name, spec = found["metadata"]["name"], found["spec"]
        if f"--name {name} " not in spec["entrypoint"]:
            yield f"{name}: the run has another name than the job"
        labels = spec["submitterPodTemplate"]["metadata"]["labels"]
        if labels.get("tlrunner.io/submitter") != "true":
            yield f"{name}: its submitter cannot reach the dashboard"
        cache = re.search(r"data\.cache_bytes=(\d+)", spec["entrypoint"])
        cluster = spec["rayClusterSpec"]
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            volumes = {v["name"]: v for v in group["template"]["spec"]["volumes"]}
            room = quantity(volumes["home"]["emptyDir"]["sizeLimit"])
            if cache is None or int(cache[1]) > 0.9 * room:
                yield f"{name}: data.cache_bytes does not leave room in /home/tlrunner"


RULES: tuple[Callable[[list[Object]], Problems], ...] = (
    sizes,
    object_store,
    writable,
    locked,
    exposed,
    secret,
    images,
    grace,
    idle_head,
    job,
)


def problems(objects: list[Object]) -> list[str]:
    """Every line of the rules that look at the objects alone."""
    return [line for rule in RULES for line in rule(objects)]


def everything(objects: list[Object], job: list[Object]) -> list[str]:
    """Whatever is wrong with a cluster beside which a job may run."""
    return [
        *problems(objects),
        *versions(objects, version("ray"), version("tlrunner")),
        *quota(objects, job),
        *enforced(objects),
        *referred(objects, []),
    ]
