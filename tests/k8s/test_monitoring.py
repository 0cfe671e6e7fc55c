"""Alerts and panels ask for metrics that Ray has, and the monitor for ports that pods have."""

import json
import re
from pathlib import Path

import pytest
import ray
from manifests import Object, build, cluster_spec, of_kind

RAY = Path(ray.__file__).parent
PREFIXES = {  # whose a metric is -> where the installed Ray names it
    "ray_": ("dashboard/modules/reporter/reporter_agent.py", "dashboard/modules/metrics"),
    "autoscaler_": ("autoscaler/_private/prom_metrics.py",),
}
OTHERS = {  # metrics of others, by their documentation
    "up",
    "kube_pod_container_status_terminated_reason",
    "kube_pod_status_phase",
    "kube_resourcequota",
    "kuberay_job_deployment_status",
}


def rules() -> list[Object]:
    (found,) = of_kind(build("everything"), "PrometheusRule")
    return [rule for group in found["spec"]["groups"] for rule in group["rules"]]


def dashboard() -> Object:
    (found,) = of_kind(build("everything"), "ConfigMap")
    loaded: Object = json.loads(found["data"]["tlrunner.json"])
    return loaded


def expressions() -> list[str]:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return [*(rule["expr"] for rule in rules()), *panels]


def metrics(expression: str) -> set[str]:
    """Names before a brace: what is asked for."""
    return set(re.findall(r"([a-z_]+)\{", expression))


def sources(prefix: str) -> str:
    files = [RAY / place for place in PREFIXES[prefix]]
    found = [path for file in files for path in (file.rglob("*.py") if file.is_dir() else [file])]
    return "\n".join(path.read_text() for path in found)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_each_metric_is_one_that_ray_has(prefix: str) -> None:
    asked = {name for each in expressions() for name in metrics(each) if name.startswith(prefix)}
    text = sources(prefix)
    assert len(asked) >= 2
    for name in asked:
        assert f'"{name.removeprefix(prefix)}"' in text or f"{name}{{" in text, name
    assert '"node_mem_user"' not in text


def test_the_other_metrics_are_known_ones() -> None:
    asked = {name for each in expressions() for name in metrics(each)}
    assert {name for name in asked if not name.startswith(tuple(PREFIXES))} == OTHERS


def test_each_alert_says_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) >= 6
    for rule in rules():
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert 'namespace="tlrunner"' in rule["expr"]


def test_panels_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    places = {
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in panels
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    }
    assert len(places) == sum(each["gridPos"]["w"] * each["gridPos"]["h"] for each in panels)
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_monitor_asks_ports_that_the_head_names_and_policies_let_through() -> None:
    objects = build("everything")
    (monitor,), (cluster,) = of_kind(objects, "PodMonitor"), of_kind(objects, "RayCluster")
    asked = {each["port"] for each in monitor["spec"]["podMetricsEndpoints"]}
    head = cluster_spec(cluster)["headGroupSpec"]["template"]["spec"]["containers"][0]
    named = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert asked <= set(named)
    (policy,) = [e for e in of_kind(objects, "NetworkPolicy") if e["metadata"]["name"] == "metrics"]
    let_through = {port["port"] for port in policy["spec"]["ingress"][0]["ports"]}
    assert let_through == {named[port] for port in asked}
