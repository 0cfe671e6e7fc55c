"""Trials that are asked to halt, stall, or find another origin than they were begun with."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.errors import StorageError
from tlrunner.model.weights import fingerprint_state
from tlrunner.train import loaded as loaded_module
from tlrunner.train import loop as loop_module
from tlrunner.train.attempts import Attempt, is_hopeless, note_attempt, read_attempts
from tlrunner.train.checkpoint import read_checkpoint
from tlrunner.train.images import Images
from tlrunner.train.place import Place
from tlrunner.train.trial import TrialResult, run_trial
from tlrunner.train.trial_dir import TrialDir

NUM_STEPS = 4  # of an epoch of the tiny trial
FIGURES = ("epoch", "val_acc", "val_loss", "train_loss")


def halted_in(step: int) -> Callable[[], bool]:
    """Asked behind each step, it halts the trial behind this one, from 1."""
    asked = 0

    def is_halted() -> bool:
        nonlocal asked
        asked += 1
        return asked >= step

    return is_halted


def told(trial: TrialDir) -> list[list[Any]]:
    return [[asdict(report)[name] for name in FIGURES] for report in trial.read().epochs]


@pytest.mark.parametrize("step", [1, 2, NUM_STEPS, NUM_STEPS + 1, 2 * NUM_STEPS - 1])
def test_a_halted_trial_goes_on_to_the_same_end(
    tiny_trial: TrialConfig,
    colour_images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    monkeypatch.setattr(loop_module, "LOOK_STEPS", 1)
    whole, parts = TrialDir(tmp_path / "whole"), TrialDir(tmp_path / "parts")

    def run(directory: TrialDir, **asked: Any) -> TrialResult:
        place = directory.place
        return run_trial(tiny_trial, lambda _: 0, trial_dir=place, images=colour_images, **asked)

    assert run(whole).state == "completed"
    assert run(parts, is_halted=halted_in(step)).state == "interrupted"
    assert parts.read().state == "interrupted"
    assert run(parts, resume_from=parts.to_go_on_from()).state == "completed"
    events = [(a.event, a.step) for a in read_attempts(parts.place)]
    assert events == [("started", 0), ("halted", step), ("started", step)]
    assert told(parts) == told(whole)
    (one,), (other,) = (list(trial.checkpoints.iterdir()) for trial in (whole, parts))
    assert fingerprint_state(read_checkpoint(one)[0]) == fingerprint_state(
        read_checkpoint(other)[0]
    )


def test_a_trial_whose_epochs_are_of_one_step_halts_as_well(
    tiny_trial: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    config = with_values(tiny_trial, {"train.batch_size": 64, "train.epochs": 3})
    trial = TrialDir(tmp_path / "trial")
    halted = run_trial(
        config, lambda _: 0, trial_dir=trial.place, images=colour_images, is_halted=halted_in(2)
    )
    assert halted.state == "interrupted"
    assert len(trial.read().epochs) == 1


def test_other_weights_than_the_trial_was_begun_with_are_refused(
    tiny_trial: TrialConfig, colour_images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_values(tiny_trial, {"backbone.name": "efficientnet_lite0"})
    config = with_values(config, {"backbone.weights": "default", "freeze.strategy": "head"})
    trial = TrialDir(tmp_path / "trial")

    def run(**asked: Any) -> None:
        run_trial(config, lambda _: 0, trial_dir=trial.place, images=colour_images, **asked)

    run(is_halted=halted_in(1))
    monkeypatch.setattr(loaded_module, "fingerprint_state", lambda state: "0" * 64)
    with pytest.raises(StorageError, match="the weights of backbone efficientnet_lite0 changed"):
        run(resume_from=trial.to_go_on_from())
    monkeypatch.undo()
    run(resume_from=trial.to_go_on_from())


STALLS = """
import sys, time
from pathlib import Path
from tlrunner.train.attempts import note_attempt
from tlrunner.train.place import Place
from tlrunner.train.watchdog import Watchdog

def slow():
    yield 1
    time.sleep(60)

watchdog = Watchdog(0.2)
watchdog.tell = lambda error: note_attempt(Place(Path(sys.argv[1])), "stalled", 7, error)
for _ in watchdog.over(slow()):
    print("a step", flush=True)
"""


def test_a_process_without_a_step_says_where_it_hangs_and_ends(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STALLS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (75, "a step\n"), ended.stderr
    assert "in slow" in ended.stderr
    (attempt,) = read_attempts(Place(tmp_path))
    assert (attempt.event, attempt.step) == ("stalled", 7)
    assert "no step for" in attempt.error


def test_a_watch_that_is_over_ends_nothing(tmp_path: Path) -> None:
    quick = STALLS.replace("    time.sleep(60)", "    yield 2") + "\ntime.sleep(0.5)\n"
    ended = subprocess.run([sys.executable, "-c", quick, str(tmp_path)], check=False)
    assert ended.returncode == 0


@pytest.mark.parametrize(
    ("failures", "hopeless"),
    [
        ([(0, "a")], False),
        ([(0, "a"), (8, "a")], False),
        ([(0, "a"), (0, "b")], False),
        ([(0, "a"), (0, "a")], True),
        ([(0, "a"), (8, "b"), (0, "a")], False),
        ([(0, "a"), (1, "b"), (2, "c"), (3, "d")], True),
    ],
)
def test_the_same_error_twice_or_too_many_end_a_trial(
    tmp_path: Path, failures: list[tuple[int, str]], hopeless: bool
) -> None:
    place = Place(tmp_path)
    for step, error in failures:
        note_attempt(place, "started", step)
        note_attempt(place, "failed", step, error)
    assert is_hopeless(read_attempts(place), max_failures=3) is hopeless


def test_a_line_that_a_kill_tore_gives_way_to_the_next(tmp_path: Path) -> None:
    note_attempt(Place(tmp_path), "started", 0)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "fail')
    note_attempt(Place(tmp_path), "started", 3)
    assert read_attempts(Place(tmp_path)) == [Attempt("started", 0), Attempt("started", 3)]
