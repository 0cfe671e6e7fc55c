from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.train.metrics import Metrics, Sums

CPU = torch.device("cpu")


def alone(totals: torch.Tensor) -> torch.Tensor:
    """The sum over one worker."""
    return totals


images = st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), min_size=1, max_size=40)


def metrics_of(images: list[tuple[bool, int]], cuts: list[int]) -> Metrics:
    """Metrics of (is correct, loss) pairs that are added in batches cut at `cuts`."""
    sums = Sums(CPU)
    edges = [0, *sorted(min(cut, len(images)) for cut in cuts), len(images)]
    for start, stop in pairwise(edges):
        batch = torch.tensor(images[start:stop], dtype=torch.float32).view(-1, 2)
        sums.add(batch[:, 0].sum(), batch[:, 1].sum(), len(batch))
    return sums.metrics(alone)


@given(images, st.lists(st.integers(0, 40), max_size=6))
def test_metrics_do_not_depend_on_how_images_are_batched(
    images: list[tuple[bool, int]], cuts: list[int]
) -> None:
    acc = sum(correct for correct, _ in images) / len(images)
    loss = sum(loss for _, loss in images) / len(images)
    assert metrics_of(images, cuts) == Metrics(acc, loss, len(images))


def test_a_million_images_are_counted_to_the_last() -> None:
    sums = Sums(CPU)
    for _ in range(3):
        sums.add(torch.tensor(2**24 + 1), torch.tensor(0.0), 2**24 + 1)  # not a float32
    assert sums.metrics(alone) == Metrics(1.0, 0.0, 3 * (2**24 + 1))


def test_metrics_are_plain_numbers() -> None:
    sums = Sums(CPU)
    sums.add(torch.tensor(1), torch.tensor(0.5), 2)
    metrics = sums.metrics(alone)
    assert [type(value) for value in (metrics.acc, metrics.loss, metrics.seen)] == [
        float,
        float,
        int,
    ]


def test_there_are_no_metrics_of_no_images() -> None:
    with pytest.raises(AssertionError, match="no images"):
        Sums(CPU).metrics(alone)
