"""Who reaches whom, by the policies alone. Whether a cluster enforces them, only it can show."""

import pytest
from manifests import build, of_kind
from reach import Place, reaches

RAY = {"ray.io/is-ray-node": "yes", "ray.io/cluster": "tlrunner"}
HEAD = Place(RAY | {"ray.io/node-type": "head"})
WORKER = Place(RAY | {"ray.io/node-type": "worker"})
SUBMITTER = Place({"tlrunner.io/submitter": "true"})
STRANGER = Place({"app": "web"})
ELSEWHERE = Place({"app": "web"}, "default")
OPERATOR = Place({"app.kubernetes.io/component": "kuberay-operator"}, "ray-system")
PROMETHEUS = Place({"app.kubernetes.io/name": "prometheus"}, "monitoring")
DNS = Place({"k8s-app": "kube-dns"}, "kube-system")
S3 = Place(address="52.216.1.1")
API_SERVER = Place(address="10.0.3.7")
METADATA = Place(address="169.254.169.254")
S3_SERVER = Place({"app.kubernetes.io/name": "s3"})
REDIS = Place({"app.kubernetes.io/name": "redis"})
CLEANUP = Place(RAY | {"ray.io/node-type": "redis-cleanup"})

ALLOWED = {
    "workers join": (WORKER, HEAD, 6379),
    "nodes talk on any port": (HEAD, WORKER, 31234),
    "workers talk to each other": (WORKER, WORKER, 10002),
    "a submitter submits": (SUBMITTER, HEAD, 8265),
    "the operator asks for jobs": (OPERATOR, HEAD, 8265),
    "a worker reads S3": (WORKER, S3, 443),
    "a driver writes S3": (HEAD, S3, 443),
    "the autoscaler asks for pods": (HEAD, API_SERVER, 443),
    "names": (WORKER, DNS, 53),
    "a submitter looks up the head": (SUBMITTER, DNS, 53),
    "metrics of nodes": (PROMETHEUS, WORKER, 8080),
    "metrics of the autoscaler": (PROMETHEUS, HEAD, 44217),
}
DENIED = {
    "the dashboard to a pod beside it": (STRANGER, HEAD, 8265),
    "the dashboard to another namespace": (ELSEWHERE, HEAD, 8265),
    "the dashboard to a label from elsewhere": (Place(SUBMITTER.labels, "default"), HEAD, 8265),
    "the dashboard to others beside the operator": (Place({}, "ray-system"), HEAD, 8265),
    "the dashboard to Prometheus": (PROMETHEUS, HEAD, 8265),
    "the control port to a submitter": (SUBMITTER, HEAD, 6379),
    "Ray Client to a submitter": (SUBMITTER, HEAD, 10001),
    "a worker to a submitter": (SUBMITTER, WORKER, 8265),
    "metrics to anyone": (ELSEWHERE, WORKER, 8080),
    "the control port to the operator": (OPERATOR, HEAD, 6379),
    "S3 to a submitter": (SUBMITTER, S3, 443),
    "the API server to a worker": (WORKER, API_SERVER, 443),
    "the API server to a submitter": (SUBMITTER, API_SERVER, 443),
    "the node's credentials to a worker": (WORKER, METADATA, 80),
    "the node's credentials to a head": (HEAD, METADATA, 443),
    "the internet without TLS": (WORKER, S3, 80),
    "other pods to a job": (WORKER, ELSEWHERE, 8080),
    "anything to a pod without a policy of its own": (STRANGER, S3, 443),
    "names to a port that is none": (WORKER, DNS, 443),
}


@pytest.mark.parametrize("scenario", ["base", "prod-eks", "dev-kind", "everything"])
def test_what_is_needed_gets_through_and_nothing_else(scenario: str) -> None:
    policies = of_kind(build(scenario), "NetworkPolicy")
    assert [name for name, way in ALLOWED.items() if not reaches(policies, *way)] == []
    assert [name for name, way in DENIED.items() if reaches(policies, *way)] == []


def test_without_the_wall_strangers_get_in() -> None:
    policies = of_kind(build("base"), "NetworkPolicy")
    open_ones = [each for each in policies if each["metadata"]["name"] != "deny-all"]
    assert reaches(open_ones, ELSEWHERE, STRANGER, 80)
    assert not reaches(policies, ELSEWHERE, STRANGER, 80)
    assert reaches([], ELSEWHERE, HEAD, 8265)


def test_the_s3_server_of_dev_kind_serves_ray_alone() -> None:
    policies = of_kind(build("dev-kind"), "NetworkPolicy")
    assert reaches(policies, WORKER, S3_SERVER, 9000)
    assert reaches(policies, HEAD, S3_SERVER, 9000)
    assert not reaches(policies, SUBMITTER, S3_SERVER, 9000)
    assert not reaches(policies, ELSEWHERE, S3_SERVER, 9000)
    assert not reaches(policies, S3_SERVER, HEAD, 6379)


def test_redis_serves_heads_and_what_cleans_up_after_them() -> None:
    policies = of_kind(build("everything"), "NetworkPolicy")
    assert reaches(policies, HEAD, REDIS, 6379)
    assert reaches(policies, CLEANUP, REDIS, 6379)
    assert not reaches(policies, WORKER, REDIS, 6379)
    assert not reaches(policies, SUBMITTER, REDIS, 6379)


def test_prod_reaches_the_api_server_in_its_subnets_alone() -> None:
    policies = of_kind(build("prod-eks"), "NetworkPolicy")
    assert not reaches(policies, HEAD, Place(address="192.168.1.1"), 443)
    assert not reaches(policies, HEAD, API_SERVER, 6443)
    assert reaches(policies, HEAD, Place(address="172.20.0.1"), 443)


def test_one_machine_reaches_the_api_server_where_its_kind_has_it() -> None:
    policies = of_kind(build("single-node-gpu"), "NetworkPolicy")
    for port in (443, 6443, 8443, 16443):
        assert reaches(policies, HEAD, Place(address="192.168.49.2"), port)
