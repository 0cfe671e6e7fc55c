from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tlrunner.train.reuse import Reuse


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each group that was rendered outside of training."""
    counts: list[int] = []
    render = Reuse._rendered

    def counting(self: Reuse, *arguments: Any) -> Iterator[torch.Tensor]:
        for images_BHWC in render(self, *arguments):
            counts.append(len(images_BHWC))
            yield images_BHWC

    monkeypatch.setattr(Reuse, "_rendered", counting)
    return counts
