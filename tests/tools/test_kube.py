"""RayClusters as kubectl tells of them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.tools.fake_kubectl import cluster, install
from tlrunner.errors import ConfigError, ResourceError
from tlrunner.tools.kube import Kubectl, find_cluster

KUBECTL = Kubectl("prod", "ml")
TOKEN = {"data": {"auth_token": "aHVzaA=="}}


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def _answer(*clusters: object, **others: object) -> Path:
        answers = {"rayclusters.ray.io": {"items": clusters}, "port": 0, **others}
        return install(tmp_path / "bin", answers)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return _answer


def test_the_only_cluster_is_found_with_its_token(answer) -> None:
    of_a_job = cluster("job-x7f2", metadata={"name": "j", "ownerReferences": [{"kind": "RayJob"}]})
    calls = answer(cluster("tlrunner"), of_a_job, secret=TOKEN)
    found = find_cluster(KUBECTL, None)
    assert (found.name, found.service, found.secret) == (
        *("tlrunner", "tlrunner-head-svc"),
        "tlrunner",
    )
    assert found.token() == "hush"
    for call in map(json.loads, calls.read_text().splitlines()):
        assert call[:4] == ["--context", "prod", "--namespace", "ml"]


def test_what_the_cluster_says_of_itself_is_taken(answer) -> None:
    status = {"head": {"serviceName": "other-svc"}}
    auth = {"authOptions": {"mode": "token", "secretName": "mine"}}
    answer(cluster("a", spec=auth, status=status), cluster("b", spec={}))
    a, b = find_cluster(KUBECTL, "a"), find_cluster(KUBECTL, "b")
    assert (a.service, a.secret) == ("other-svc", "mine")
    assert (b.secret, b.token()) == (None, None)


def test_which_cluster_is_meant_must_be_clear(answer) -> None:
    answer(cluster("a"), cluster("b"))
    with pytest.raises(ConfigError, match=r"namespace ml: there are 2 RayClusters; valid: a, b"):
        find_cluster(KUBECTL, None)
    with pytest.raises(ConfigError, match=r"there is no RayCluster 'c'; valid: a, b; .*--cluster"):
        find_cluster(KUBECTL, "c")
    answer()
    with pytest.raises(ConfigError, match=r"there are 0 RayClusters; valid: kubectl apply"):
        find_cluster(KUBECTL, None)


def test_what_kubectl_refuses_is_said(answer, monkeypatch, tmp_path) -> None:
    answer(cluster("a"))
    with pytest.raises(ResourceError, match=r"kubectl secret a failed: Error from server \(Forb"):
        find_cluster(KUBECTL, None).token()
    answer(cluster("a"), secret={"data": {"auth_token": "no base64!"}})
    with pytest.raises(ResourceError, match="the Secret a has no token"):
        find_cluster(KUBECTL, None).token()
    way = find_cluster(KUBECTL, None).forwarded()
    with pytest.raises(ResourceError, match=r"port-forward failed: .*pod is not running"), way:
        pass
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"kubectl is not installed; .*--address"):
        find_cluster(KUBECTL, None)


def test_a_forwarded_port_is_closed_again(answer, monkeypatch) -> None:
    answer(cluster("a"), port=12345)
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    found = find_cluster(KUBECTL, "a")
    monkeypatch.setattr(subprocess, "Popen", Noted)
    with found.forwarded() as address:
        assert address == "http://127.0.0.1:12345"
        assert started[0].poll() is None
    assert started[0].returncode is not None
