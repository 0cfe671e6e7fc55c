"""Who reaches whom, by the network policies of one namespace: as a network plugin decides it.

A policy that selects a pod turns everything off in its direction but what some policy allows. A
connection between two pods must be allowed at both ends.
"""

from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple

Object = dict[str, Any]


class Place(NamedTuple):
    """A pod with its labels and its namespace, or an address outside the cluster."""

    labels: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple's default, never changed
    namespace: str = "tlrunner"
    address: str | None = None


def _matches(selector: Object, labels: dict[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions", []):
        assert each["operator"] == "In", each
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


def _is_peer(peer: Object, place: Place) -> bool:
    if block := peer.get("ipBlock"):
        if place.address is None:
            return False
        address = ip_address(place.address)
        inside = address in ip_network(block["cidr"])
        return inside and all(address not in ip_network(each) for each in block.get("except", []))
    if place.address is not None:
        return False
    if "namespaceSelector" in peer:
        if not _matches(
            peer["namespaceSelector"], {"kubernetes.io/metadata.name": place.namespace}
        ):
            return False
    elif place.namespace != "tlrunner":
        return False
    return _matches(peer.get("podSelector", {}), place.labels)


def _allowed(policies: list[Object], at: Place, other: Place, port: int, way: str) -> bool:
    """Whether `at` may send to (Egress) or hear from (Ingress) `other`."""
    if at.address is not None or at.namespace != "tlrunner":
        return True  # other people's policies
    specs = [each["spec"] for each in policies]
    mine = [s for s in specs if way in s["policyTypes"] and _matches(s["podSelector"], at.labels)]
    for spec in mine:
        for rule in spec.get(way.lower(), []):
            ports = rule.get("ports")
            peers = rule.get("to" if way == "Egress" else "from")
            is_port = ports is None or any(each["port"] == port for each in ports)
            if is_port and (peers is None or any(_is_peer(each, other) for each in peers)):
                return True
    return not mine


def reaches(policies: list[Object], source: Place, target: Place, port: int) -> bool:
    """Whether a connection from `source` to a port of `target` is let through."""
    return _allowed(policies, source, target, port, "Egress") and _allowed(
        policies, target, source, port, "Ingress"
    )
