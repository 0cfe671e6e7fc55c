import numpy as np
import pytest

from tlrunner.config import Preprocess
from tlrunner.data.normalise import level_table, normalised


def test_each_channel_has_values_of_its_own(preprocess: Preprocess) -> None:
    table = level_table(preprocess)
    assert table.shape == (256, 1, 3)
    assert table.dtype == np.float32
    assert table[0, 0].tolist() == pytest.approx([-2.5, -2.0, -1.5])
    assert table[255, 0].tolist() == pytest.approx([2.5, 3.0, 3.5])


@pytest.mark.parametrize("rows", [slice(None), slice(1, 3), slice(0, 5, 2), slice(0, 0)])
def test_every_pixel_of_a_batch_or_of_a_part_is_looked_up(
    rows: slice, preprocess: Preprocess
) -> None:
    images_BHWC = np.random.default_rng(0).integers(0, 256, (5, 4, 7, 3), np.uint8)[rows]
    table = level_table(preprocess)
    expected = np.stack([table[images_BHWC[..., c], 0, c] for c in range(3)], axis=-1)
    assert (normalised(images_BHWC, table) == expected).all()
