"""A classifier with random weights, and one training step of it."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tlrunner.config import BackboneConfig, FreezeConfig, HeadConfig
from tlrunner.model.classifier import Classifier, build_classifier
from tlrunner.model.freeze import levels

NUM_CLASSES = 3

Build = Callable[..., Classifier]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small lose more to waking threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def build() -> Build:
    """`build(name, image_size)` with random weights and three classes."""

    def built(name: str, image_size: int | None = None, **head: object) -> Classifier:
        torch.manual_seed(0)
        config = BackboneConfig(name=name, weights="none")
        return build_classifier(config, HeadConfig(**head), NUM_CLASSES, image_size)[0]

    return built


@pytest.fixture
def train_step() -> Callable[[Classifier, int], Tensor]:
    """`train_step(classifier, image_size)` on random images; returns the logits."""

    def step(classifier: Classifier, image_size: int) -> Tensor:
        torch.manual_seed(1)
        images_BCHW = torch.randn(2, 3, image_size, image_size)
        optimizer = torch.optim.AdamW(
            classifier.trainable_parameters().values(), lr=0.1, weight_decay=0.1
        )
        logits = classifier.train()(images_BCHW)
        cross_entropy(logits, torch.tensor([0, 1])).backward()
        optimizer.step()
        return logits.detach()

    return step


@pytest.fixture
def check_frozen_parts_stand_still(train_step: Callable[..., Tensor]) -> Callable[..., None]:
    """`check(classifier, image_size)`: one step each under `head` and under `last_stages`."""

    def moved(classifier: Classifier, freeze: FreezeConfig, image_size: int) -> set[str]:
        classifier.set_levels(levels(freeze, len(classifier.stages.names), epoch=0))
        before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
        logits = train_step(classifier, image_size)
        assert logits.shape == (2, NUM_CLASSES)
        after = classifier.state_dict()
        return {name for name in before if not torch.equal(before[name], after[name])}

    def check(classifier: Classifier, image_size: int) -> None:
        head = {f"head.{name}" for name in classifier.head.state_dict()}
        assert moved(classifier, FreezeConfig(strategy="head"), image_size) == head

        last = FreezeConfig(strategy="last_stages", num_stages=1)
        below = {
            f"backbone.{name}"
            for name, stage in classifier.stages.of_parameter.items()
            if stage < len(classifier.stages.names) - 1
        }
        changed = moved(classifier, last, image_size)
        assert not changed & below
        assert not classifier.trainable_parameters().keys() & below
        assert changed - head, "the last stage trains"
        assert changed <= classifier.trainable_state().keys()

    return check
