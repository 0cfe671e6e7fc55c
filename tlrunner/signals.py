"""SIGTERM and Ctrl-C: work is asked to halt where it can go on later, and made to if it does not.

Kubernetes gives a pod 30 seconds between SIGTERM and SIGKILL, unless it is told otherwise.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

GRACE_SECONDS = 20.0  # to halt in; the rest is for what is to be written then


def _never() -> bool:
    return False


@dataclass
class Halt:
    """Whether this process was asked to halt, or has another reason to."""

    has_reason: Callable[[], bool] = _never
    is_asked: bool = False

    def __call__(self) -> bool:
        return self.is_asked or self.has_reason()


@contextmanager
def halting(
    grace_seconds: float = GRACE_SECONDS, *, has_reason: Callable[[], bool] = _never
) -> Iterator[Halt]:
    """Inside this block a first signal asks to halt.

    Args:
        has_reason: whether there is another reason to, which no signal tells.

    Raises:
        KeyboardInterrupt: from anywhere in the block, at a second signal, or where the block has
            not ended so many seconds after the first.
    """
    halt = Halt(has_reason)

    def asked(signum: int, frame: FrameType | None) -> None:
        if halt.is_asked:
            interrupted(signum, frame)
        halt.is_asked = True
        signal.setitimer(signal.ITIMER_REAL, grace_seconds)

    handlers = {signal.SIGTERM: asked, signal.SIGINT: asked, signal.SIGALRM: interrupted}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield halt
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(signum: int, frame: FrameType | None) -> None:
    """A signal handler: ends whatever goes on as Ctrl-C does."""
    raise KeyboardInterrupt
