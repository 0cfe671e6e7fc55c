"""What judges manifests elsewhere: the operator's schema, Kubernetes' own, a security linter.

The schemas of other people's kinds (`manifests.OTHERS`: Prometheus operator, Kueue) are not here;
their objects are left out, and only a cluster that has them can tell.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import JOBS, K8S, OTHERS, SCENARIOS, SHARED, Object, build, operator_pods

KUBERNETES = ("1.32.0", "1.33.0", "1.34.0", "1.35.0", "1.36.0", "1.37.0")

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the schemas in ../shared/k8s, which are not shipped"
)


def every_object() -> list[Object]:
    """What scenarios are made of, each different object once, its scenario before its name."""
    found = {}
    for scenario in (*SCENARIOS, *JOBS):
        for each in build(scenario):
            seen = json.dumps(each)
            each["metadata"]["name"] = f"{scenario}.{each['metadata']['name']}"
            found.setdefault(seen, each)
    return [each for each in found.values() if each["kind"] not in OTHERS]


def written(path: Path, objects: list[Object]) -> Path:
    path.write_text(yaml.safe_dump_all(objects))
    return path


def run(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def change(*path: str | int, to: Any) -> Callable[[Object], None]:
    """Sets what is at `path`; None removes it."""

    def apply(found: Any) -> None:
        for step in path[:-1]:
            found = found[step]
        if to is None:
            del found[path[-1]]
        else:
            found[path[-1]] = to

    return apply


HEAD = ("spec", "headGroupSpec")
AGAINST_THE_SCHEMA = {
    "group-misspelt": change("spec", "workerGroupSpec", to=[]),
    "numbers-as-parameters": change(*HEAD, "rayStartParams", "num-cpus", to=0),
    "no-head": change("spec", "headGroupSpec", to=None),
    "no-template": change(*HEAD, "template", to=None),
    "unknown-mode": change("spec", "authOptions", "mode", to="tokens"),
    "unknown-autoscaler": change("spec", "autoscalerOptions", "version", to="v3"),
    "text-as-number": change("spec", "workerGroupSpecs", 0, "maxReplicas", to="4"),
    "field-of-a-pod": change(*HEAD, "template", "spec", "readOnlyRootFilesystem", to=True),
    "no-group-name": change("spec", "workerGroupSpecs", 0, "groupName", to=None),
}


@needs_shared
def test_ray_objects_follow_the_schema_of_kuberay_and_mistakes_do_not(tmp_path: Path) -> None:
    right = [each for each in every_object() if each["kind"].startswith("Ray")]
    wrong = []
    for name, apply in AGAINST_THE_SCHEMA.items():
        (cluster,) = [each for each in build("base") if each["kind"] == "RayCluster"]
        apply(cluster)
        cluster["metadata"]["name"] = name
        wrong.append(cluster)

    everything = written(tmp_path / "all.yaml", [*right, *wrong])
    done = run(sys.executable, SHARED / "crdcheck.py", everything)

    said = done.stdout.splitlines()
    named = {name.strip() for file, name in pairwise(said) if file == str(tmp_path / "all.yaml")}
    assert named == set(AGAINST_THE_SCHEMA), done.stdout + done.stderr
    assert said[-1] == f"{len(right) + len(wrong)} ray docs, {len(wrong)} bad"


def pods_of_the_operator() -> list[Object]:
    """Pods with the containers that the operator adds, as plain pods."""
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": made.name}, "spec": made.spec}
        for each in every_object()
        if each["kind"].startswith("Ray")
        for made in operator_pods(each)
    ]


@needs_shared
def test_kubernetes_takes_every_object_and_every_pod(tmp_path: Path) -> None:
    validate = shutil.which("kubernetes-validate")
    if validate is None:
        pytest.skip("needs kubernetes-validate")
    objects = written(tmp_path / "objects.yaml", every_object())
    templates = run(sys.executable, SHARED / "pods.py", objects)
    assert templates.returncode == 0, templates.stderr
    expanded = tmp_path / "pods.yaml"
    expanded.write_text(templates.stdout + "---\n" + yaml.safe_dump_all(pods_of_the_operator()))
    wrong = build("base")[0] | {"spec": {"finalizer": []}}

    for version in KUBERNETES:
        judge = (validate, "--strict", "--no-warn", "-k", version)
        done = run(*judge, expanded)
        assert done.returncode == 0, [s for s in done.stdout.splitlines() if "passed" not in s]
        assert done.stdout.count("passed for resource pod/") > 60
        assert run(*judge, written(tmp_path / "wrong.yaml", [wrong])).returncode != 0


@needs_shared
def test_a_security_linter_has_nothing_to_say_but_what_is_excepted(tmp_path: Path) -> None:
    checkov = shutil.which("checkov")
    if checkov is None:
        pytest.skip("needs checkov")
    bare: Object = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bare"}}
    bare["spec"] = {"containers": [{"name": "bare", "image": "bare:latest"}]}
    objects = written(tmp_path / "objects.yaml", [*every_object(), bare])
    pods = tmp_path / "pods.yaml"
    pods.write_text(run(sys.executable, SHARED / "pods.py", objects).stdout)

    done = run(checkov, "--config-file", K8S / "checkov.yaml", "-o", "json", "-f", pods)

    told = json.loads(done.stdout)
    failed = {(each["resource"], each["check_id"]) for each in told["results"]["failed_checks"]}
    assert {check for check in failed if not check[0].endswith(".bare")} == set()
    assert len(failed) > 10  # of the pod that is there to be found out
    assert told["summary"]["passed"] > 1000
