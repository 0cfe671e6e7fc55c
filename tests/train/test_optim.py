import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.config import BackboneConfig, FreezeConfig, HeadConfig, OptimConfig
from tlrunner.model.classifier import Classifier, build_classifier
from tlrunner.model.freeze import levels
from tlrunner.train.optim import (
    build_optimizer,
    carry_state,
    parameter_groups,
    schedule_factor,
    set_learning_rate,
)

STRATEGIES = [
    FreezeConfig(strategy="head"),
    FreezeConfig(strategy="last_stages", num_stages=2),
    FreezeConfig(strategy="first_stages", num_stages=1),
    FreezeConfig(strategy="norm_and_head"),
    FreezeConfig(strategy="full"),
]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """Five stages, with BatchNorm."""
    backbone = BackboneConfig(name="shufflenet_v2_x0_5", weights="none")
    return build_classifier(backbone, HeadConfig(), num_classes=3, image_size=32)[0]


def freeze(classifier: Classifier, strategy: FreezeConfig, epoch: int = 0) -> None:
    classifier.set_levels(levels(strategy, len(classifier.stages.names), epoch))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_the_optimizer_holds_each_trained_parameter_once_and_no_frozen_one(
    classifier: Classifier, strategy: FreezeConfig
) -> None:
    freeze(classifier, strategy)
    optimizer = build_optimizer(parameter_groups(classifier, OptimConfig()), OptimConfig())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in classifier.parameters() if p.requires_grad}


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_each_stage_learns_slower_than_the_one_above_it(
    classifier: Classifier, strategy: FreezeConfig, layer_decay: float
) -> None:
    freeze(classifier, strategy)
    groups = parameter_groups(classifier, OptimConfig(lr=0.1, layer_decay=layer_decay))
    rate_of = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    top = len(classifier.stages.names)
    for name, parameter in classifier.trainable_parameters().items():
        stage = top
        if name.startswith("backbone."):
            stage = classifier.stages.of_parameter[name.removeprefix("backbone.")]
        assert rate_of[id(parameter)] == pytest.approx(0.1 * layer_decay ** (top - stage)), name


def test_biases_and_norm_parameters_are_not_decayed(classifier: Classifier) -> None:
    freeze(classifier, FreezeConfig(strategy="full"))
    groups = parameter_groups(classifier, OptimConfig(weight_decay=0.3))
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in classifier.named_parameters():
        is_matrix = name.endswith("weight") and parameter.ndim > 1
        assert decay_of[id(parameter)] == (0.3 if is_matrix else 0.0), name


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)],
)
def test_the_optimizer_is_the_one_that_the_config_names(
    classifier: Classifier, name: str, kind: type[torch.optim.Optimizer]
) -> None:
    freeze(classifier, FreezeConfig(strategy="head"))
    optim = OptimConfig(optimizer=name)
    optimizer = build_optimizer(parameter_groups(classifier, optim), optim)
    assert type(optimizer) is kind
    assert all(group.get("momentum", 0.9) == 0.9 for group in optimizer.param_groups)


def test_moments_are_carried_for_what_trains_on_and_start_empty_for_what_joins(
    classifier: Classifier,
) -> None:
    optim = OptimConfig()
    freeze(classifier, FreezeConfig(strategy="head"))
    old = build_optimizer(parameter_groups(classifier, optim), optim)
    classifier(torch.rand(2, 3, 32, 32)).sum().backward()
    old.step()
    freeze(classifier, FreezeConfig(strategy="full"))
    new = build_optimizer(parameter_groups(classifier, optim), optim)
    carry_state(old, new)
    head = set(classifier.head.parameters())
    assert set(new.state) == head
    assert all(new.state[p]["step"].item() == 1 for p in head)
    assert all(new.state[p]["exp_avg"] is old.state[p]["exp_avg"] for p in head)


# -- Schedules -------------------------------------------------------------------------------------

optims = st.builds(
    OptimConfig,
    schedule=st.sampled_from(["cosine", "step", "constant"]),
    warmup_epochs=st.floats(0, 4.9),
)


@given(optims, st.floats(0, 5))
def test_the_rate_lies_between_zero_and_its_peak(optim: OptimConfig, epoch: float) -> None:
    assert 0 <= schedule_factor(optim, epoch, num_epochs=5) <= 1


@given(optims, st.floats(0, 5), st.floats(0, 5))
def test_the_rate_rises_during_warm_up_and_never_after(
    optim: OptimConfig, one: float, other: float
) -> None:
    early, late = sorted((one, other))
    before = schedule_factor(optim, early, num_epochs=5)
    after = schedule_factor(optim, late, num_epochs=5)
    if late < optim.warmup_epochs:
        assert before <= after
    elif early >= optim.warmup_epochs:
        assert before >= after


def test_a_cosine_has_its_half_in_the_middle_and_ends_at_zero() -> None:
    optim = OptimConfig(schedule="cosine", warmup_epochs=1)
    factors = [schedule_factor(optim, epoch, num_epochs=5) for epoch in (0.5, 1, 3, 5)]
    assert factors == pytest.approx([0.5, 1, 0.5, 0])


def test_steps_come_every_so_many_epochs() -> None:
    optim = OptimConfig(schedule="step", step_epochs=2, step_gamma=0.1)
    factors = [schedule_factor(optim, epoch + 0.5, num_epochs=6) for epoch in range(6)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_every_group_moves_with_its_own_peak(classifier: Classifier) -> None:
    freeze(classifier, FreezeConfig(strategy="full"))
    optim = OptimConfig(lr=0.1, layer_decay=0.5)
    optimizer = build_optimizer(parameter_groups(classifier, optim), optim)
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    rates = sorted({group["lr"] for group in optimizer.param_groups}, reverse=True)
    assert rates == pytest.approx([0.25 * 0.1 * 0.5**k for k in range(6)])
