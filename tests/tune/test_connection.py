"""The connection to Ray, with no Ray to be found."""

import os
from typing import NoReturn

import pytest
import ray

from tlrunner.errors import ResourceError
from tlrunner.tune.cluster import START_SETTINGS, connected_to_ray


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment as `ray.init` finds it, which finds no cluster."""
    environment: dict[str, str] = {}

    def init(**settings: object) -> NoReturn:
        environment.update(os.environ)
        raise ConnectionError("nobody answers\nand more")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    return environment


def test_a_cluster_out_of_reach_is_named_with_what_to_check(seen: dict[str, str]) -> None:
    with pytest.raises(ResourceError) as told, connected_to_ray("info"):
        pass
    assert str(told.value) == (
        "no connection to the Ray cluster at 192.0.2.1:6379: nobody answers; "
        "check RAY_ADDRESS, the token (RAY_AUTH_MODE, ~/.ray/auth_token) and the versions"
    )


@pytest.mark.parametrize("own", [None, "90"])
def test_how_long_ray_waits_for_a_process_is_set_unless_the_user_did(
    seen: dict[str, str], monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    ((name, value),) = START_SETTINGS.items()
    monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(name, own)
    with pytest.raises(ResourceError), connected_to_ray("info"):
        pass
    assert seen[name] == (own or value)
