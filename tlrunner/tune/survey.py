"""Questions to every node of the connected cluster, and to its dashboard."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, build_opener

import ray
from ray.exceptions import RayError

from tlrunner.tune.cluster import on_each_node

T = TypeVar("T")

ANSWER_SECONDS = 60.0  # of a node that has to start a worker first


@dataclass(frozen=True)
class Answer(Generic[T]):
    """Of a node, by name. `fault`: why there is no `value`."""

    node: str
    value: T | None
    fault: str = ""


def ask_nodes(question: Callable[[], T]) -> list[Answer[T]]:
    """Run a function on each node there is now."""
    return [_answer(name, reference) for name, reference in on_each_node(question)]


def _answer(node: str, reference: "ray.ObjectRef[T]") -> Answer[T]:
    try:
        return Answer(node, ray.get(reference, timeout=ANSWER_SECONDS))
    except RayError as err:
        return Answer(node, None, (str(err).strip().splitlines() or [type(err).__name__])[-1][:200])


def dashboard_without_token() -> tuple[str, int | None]:
    """The dashboard's address, and its HTTP status for one who lists jobs without a token.

    None where nothing answers there.
    """
    address = ray.get_runtime_context().worker.node.webui_url
    if not address:
        return "no dashboard", None
    opener = build_opener(ProxyHandler({}))  # nodes are not behind the proxy of the internet
    try:
        with opener.open(f"http://{address}/api/jobs/", timeout=10) as answer:
            return address, int(answer.status)
    except HTTPError as err:
        return address, err.code
    except (URLError, OSError):
        return address, None
