import numpy as np
import pytest

from tlrunner.data.decode import normalise
from tlrunner.data.sample import CLASS_NAMES, draw, draw_jpeg


@pytest.mark.parametrize("label", range(5))
def test_a_picture_depends_on_class_and_index_alone(label: int) -> None:
    first = draw(label, 3)
    assert first.shape == (160, 160, 3)
    assert first.dtype == np.uint8
    assert (first == draw(label, 3)).all()
    assert np.abs(first.astype(int) - draw(label, 4)).mean() > 5
    assert np.abs(first.astype(int) - draw((label + 1) % 5, 3)).mean() > 5


def test_pictures_are_stored_as_they_are() -> None:
    data = draw_jpeg(2, 0)
    assert normalise(data).data == data


def test_average_colours_do_not_give_the_class_away() -> None:
    colours = np.array([[draw(c, i, 40).mean((0, 1)) for i in range(16)] for c in range(5)])
    between = colours.mean(axis=1).std(axis=0)
    within = colours.std(axis=1).mean(axis=0)
    assert len(CLASS_NAMES) == 5
    assert (between < within).all()
