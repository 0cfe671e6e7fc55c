import threading
import time
from collections.abc import Iterator

import pytest

from tlrunner.data.threads import map_ahead


def test_results_come_in_order_whatever_finishes_first() -> None:
    def slow_at_first(i: int) -> int:
        time.sleep(0.02 if i == 0 else 0)
        return i * i

    assert list(map_ahead(slow_at_first, range(20), 4, ahead=8)) == [i * i for i in range(20)]


def test_items_are_drawn_no_further_than_agreed() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            drawn.append(i)
            yield i

    results = map_ahead(str, items(), 2, ahead=5)
    assert drawn == []
    next(results)
    assert len(drawn) == 5
    next(results)
    assert len(drawn) == 6
    results.close()


def test_a_failure_surfaces_in_its_place_and_ends_the_threads() -> None:
    def picky(i: int) -> int:
        if i == 3:
            raise ValueError("three")
        return i

    results = map_ahead(picky, range(10), 2, ahead=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert not [t for t in threading.enumerate() if t.name.startswith("tlrunner-data")]
