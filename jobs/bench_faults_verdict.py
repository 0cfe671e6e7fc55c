"""What `bench_faults.py` holds searches to, and what came of it."""

from collections import Counter
from dataclasses import dataclass, field
from threading import Event

# What is promised, and what it is called where it was not kept.
LOST, TWICE, FALSE, HANG = "lost", "run twice", "false success", "hang"
REDONE, LATE, END = "redone", "no checkpoint", "wrong end"
PROMISES = (LOST, TWICE, FALSE, HANG, REDONE, LATE, END)


class StoppedError(Exception):
    """No more faults are wanted."""


@dataclass
class Verdict:
    """What followed of each kind of fault, over all searches."""

    is_over: Event = field(default_factory=Event)  # ends searches that are under way
    faults: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[str, str, str]] = field(default_factory=list)  # kind, promise, what was seen
    redone_steps: dict[str, float] = field(default_factory=dict)  # the most of a kind
    redone_seconds: dict[str, float] = field(default_factory=dict)
    checkpoint_age: dict[str, float] = field(default_factory=dict)

    def count(self, kind: str, promise: str) -> int:
        return sum(broken[:2] == (kind, promise) for broken in self.broken)


def worst(values: dict[str, float], kind: str, value: float) -> None:
    values[kind] = max(values.get(kind, 0.0), value)


def print_table(verdict: Verdict) -> None:
    columns = ["faults", *PROMISES, "steps redone", "s redone", "s since checkpoint"]
    print(f"\n{'':8}" + "".join(f"{column:>{len(column) + 2}}" for column in columns))
    for kind in verdict.faults:
        most = (verdict.redone_steps, verdict.redone_seconds, verdict.checkpoint_age)
        counts = [verdict.faults[kind], *(verdict.count(kind, promise) for promise in PROMISES)]
        cells = [*map(str, counts), *(f"{of_kind.get(kind, 0):.1f}" for of_kind in most)]
        widths = [len(column) + 2 for column in columns]
        print(f"{kind:8}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
