"""Ends the process of a trial that makes no step: what hangs in a driver, a collective or a file
system cannot be interrupted, and the trial goes on from its checkpoint in a process of its own.
"""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tlrunner.errors import InterruptedRun

LONGEST_NAP = 10.0  # seconds
TELLING_SECONDS = 5.0  # what hangs may be the disk that is to be told
STDERR = 2

log = logging.getLogger("tlrunner")
Thing = TypeVar("Thing")


class Watchdog:
    """Watches the passes over data of a trial; whatever else it does may take its time.

    Args:
        seconds: that a step may take.

    Attributes:
        tell: told of the stall, before the process ends.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.tell: Callable[[str], object] = lambda error: None
        self._beaten_at = 0.0

    def beat(self) -> None:
        """One more step is made."""
        self._beaten_at = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside this block there is to be a beat now and then."""
        self.beat()
        is_over = threading.Event()
        threading.Thread(target=self._watch, args=(is_over,), daemon=True).start()
        try:
            yield
        finally:
            is_over.set()

    def over(self, things: Iterable[Thing]) -> Iterator[Thing]:
        """The same things, each of which makes a step."""
        with self.watching():
            for thing in things:
                self.beat()
                yield thing

    def _watch(self, is_over: threading.Event) -> None:
        while not is_over.wait(min(self.seconds / 4, LONGEST_NAP)):
            if time.monotonic() - self._beaten_at > self.seconds:
                self._end()

    def _end(self) -> None:
        error = f"no step for {self.seconds:.0f} s (train.stall_seconds)"
        telling = threading.Thread(target=self.tell, args=(error,), daemon=True)
        telling.start()
        telling.join(TELLING_SECONDS)
        faulthandler.dump_traceback(STDERR)
        log.error("%s; the same command goes on from the last checkpoint", error)
        os._exit(InterruptedRun.exit_code)
