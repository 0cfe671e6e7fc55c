from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tlrunner.config import (
    BackboneConfig,
    FreezeConfig,
    HeadConfig,
    OptimConfig,
    Preprocess,
    ResourceConfig,
    TrainConfig,
    TrialConfig,
)
from tlrunner.data.loader import Batch
from tlrunner.model.classifier import build_classifier
from tlrunner.model.freeze import levels
from tlrunner.train.device import build_accelerator
from tlrunner.train.loop import (
    DivergedError,
    Loop,
    ModelInput,
    check_finite,
    micro_batches,
    mixed_loss,
)

PREPROCESS = Preprocess(
    image_size=32,
    crop_fraction=1.0,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.3),
    interpolation="bilinear",
)
SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
WITHOUT_NORM, WITH_NORM = "squeezenet1_1", "shufflenet_v2_x0_5"


def build_loop(
    backbone: str = WITHOUT_NORM, optim: dict[str, Any] | None = None, **train: Any
) -> Loop:
    """A loop around a model of three classes; each with the same first weights."""
    torch.manual_seed(0)
    config = BackboneConfig(name=backbone, weights="none")
    classifier, _ = build_classifier(config, HeadConfig(), num_classes=3, image_size=32)
    train_config = TrainConfig(**{"epochs": 4, **train})
    trial = TrialConfig(train=train_config, resources=ResourceConfig(gpus_per_worker=0))
    optim_config = OptimConfig(**(optim or {"lr": 0.01, **SGD}))
    return Loop(build_accelerator(trial), classifier, PREPROCESS, optim_config, train_config)


def enter(loop: Loop, strategy: FreezeConfig, epoch: int = 0) -> None:
    loop.enter_phase(levels(strategy, len(loop.classifier.stages.names), epoch))


FULL, HEAD = FreezeConfig(strategy="full"), FreezeConfig(strategy="head")


def batch_of(size: int, seed: int = 0, weights: list[float] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels_B = torch.randint(0, 3, (size,), generator=generator)
    return Batch(
        images_BHWC=torch.randint(
            0, 256, (size, 32, 32, 3), generator=generator, dtype=torch.uint8
        ),
        labels_B=labels_B,
        partner_labels_B=labels_B.roll(1) if weights else labels_B,
        label_weight_B=torch.tensor(weights) if weights else torch.ones(size),
        mask_B=torch.ones(size, dtype=torch.bool),
        num_global=size,
    )


def state_of(loop: Loop) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in loop.classifier.state_dict().items()}


# -- Batches and micro-batches ---------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 50))
def test_micro_batches_are_the_batch_in_nearly_equal_parts(size: int, num_parts: int) -> None:
    batch = replace(batch_of(size), labels_B=torch.arange(size))
    parts = list(micro_batches(batch, num_parts))
    sizes = [len(part.labels_B) for part in parts]
    assert len(parts) == min(num_parts, size)
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= 1
    assert torch.cat([part.labels_B for part in parts]).tolist() == list(range(size))
    assert torch.equal(torch.cat([part.images_BHWC for part in parts]), batch.images_BHWC)
    assert all(part.num_global == size for part in parts)


@pytest.mark.parametrize("num_parts", [2, 3, 8])
def test_accumulated_gradients_train_as_one_batch_does(num_parts: int) -> None:
    def trained(gradient_accumulation_steps: int) -> tuple[float, dict[str, Tensor]]:
        loop = build_loop(gradient_accumulation_steps=gradient_accumulation_steps, batch_size=32)
        enter(loop, FULL)
        batches = [batch_of(8, seed=1), batch_of(7, seed=2)]
        return loop.train_epoch(batches, epoch=0, num_batches=2).loss, state_of(loop)

    loss, weights = trained(1)
    other_loss, other_weights = trained(num_parts)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, weight in weights.items():
        assert torch.allclose(other_weights[name], weight, atol=1e-6), name


def test_pixels_are_normalised_by_channel() -> None:
    images_BHWC = torch.tensor([0, 255, 51], dtype=torch.uint8).expand(1, 4, 4, 3)
    images_BCHW = ModelInput(PREPROCESS, torch.device("cpu"))(images_BHWC)
    assert images_BCHW.shape == (1, 3, 4, 4)
    expected = [-0.5 / 0.2, 0.6 / 0.25, (0.2 - 0.3) / 0.3]
    assert images_BCHW[0, :, 2, 2].tolist() == pytest.approx(expected, rel=1e-5)


@given(st.tuples(*[st.floats(0.01, 0.99)] * 3), st.tuples(*[st.floats(0.05, 0.6)] * 3))
def test_looked_up_pixels_are_the_computed_ones_to_the_bit(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    preprocess = PREPROCESS.model_copy(update={"mean": mean, "std": std})
    model_input = ModelInput(preprocess, torch.device("cpu"))
    levels_BHWC = torch.arange(256, dtype=torch.uint8).view(2, 128, 1, 1).expand(2, 128, 3, 3)
    looked_up, computed = model_input(levels_BHWC), model_input.computed(levels_BHWC)
    assert torch.equal(looked_up, computed)
    assert looked_up.dtype == torch.float32
    assert looked_up.is_contiguous(memory_format=torch.channels_last)


# -- Loss ------------------------------------------------------------------------------------------

weights = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9)


@given(weights, st.floats(0, 0.5))
def test_a_mixed_image_counts_for_both_labels_by_their_weights(
    weights: list[float], label_smoothing: float
) -> None:
    batch = batch_of(len(weights), weights=weights)
    logits_BK = torch.randn(len(weights), 3, generator=torch.Generator().manual_seed(1))
    targets_BK = torch.zeros_like(logits_BK)
    for row, weight in enumerate(weights):
        targets_BK[row, batch.labels_B[row]] += weight
        targets_BK[row, batch.partner_labels_B[row]] += 1 - weight
    smooth_BK = (1 - label_smoothing) * targets_BK + label_smoothing / 3
    expected = -(smooth_BK * logits_BK.log_softmax(1)).sum()
    loss, _ = mixed_loss(logits_BK, batch, label_smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def test_an_image_is_correct_by_the_label_that_weighs_more() -> None:
    batch = replace(
        batch_of(3, weights=[0.7, 0.3, 1.0]),
        labels_B=torch.tensor([0, 0, 0]),
        partner_labels_B=torch.tensor([1, 1, 1]),
    )
    says_0 = F.one_hot(torch.zeros(3, dtype=torch.long), 3).float()
    assert mixed_loss(says_0, batch, 0.0)[1].item() == 2
    assert mixed_loss(says_0.roll(1, dims=1), batch, 0.0)[1].item() == 1


def padded(batch: Batch, num_padding: int) -> Batch:
    """The batch with padding behind it, whose images are as bright as can be."""
    zeros = torch.zeros(num_padding, dtype=torch.int64)
    images = torch.full((num_padding, 32, 32, 3), 255, dtype=torch.uint8)
    return replace(
        batch,
        images_BHWC=torch.cat([batch.images_BHWC, images]),
        labels_B=torch.cat([batch.labels_B, zeros]),
        partner_labels_B=torch.cat([batch.partner_labels_B, zeros]),
        label_weight_B=torch.cat([batch.label_weight_B, torch.ones(num_padding)]),
        mask_B=torch.cat([batch.mask_B, torch.zeros(num_padding, dtype=torch.bool)]),
    )


@given(st.integers(1, 6), st.integers(0, 4))
def test_padding_counts_for_nothing(size: int, num_padding: int) -> None:
    batch = batch_of(size)
    logits_BK = torch.randn(size, 3, generator=torch.Generator().manual_seed(size))
    padding_BK = torch.full((num_padding, 3), float("nan"))
    logits_PK = torch.cat([logits_BK, padding_BK])
    loss, correct = mixed_loss(logits_PK, padded(batch, num_padding), 0.1)
    expected_loss, expected_correct = mixed_loss(logits_BK, batch, 0.1)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert correct == expected_correct


def test_validation_does_not_count_padding() -> None:
    loop = build_loop()
    enter(loop, HEAD)
    batches = [batch_of(4, 1), batch_of(4, 2)]
    empty = replace(padded(batch_of(1), 3), mask_B=torch.zeros(4, dtype=torch.bool))
    expected = loop.evaluate(batches)
    found = loop.evaluate([padded(batch, 3) for batch in batches] + [empty])
    assert (found.seen, found.acc) == (expected.seen, expected.acc) == (8, expected.acc)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_half_precision_logits_have_their_loss_in_float32() -> None:
    loss, _ = mixed_loss(torch.randn(4, 3).bfloat16(), batch_of(4), 0.0)
    assert loss.dtype == torch.float32


def test_training_is_smoothed_and_validation_is_not() -> None:
    plain, smoothed = build_loop(), build_loop(label_smoothing=0.3)
    for loop in (plain, smoothed):
        enter(loop, HEAD)
    batch = batch_of(8)
    assert smoothed.evaluate([batch]) == plain.evaluate([batch])
    losses = [loop.train_epoch([batch], 0, 1).loss for loop in (plain, smoothed)]
    assert losses[0] != losses[1]


# -- What moves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e6])
def test_a_step_is_as_long_as_clipping_allows(max_grad_norm: float) -> None:
    loop = build_loop(optim={"lr": 1.0, "max_grad_norm": max_grad_norm, **SGD})
    enter(loop, FULL)
    before = state_of(loop)
    loop.train_epoch([batch_of(8)], epoch=0, num_batches=1)
    after = state_of(loop)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm().item()
    if max_grad_norm == 1e-3:
        assert moved == pytest.approx(1e-3, rel=1e-3)
    else:
        free = build_loop(optim={"lr": 1.0, **SGD})
        enter(free, FULL)
        free.train_epoch([batch_of(8)], epoch=0, num_batches=1)
        assert all(torch.equal(after[name], weight) for name, weight in state_of(free).items())


def test_frozen_gradients_have_no_part_in_clipping() -> None:
    loop = build_loop(optim={"lr": 1.0, "max_grad_norm": 1e-3, **SGD})
    enter(loop, HEAD)
    frozen = next(p for p in loop.classifier.parameters() if not p.requires_grad)
    frozen.grad = torch.full_like(frozen, 1e6)  # a foreign one, which would outweigh all others
    before = state_of(loop)
    loop.train_epoch([batch_of(8)], epoch=0, num_batches=1)
    moved = sum((state_of(loop)[name] - before[name]).norm() ** 2 for name in before) ** 0.5
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_what_is_frozen_stands_still_to_the_bit_statistics_included() -> None:
    loop = build_loop(WITH_NORM, optim={"lr": 0.1, "weight_decay": 1.0})
    enter(loop, HEAD)
    before = state_of(loop)
    for epoch in range(2):
        loop.train_epoch([batch_of(8, seed=epoch)], epoch, num_batches=1)
        loop.evaluate([batch_of(8)])
    after = state_of(loop)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.linear1.weight", "head.linear1.bias"}
    assert all(p.grad is None for p in loop.classifier.backbone.parameters())


def test_a_new_phase_has_a_new_optimizer_in_which_old_moments_go_on() -> None:
    loop = build_loop(WITH_NORM, optim={"lr": 0.01})
    lp_ft = FreezeConfig(strategy="lp_ft", head_epochs=1)
    enter(loop, lp_ft, epoch=0)
    first = loop.optimizer
    loop.train_epoch([batch_of(8)], 0, num_batches=1)
    head = set(loop.classifier.head.parameters())
    moments = {p: first.optimizer.state[p]["exp_avg"].clone() for p in head}

    enter(loop, lp_ft, epoch=1)
    state = loop.optimizer.optimizer.state
    assert loop.optimizer is not first
    assert set(state) == head
    assert all(torch.equal(state[p]["exp_avg"], moments[p]) for p in head)
    held = [p for group in loop.optimizer.param_groups for p in group["params"]]
    assert set(held) == set(loop.classifier.parameters())

    before = state_of(loop)
    loop.train_epoch([batch_of(8)], 1, num_batches=1)
    steps = {p: int(state[p]["step"]) for p in held}
    assert all(steps[p] == (2 if p in head else 1) for p in held)
    assert not torch.equal(state_of(loop)["head.linear1.bias"], before["head.linear1.bias"])


def test_the_rate_of_each_step_is_that_of_its_middle() -> None:
    loop = build_loop(optim={**SGD, "lr": 1e-3, "schedule": "cosine", "warmup_epochs": 1})
    enter(loop, HEAD)
    rates = []

    def batches() -> Iterator[Batch]:
        for seed in range(2):
            yield batch_of(4, seed)  # the rate of a step stands when the next batch is asked for
            rates.append(loop.optimizer.param_groups[0]["lr"])

    loop.train_epoch(batches(), epoch=0, num_batches=2)
    assert rates == pytest.approx([0.25e-3, 0.75e-3])


# -- Averaged weights ------------------------------------------------------------------------------


def test_validation_and_checkpoints_have_the_averaged_weights() -> None:
    optim = {"lr": 0.05, **SGD}
    averaged, plain = build_loop(optim=optim, ema_decay=0.9), build_loop(optim=optim)
    for loop in (averaged, plain):
        enter(loop, FULL)
        loop.train_epoch([batch_of(8, seed) for seed in range(3)], 0, num_batches=3)
    live = state_of(plain)
    assert all(torch.equal(tensor, live[name]) for name, tensor in state_of(averaged).items())
    kept = averaged.trained_state()
    assert any(not torch.equal(tensor, live[name]) for name, tensor in kept.items())

    found = averaged.evaluate([batch_of(8)])
    plain.classifier.load_state_dict(kept)
    assert found == plain.evaluate([batch_of(8)])
    assert all(torch.equal(tensor, live[name]) for name, tensor in state_of(averaged).items())


def test_the_trained_state_is_a_copy() -> None:
    loop = build_loop()
    enter(loop, HEAD)
    kept = loop.trained_state()
    before = {name: tensor.clone() for name, tensor in kept.items()}
    assert set(kept) == {"head.linear1.weight", "head.linear1.bias"}
    loop.train_epoch([batch_of(8)], 0, num_batches=1)
    assert all(torch.equal(kept[name], before[name]) for name in kept)


# -- Divergence ------------------------------------------------------------------------------------


@given(st.integers(1, 99), st.integers(1, 40), st.data())
def test_the_first_loss_that_is_not_finite_names_its_step(
    first_step: int, num_losses: int, data: st.DataObject
) -> None:
    losses = [torch.tensor(1.0)] * num_losses
    check_finite(torch.stack(losses), first_step)
    bad = data.draw(st.sets(st.integers(0, num_losses - 1), min_size=1))
    for index in bad:
        losses[index] = torch.tensor(data.draw(st.sampled_from([float("nan"), float("inf")])))
    with pytest.raises(DivergedError) as caught:
        check_finite(torch.stack(losses), first_step)
    assert caught.value.step == first_step + min(bad)


@pytest.mark.parametrize("poisoned", [0, 1, 15, 16, 17, 18, 19])
@pytest.mark.parametrize("epoch", [0, 3])
def test_a_divergence_is_named_with_its_exact_step(poisoned: int, epoch: int) -> None:
    loop = build_loop()
    enter(loop, HEAD)

    def batches() -> Iterator[Batch]:
        for index in range(20):
            if index == poisoned:
                loop.classifier.head.linear1.bias.data.fill_(float("nan"))
            yield batch_of(1, seed=index)

    with pytest.raises(DivergedError, match="non-finite loss at step") as caught:
        loop.train_epoch(batches(), epoch, num_batches=20)
    assert caught.value.step == epoch * 20 + poisoned + 1
