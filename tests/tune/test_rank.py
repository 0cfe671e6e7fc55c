"""Which backbones stay after a ranking, and what of the search with them."""

from typing import Any

import pytest

from tlrunner.configfile import validate
from tlrunner.errors import ConfigError
from tlrunner.jobconfig import JobConfig
from tlrunner.tune.plan import check_search
from tlrunner.tune.rank import restricted, searched_backbones
from tlrunner.tune.space import planned_trials

Tree = dict[str, Any]
NAMES = ["squeezenet1_1", "squeezenet1_0", "mobilenet_v2"]


def job_of(tree: Tree, space: Tree, rank: Tree | None = None, **search: Any) -> JobConfig:
    search = {"space": space, "rank": rank, **search}
    return validate(JobConfig, {**tree, "search": search})


def backbones_of(job: JobConfig) -> set[str]:
    return {trial.config.backbone.name for trial in planned_trials(job)}


def test_the_others_are_tried_in_no_trial(tiny_tree: Tree) -> None:
    job = job_of(tiny_tree, {"backbone.name": {"choice": NAMES}}, {"keep": 1})
    assert backbones_of(job) == set(NAMES)
    left = restricted(job, NAMES[1:2])
    assert backbones_of(left) == {NAMES[1]}
    assert left.search.rank is None
    check_search(left)


def test_what_is_searched_for_others_alone_goes_with_them(tiny_tree: Tree) -> None:
    space = {
        "backbone.name": {"choice": NAMES},
        "optim.lr": [
            {"uniform": [0.1, 0.2], "when": {"backbone.name": NAMES[:2]}},
            {"uniform": [0.3, 0.4], "when": {"backbone.name": NAMES[2]}},
        ],
        "optim.weight_decay": {"choice": [0.0, 0.1], "when": {"backbone.name": NAMES[0]}},
    }
    left = restricted(job_of(tiny_tree, space, {"keep": 1}), [NAMES[1]])
    assert [entry.values for entry in left.search.space["optim.lr"]] == [(0.1, 0.2)]
    assert "optim.weight_decay" not in left.search.space
    check_search(left)
    left = restricted(job_of(tiny_tree, space, {"keep": 2}), [NAMES[0], NAMES[2]])
    assert [entry.when for entry in left.search.space["optim.lr"]] == [
        {"backbone.name": [NAMES[0]]},
        {"backbone.name": [NAMES[2]]},
    ]
    check_search(left)


def test_what_cannot_be_without_the_others_goes_too(tiny_tree: Tree) -> None:
    space = {
        "backbone.name": {"choice": NAMES[:2]},
        "freeze.strategy": [
            {"choice": ["head"], "when": {"backbone.name": NAMES[0]}},
            {"choice": ["full"], "when": {"backbone.name": NAMES[1]}},
        ],
        "optim.lr": {"uniform": [0.1, 0.2], "when": {"freeze.strategy": "head"}},
        "optim.weight_decay": {"choice": [0.0, 0.1], "when": {"freeze.strategy": ["head", "full"]}},
    }
    job = job_of(tiny_tree, space, {"keep": 1})
    check_search(job)
    full = restricted(job, [NAMES[1]])
    assert full.search.space.keys() == space.keys() - {"optim.lr"}
    assert full.search.space["optim.weight_decay"][0].when == {"freeze.strategy": ["full"]}
    check_search(full)
    assert restricted(job, [NAMES[0]]).search.space.keys() == space.keys()


def test_points_without_a_name_have_that_of_the_job(tiny_tree: Tree) -> None:
    points = [{"optim.lr": 0.1}, {"backbone.name": NAMES[1]}, {"backbone.name": NAMES[2]}]
    job = job_of(tiny_tree, {}, {"keep": 2}, algorithm="grid", points=points)
    assert searched_backbones(job) == NAMES
    left = restricted(job, [NAMES[0], NAMES[2]])
    assert left.search.points == (points[0], points[2])


@pytest.mark.parametrize(
    ("space", "rank", "message"),
    [
        ({}, {}, r"search\.rank\.keep is 3, and .* are squeezenet1_1; valid: several values"),
        ({"backbone.name": {"choice": NAMES}}, {"keep": 3}, r"keep is 3, and .*; valid: 1\.\.2"),
        (
            {
                "freeze.strategy": {"choice": ["head", "full"]},
                "backbone.name": [
                    {"choice": NAMES[:2], "when": {"freeze.strategy": "head"}},
                    {"choice": NAMES},
                ],
            },
            {"keep": 1},
            r"search\.space has backbone\.name with `when`",
        ),
    ],
)
def test_a_ranking_that_leaves_nothing_out_or_is_unclear_is_refused(
    tiny_tree: Tree, space: Tree, rank: Tree, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_search(job_of(tiny_tree, space, rank))
