"""What a process keeps from one trial to the next: opened data, loaded weights, mapped caches."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Thing = TypeVar("Thing")


class Warm:
    """Things by kind and key; of each kind the most recently used."""

    def __init__(self) -> None:
        self._kept: dict[str, OrderedDict[Hashable, Any]] = {}

    def once(self, kind: str, key: Hashable, make: Callable[[], Thing], most: int = 2) -> Thing:
        """What was made for this key before, or `make()`; of its kind `most` are kept."""
        kept = self._kept.setdefault(kind, OrderedDict())
        if key not in kept:
            kept[key] = make()
        kept.move_to_end(key)
        while len(kept) > most:
            kept.popitem(last=False)
        thing: Thing = kept[key]
        return thing
