"""Heads trained together: each ends as it does alone, and goes on where it was broken off."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from curves import close

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.train.attempts import read_attempts
from tlrunner.train.beside import Beside
from tlrunner.train.demand import demands, sharing_key
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import EpochReport, TrialDir

Values = dict[str, Any]


def test_trials_that_are_trained_together_end_as_they_do_alone(
    run: Callable[..., list[EpochReport]], config: TrialConfig, tmp_path: Path
) -> None:
    changes: list[Values] = [
        {"optim.lr": 0.1},
        {"optim.lr": 0.01, "optim.weight_decay": 0.3, "optim.warmup_epochs": 1},
        {"train.label_smoothing": 0.2, "optim.max_grad_norm": 0.5, "optim.schedule": "constant"},
        {"train.ema_decay": 0.7, "train.gradient_accumulation_steps": 2},
    ]
    trials = [with_values(config, change) for change in changes]
    beside = Beside(trials, demands(trials))
    for number, trial in enumerate(trials):
        together, alone = tmp_path / f"together{number}", tmp_path / f"alone{number}"
        ours = run(trial, beside=beside, trial_dir=together)
        theirs = run(trial, trial_dir=alone)
        assert close(ours, theirs, 1e-4)
        best = [TrialDir(d).read().best for d in (together, alone)]
        assert best[0] and best[1]
        assert best[0].checkpoint == best[1].checkpoint


def test_seeds_of_fixed_views_are_trained_together(
    run: Callable[..., list[EpochReport]], config: TrialConfig
) -> None:
    config = with_values(config, {"augment.num_views": 2})
    trials = [with_values(config, {"train.seed": seed}) for seed in (3, 4)]
    assert sharing_key(trials[0]) == sharing_key(trials[1])
    beside = Beside(trials, demands(trials))
    for trial in trials:
        assert close(run(trial, beside=beside), run(trial), 1e-4)


def test_one_that_diverges_leaves_the_others_their_results(
    run: Callable[..., list[EpochReport]], config: TrialConfig, tmp_path: Path
) -> None:
    wild = {"optim.optimizer": "sgd", "optim.lr": 100.0, "head": {"kind": "mlp"}}
    wild |= {"optim.weight_decay": 10.0, "train.epochs": 12, "optim.schedule": "constant"}
    trials = [with_values(config, {**wild, "optim.lr": lr}) for lr in (100.0, 1e-3)]
    beside = Beside(trials, demands(trials))
    run(trials[0], beside=beside, trial_dir=tmp_path / "wild")
    assert TrialDir(tmp_path / "wild").read().state == "diverged"
    assert close(run(trials[1], beside=beside), run(trials[1]), 1e-4)


SWEPT: dict[str, Values] = {
    "adamw": {},
    "ema": {"train.ema_decay": 0.7, "head": {"kind": "mlp"}},
    "sgd": {"optim.optimizer": "sgd", "optim.momentum": 0.9, "optim.lr": 0.01},
    "plain sgd": {"optim.optimizer": "sgd", "optim.momentum": 0.0, "optim.lr": 0.01},
}


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("case", SWEPT)
def test_one_that_is_halted_among_others_goes_on_alone(
    run: Callable[..., list[EpochReport]],
    config: TrialConfig,
    tmp_path: Path,
    case: str,
    epoch: int,
) -> None:
    config = with_values(config, {**SWEPT[case], "train.epochs": 5})
    trials = [config, with_values(config, {"optim.weight_decay": 0.3})]
    trial = TrialDir(tmp_path / "trial")

    def is_halted() -> bool:
        return trial.has_begun and len(trial.read().epochs) == epoch

    beside = Beside(trials, demands(trials))
    begun = run(config, beside=beside, trial_dir=trial.path, is_halted=is_halted)
    events = [(attempt.event, attempt.step) for attempt in read_attempts(trial.place)]
    assert events == [("started", 0), ("halted", 3 * epoch)]
    checkpoint = trial.to_go_on_from()
    assert checkpoint
    rest = run(config, trial_dir=trial.path, resume_from=checkpoint)
    assert [report.epoch for report in rest] == list(range(epoch + 1, 6))
    assert close([*begun, *rest], run(config), 1e-4)


def test_the_first_of_those_trained_together_goes_on_from_its_best_epoch_at_least(
    run: Callable[..., list[EpochReport]], config: TrialConfig, tmp_path: Path
) -> None:
    trials = [config, with_values(config, {"optim.weight_decay": 0.3})]
    trial = TrialDir(tmp_path / "trial")

    class KilledError(Exception):
        """What a SIGKILL is to a trial."""

    def is_halted() -> bool:
        if trial.has_begun and len(trial.read().epochs) == 2:
            raise KilledError
        return False

    with pytest.raises(KilledError):
        run(config, beside=Beside(trials), trial_dir=trial.path, is_halted=is_halted)
    best = trial.read().best
    assert best
    assert trial.to_go_on_from() == Place(trial.best_checkpoint(best))
