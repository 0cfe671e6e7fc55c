"""What a signal does to work that can halt, and to work that does not."""

import os
import signal
import time

import pytest

from tlrunner.signals import halting

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def wait_for_ever() -> None:
    for _ in range(3000):
        time.sleep(0.01)
    raise AssertionError("nothing ended this")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_asks_and_the_second_ends(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), halting() as is_halted:
        assert not is_halted()
        os.kill(os.getpid(), number)
        assert is_halted()
        os.kill(os.getpid(), number)
        wait_for_ever()


def test_work_that_does_not_halt_in_time_is_ended() -> None:
    with pytest.raises(KeyboardInterrupt), halting(grace_seconds=0.05):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_ever()


def test_work_that_halts_in_time_is_not_ended_and_signals_are_as_before() -> None:
    numbers = [*SIGNALS, signal.SIGALRM]
    before = [signal.getsignal(number) for number in numbers]
    with halting(grace_seconds=0.05):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    assert [signal.getsignal(number) for number in numbers] == before


def test_another_reason_halts_as_well() -> None:
    with halting(has_reason=lambda: True) as is_halted:
        assert is_halted()
