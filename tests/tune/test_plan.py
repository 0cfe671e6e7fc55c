import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tlrunner.config import TrialConfig
from tlrunner.configfile import validate, with_values
from tlrunner.data.sources import open_source
from tlrunner.errors import ConfigError, ResourceError
from tlrunner.jobconfig import JobConfig
from tlrunner.tune import plan
from tlrunner.tune.estimate import estimate_costs
from tlrunner.tune.plan import check_search, check_trial, show_plan
from tlrunner.tune.reuse_plan import plan_reuse

Tree = dict[str, dict[str, Any]]


@pytest.fixture(autouse=True)
def _on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def plan_of(tree: Tree, **sections: dict[str, Any]) -> str:
    """What `--dry-run` prints."""
    job = validate(JobConfig, {**tree, **sections})
    console = Console(file=io.StringIO(), width=160)
    show_plan(job, check_search(job), open_source(job.data.uri), console)
    return console.file.getvalue()


@pytest.mark.parametrize("strategy", ["last_stages", "first_stages"])
def test_stages_are_counted_against_the_backbone(tiny_trial: TrialConfig, strategy: str) -> None:
    def of(num_stages: int) -> TrialConfig:
        values = {"freeze.strategy": strategy, "freeze.num_stages": num_stages}
        return with_values(tiny_trial, values)

    check_trial(of(9))
    with pytest.raises(
        ConfigError, match=r"freeze\.num_stages is 10, squeezenet1_1 has 9 stages; valid: 1\.\.9"
    ):
        check_trial(of(10))


def test_one_impossible_point_of_a_space_stops_the_search(tiny_tree: Tree) -> None:
    space = {
        "freeze.strategy": {"choice": ["last_stages"]},
        "freeze.num_stages": {"choice": [1, 2, 10]},
    }
    job = validate(
        JobConfig, {**tiny_tree, "search": {"space": space, "budget": {"num_trials": 3}}}
    )
    with pytest.raises(ConfigError, match=r"freeze\.num_stages is 10"):
        check_search(job)


def test_an_unknown_backbone_of_a_space_names_the_nearest(tiny_tree: Tree) -> None:
    space = {"backbone.name": {"choice": ["squeezenet1_1", "sqeezenet1_0"]}}
    job = validate(JobConfig, {**tiny_tree, "search": {"space": space}})
    with pytest.raises(ConfigError, match=r"'sqeezenet1_0'.*did you mean squeezenet1_0"):
        check_search(job)


def test_half_precision_without_a_gpu_is_refused(tiny_trial: TrialConfig) -> None:
    with pytest.raises(ConfigError, match=r"mixed_precision is fp16"):
        check_trial(with_values(tiny_trial, {"train.mixed_precision": "fp16"}))


def test_an_image_size_that_the_backbone_cannot_take_is_found_before_anything_starts(
    tiny_trial: TrialConfig,
) -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size is 16, which squeezenet1_1 cannot"):
        check_trial(with_values(tiny_trial, {"data.image_size": 16}))


def test_a_plan_shows_config_trials_and_cost(tiny_tree: Tree) -> None:
    space = {"optim.lr": {"choice": [0.1, 0.01, 0.001]}}
    text = plan_of(tiny_tree, search={"space": space, "budget": {"num_trials": 3}})
    for fragment in (
        "name: squeezenet1_1",
        "images: 27 train, 9 val, 0 test",
        "1.00e-01",
        "1.00e-02",
        "1.00e-03",
        "for 3 trials",
        "memory of a trial up to",
        "image cache",
    ):
        assert fragment in text


def test_a_plan_of_tpe_counts_the_trials_that_will_run(tiny_tree: Tree) -> None:
    space = {"optim.lr": {"loguniform": [0.001, 0.1]}}
    text = plan_of(
        tiny_tree, search={"space": space, "algorithm": "tpe", "budget": {"num_trials": 200}}
    )
    assert "for 200 trials" in text


def test_a_plan_writes_nothing(
    tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {**tiny_tree["data"], "cache_dir": str(tmp_path / "cache")}
    plan_of({**tiny_tree, "data": data})
    assert not list(tmp_path.iterdir())


def test_more_cpus_than_there_are_is_said_before_anything_is_measured(
    tiny_tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object) -> None:
        raise AssertionError("measured in a thousand threads")

    monkeypatch.setattr(plan, "estimate_costs", measure)
    with pytest.raises(ResourceError, match=r"resources\.cpus_per_worker is 1024"):
        plan_of(tiny_tree, resources={"cpus_per_worker": 1024, "gpus_per_worker": 0})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be had")
def test_a_plan_with_a_gpu_that_is_not_there_is_a_resource_error(tiny_tree: Tree) -> None:
    with pytest.raises(ResourceError, match=r"resources\.gpus_per_worker is 1"):
        plan_of(tiny_tree, resources={"gpus_per_worker": 1})


def test_micro_batches_save_memory_and_stages_cost_some(tiny_trial: TrialConfig) -> None:
    base = {"train.batch_size": 32}
    variants = [
        base,
        {**base, "train.gradient_accumulation_steps": 4},
        {**base, "freeze.strategy": "head"},
    ]
    trials = [with_values(tiny_trial, values) for values in variants]
    whole, parts, head = estimate_costs(trials, num_classes=3, num_train=64, num_val=8)
    assert parts.memory_bytes < whole.memory_bytes
    assert head.memory_bytes < whole.memory_bytes


def test_a_plan_says_what_reuse_takes_and_saves(tiny_tree: Tree) -> None:
    points = [
        {"freeze.strategy": "head", "optim.lr": 0.01},
        {"freeze.strategy": "head", "optim.lr": 0.02},
        {"freeze.strategy": "full"},
    ]
    search = {"algorithm": "grid", "points": points}
    text = plan_of(tiny_tree, search=search, reuse={"mode": "on"})
    assert text.count("reuse: 9 frozen stages of squeezenet1_1") == 1
    assert "validation images: 0 MiB, 0 s spent, " in text
    assert "reuse: " not in plan_of(tiny_tree, search=search, reuse={"mode": "off"})


def test_trials_share_what_reuse_saves_by_what_they_read(tiny_trial: TrialConfig) -> None:
    on = {"reuse.mode": "on", "freeze.strategy": "head"}
    heads = [with_values(tiny_trial, {**on, "optim.lr": lr}) for lr in (0.1, 0.2)]
    phased = with_values(
        tiny_trial, {**on, "freeze.strategy": "lp_ft", "freeze.head_epochs": 1, "train.epochs": 2}
    )
    full = with_values(tiny_trial, {**on, "freeze.strategy": "full"})
    configs = [*heads, phased, full]
    found = plan_reuse(configs, num_train=64, num_val=8)
    cuts = [kept.plan for of_key in found.cuts.values() for kept in of_key.values()]
    total = sum(plan.saved_seconds - plan.spent_seconds for plan in cuts)
    gains = [found.gain(config) for config in configs]
    assert sum(gains) == pytest.approx(total)
    assert gains[0] == pytest.approx(gains[1])
    assert gains[3] == 0
