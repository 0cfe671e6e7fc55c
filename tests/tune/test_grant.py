"""What a trial gets of a cluster, and what becomes of one that does not fit."""

import pytest

from tlrunner.config import ResourceConfig
from tlrunner.errors import ResourceError
from tlrunner.tune import cluster
from tlrunner.tune.cluster import granted_resources, places_now
from tlrunner.tune.plan import Machine, grant, num_places


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch):
    """`has([machines], all_to_come)`: the cluster as it is, and as it may become."""

    def be(machines: list[Machine], to_come: Machine | None = None) -> None:
        monkeypatch.setattr(cluster, "machines", lambda: machines)
        monkeypatch.setattr(cluster, "machines_to_come", lambda: to_come)

    return be


PAIR = ResourceConfig(workers_per_trial=2, cpus_per_worker=2, gpus_per_worker=0)


def test_a_trial_that_fits_once_the_cluster_has_grown_waits(has) -> None:
    has([Machine(2, 0)], Machine(8, 0))
    assert granted_resources(PAIR) == (PAIR, True)
    has([Machine(2, 0), Machine(2, 0)], Machine(8, 0))
    assert granted_resources(PAIR) == (PAIR, False)


@pytest.mark.parametrize("to_come", [None, Machine(3, 0)])
def test_a_trial_that_never_fits_is_refused_with_what_there_is(
    has, to_come: Machine | None
) -> None:
    has([Machine(2, 0)], to_come)
    with pytest.raises(ResourceError, match=r"workers_per_trial is 2.*valid: what there is, 1 x"):
        granted_resources(PAIR)


def test_what_is_open_is_a_gpu_where_all_workers_find_one() -> None:
    open_pair = ResourceConfig(workers_per_trial=2)
    one_each = [Machine(4, 1), Machine(4, 1)]
    assert grant(open_pair, one_each).gpus_per_worker == 1
    assert grant(open_pair, [Machine(4, 1), Machine(4, 0)]).gpus_per_worker == 0


@pytest.mark.parametrize(
    ("resources", "machines", "places"),
    [
        (PAIR, [Machine(2, 0), Machine(2, 0), Machine(3, 0)], 1),
        (PAIR, [Machine(8, 0)], 2),
        (ResourceConfig(gpus_per_worker=0.25), [Machine(16, 2)], 8),
        (ResourceConfig(gpus_per_worker=0.3), [Machine(16, 2)], 6),
        (ResourceConfig(gpus_per_worker=0.25), [Machine(5, 2)], 5),
        (ResourceConfig(gpus_per_worker=1), [Machine(16, 2), Machine(16, 0)], 2),
    ],
)
def test_as_many_trials_fit_as_their_workers_do(
    resources: ResourceConfig, machines: list[Machine], places: int
) -> None:
    assert num_places(resources, machines) == places


def test_places_follow_the_cluster_as_it_grows_and_shrinks(has) -> None:
    sizes = []
    for count in (1, 3, 2):
        has([Machine(2, 0)] * count)
        single = ResourceConfig(cpus_per_worker=2, gpus_per_worker=0)
        sizes.append((places_now(single), places_now(PAIR)))
    # of trials in several workers one more is under way, whose driver waits for room
    assert sizes == [(1, 1), (3, 2), (2, 2)]
