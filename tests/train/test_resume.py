"""A trial that goes on from a checkpoint ends where it would have ended undisturbed."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.data.loader import Batch
from tlrunner.errors import ResourceError, StorageError
from tlrunner.train import loop as loop_module
from tlrunner.train import trial as trial_module
from tlrunner.train.between import Due
from tlrunner.train.checkpoint import read_checkpoint
from tlrunner.train.images import Images
from tlrunner.train.keeper import Keeper
from tlrunner.train.loop import Loop
from tlrunner.train.place import Place
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import EpochReport, TrialDir

TIMES = ("seconds", "images_per_second", "latency_seconds")
TIMES += ("fill_seconds", "saved_seconds", "reused_bytes")  # of the process
EVERYTHING = {
    "backbone.name": "shufflenet_v2_x0_5",
    "train.epochs": 4,
    "train.ema_decay": 0.9,
    "head.dropout": 0.2,
    "augment.mixup": 0.4,
}
CASES: dict[str, dict[str, Any]] = {
    "adamw": {**EVERYTHING, "freeze.strategy": "full"},
    "sgd": {**EVERYTHING, "freeze.strategy": "lp_ft", "freeze.head_epochs": 2}
    | {"optim.optimizer": "sgd", "optim.lr": 0.01},
    "gradual": {"freeze.strategy": "gradual", "train.epochs": 4},
}


class StoppedError(Exception):
    """What a test ends a trial with."""


def figures(reports: list[EpochReport]) -> list[dict[str, Any]]:
    return [{k: v for k, v in asdict(report).items() if k not in TIMES} for report in reports]


def stop_after(epoch: int, told: list[EpochReport]) -> Callable[[EpochReport], None]:
    def report(finished: EpochReport) -> None:
        told.append(finished)
        if finished.epoch == epoch:
            raise StoppedError

    return report


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_trial_continued_behind_any_epoch_ends_bit_for_bit_the_same(
    tiny_trial: TrialConfig, colour_images: Images, tmp_path: Path, case: str, epoch: int
) -> None:
    config = with_values(tiny_trial, CASES[case])
    whole, parts = TrialDir(tmp_path / "whole"), TrialDir(tmp_path / "parts")
    told: list[EpochReport] = []
    run_trial(config, told.append, trial_dir=whole.path, images=colour_images, num_last=4)
    again: list[EpochReport] = []
    with pytest.raises(StoppedError):
        run_trial(
            config,
            stop_after(epoch, again),
            trial_dir=parts.path,
            images=colour_images,
            num_last=4,
        )
    checkpoint = again[-1].checkpoint
    assert checkpoint is not None
    run_trial(
        config,
        again.append,
        trial_dir=parts.path,
        images=colour_images,
        resume_from=Place(parts.checkpoints / checkpoint),
        num_last=4,
    )
    assert figures(again) == figures(told) == figures(list(parts.read().epochs))
    assert again[-1].seconds > again[epoch - 1].seconds, "time goes on too"
    one, other = (
        read_checkpoint(directory.checkpoints / str(told[-1].checkpoint))[0]
        for directory in (whole, parts)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def _checkpoints_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "LOOK_STEPS", 1)
    monkeypatch.setattr(Keeper, "due", lambda keeper: Due.CHECKPOINT)


def seen_by(monkeypatch: pytest.MonkeyPatch, dies_in_steps: list[int]) -> list[list[int]]:
    """The labels and first pixels of each batch; the trial dies in the steps with these numbers."""
    seen: list[list[int]] = []
    step = Loop._step

    def stepping(loop: Loop, optimizer: Any, batch: Batch, sums: Any) -> torch.Tensor:
        if dies_in_steps and len(seen) == dies_in_steps[0]:
            dies_in_steps.pop(0)
            raise StoppedError
        trace = [*batch.labels_B.tolist(), *batch.images_BHWC.flatten(1)[:, :9].sum(1).tolist()]
        seen.append(trace)
        return step(loop, optimizer, batch, sums)

    monkeypatch.setattr(Loop, "_step", stepping)
    return seen


@pytest.mark.usefixtures("_checkpoints_in_each_step")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [[1], [4], [6], [15], [5, 6], [1, 4, 11]])
def test_a_trial_that_dies_in_any_step_goes_on_to_the_same_end(
    tiny_trial: TrialConfig,
    colour_images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    steps: list[int],
) -> None:
    config = with_values(tiny_trial, CASES[case])  # four epochs of four steps
    assert dies_and_goes_on(config, colour_images, tmp_path, monkeypatch, steps) == 16


def dies_and_goes_on(
    config: TrialConfig,
    colour_images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[int],
) -> int:
    """Check that a trial which dies in these steps ends as if it had not. Gives its steps."""
    whole, parts = TrialDir(tmp_path / "whole"), TrialDir(tmp_path / "parts")
    told: list[EpochReport] = []
    with monkeypatch.context() as patched:
        expected = seen_by(patched, [])
        run_trial(config, told.append, trial_dir=whole.path, images=colour_images)
    seen = seen_by(monkeypatch, list(steps))
    again: list[EpochReport] = []

    def go_on() -> None:
        run_trial(
            config,
            again.append,
            trial_dir=parts.path,
            images=colour_images,
            resume_from=parts.to_go_on_from(),
        )

    for _ in steps:
        with pytest.raises(StoppedError):
            go_on()
    assert len(list(parts.checkpoints.glob("*"))) <= 3, "the best and the last two"
    go_on()
    assert seen == expected, "each batch once, whatever happened"
    assert figures(again) == figures(told) == figures(list(parts.read().epochs))
    one, other = (
        read_checkpoint(directory.best_checkpoint(directory.read().best))[0]
        for directory in (whole, parts)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    return len(seen)


@pytest.mark.usefixtures("_checkpoints_in_each_step")
@pytest.mark.parametrize("step", range(20))
def test_a_trial_of_twenty_steps_that_dies_in_any_of_them_ends_bit_for_bit_the_same(
    tiny_trial: TrialConfig,
    colour_images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    config = with_values(tiny_trial, {"train.epochs": 5})  # of four steps
    assert dies_and_goes_on(config, colour_images, tmp_path, monkeypatch, [step]) == 20


@pytest.mark.usefixtures("_checkpoints_in_each_step")
def test_a_newest_checkpoint_that_rotted_or_is_torn_is_passed_over(
    tiny_trial: TrialConfig,
    colour_images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trial = TrialDir(tmp_path / "trial")
    seen_by(monkeypatch, [3])
    with pytest.raises(StoppedError):
        run_trial(tiny_trial, trial_dir=trial.path, images=colour_images)
    older, newest = sorted(trial.checkpoints.iterdir())
    assert trial.to_go_on_from() == Place(newest)
    (newest / "state.safetensors").write_bytes(b"rot")
    (trial.checkpoints / "00000009-0").mkdir()
    assert trial.to_go_on_from() == Place(older)
    (older / "COMMIT.json").unlink()
    assert trial.to_go_on_from() is None


@pytest.mark.usefixtures("_checkpoints_in_each_step")
def test_a_copy_that_dies_in_its_first_epoch_goes_on_from_a_checkpoint_of_its_own(
    tiny_trial: TrialConfig,
    colour_images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    donor, copy = TrialDir(tmp_path / "0000-abcdef"), TrialDir(tmp_path / "0001-abcdef-e1")
    told: list[EpochReport] = []
    run_trial(tiny_trial, told.append, trial_dir=donor.path, images=colour_images, num_last=2)
    seen_by(monkeypatch, [1])
    copied = Place(donor.checkpoints / str(told[0].checkpoint))
    with pytest.raises(StoppedError):
        run_trial(tiny_trial, trial_dir=copy.path, images=colour_images, resume_from=copied)
    (own,) = copy.checkpoints.iterdir()
    assert copy.to_go_on_from() == Place(own)


def test_what_was_told_behind_the_checkpoint_is_told_anew(
    tiny_trial: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    config = with_values(tiny_trial, {"train.epochs": 3})
    directory = TrialDir(tmp_path / "trial")
    told: list[EpochReport] = []
    run_trial(config, told.append, trial_dir=directory.path, images=colour_images, num_last=3)
    run_trial(
        config,
        lambda report: None,
        trial_dir=directory.path,
        images=colour_images,
        resume_from=Place(directory.checkpoints / str(told[0].checkpoint)),
        num_last=3,
    )
    assert [report.epoch for report in directory.read().epochs] == [1, 2, 3]


def test_another_trial_goes_on_from_the_weights_with_values_of_its_own(
    tiny_trial: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    donor = TrialDir(tmp_path / "donor")
    told: list[EpochReport] = []
    run_trial(tiny_trial, told.append, trial_dir=donor.path, images=colour_images, num_last=2)
    other = TrialDir(tmp_path / "other")
    again: list[EpochReport] = []
    config = with_values(tiny_trial, {"optim.lr": 0.0005})
    run_trial(
        config,
        again.append,
        trial_dir=other.path,
        images=colour_images,
        resume_from=Place(donor.checkpoints / str(told[0].checkpoint)),
        num_last=2,
    )
    assert [report.epoch for report in again] == [2]
    assert other.read().config == config
    assert other.read().state == "completed"


def test_only_the_best_and_the_newest_checkpoints_stay(
    tiny_trial: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    directory = TrialDir(tmp_path / "trial")
    config = with_values(tiny_trial, {"train.epochs": 5})
    run_trial(config, lambda r: None, trial_dir=directory.path, images=colour_images, num_last=2)
    record = directory.read()
    assert record.best is not None
    kept = {path.name for path in directory.checkpoints.iterdir()}
    newest = {report.checkpoint for report in record.epochs[-2:]}
    assert kept == newest | {record.best.checkpoint}


@pytest.mark.usefixtures("_checkpoints_in_each_step")
def test_checkpoints_of_epochs_for_others_do_not_give_way_to_those_within_epochs(
    tiny_trial: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    directory = TrialDir(tmp_path / "trial")
    told: list[str] = []

    def report(finished: EpochReport) -> None:
        told.append(str(finished.checkpoint))
        there = {path.name for path in directory.checkpoints.iterdir()}
        assert there >= set(told[-3:])
        assert finished.epoch == 4 or there - set(told), "of within the epoch"

    config = with_values(tiny_trial, {"train.epochs": 4})
    run_trial(config, report, trial_dir=directory.path, images=colour_images, num_last=3)
    assert len(told) == 4


def test_a_checkpoint_of_the_weights_alone_is_not_gone_on_from(
    tiny_trial: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    directory = TrialDir(tmp_path / "trial")
    run_trial(tiny_trial, lambda r: None, trial_dir=directory.path, images=colour_images)
    best = directory.read().best
    assert best is not None
    with pytest.raises(StorageError, match=r"holds no state\.safetensors"):
        run_trial(
            tiny_trial,
            images=colour_images,
            resume_from=Place(directory.best_checkpoint(best)),
        )


# -- Out of memory ---------------------------------------------------------------------------------


@pytest.fixture
def _small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which no more than four images are computed at once."""
    prepared = Loop.prepared

    def running_out(loop: Loop, images_BHWC: torch.Tensor) -> torch.Tensor:
        if len(images_BHWC) > 4 and loop.model.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepared(loop, images_BHWC)

    monkeypatch.setattr(Loop, "prepared", running_out)


@pytest.mark.usefixtures("_small_gpu")
def test_out_of_memory_is_tried_once_more_with_half_the_micro_batch(
    tiny_trial: TrialConfig, colour_images: Images, tmp_path: Path
) -> None:
    config = with_values(tiny_trial, {"train.batch_size": 8})
    directory = TrialDir(tmp_path / "trial")
    told: list[EpochReport] = []
    result = run_trial(config, told.append, trial_dir=directory.path, images=colour_images)
    assert (result.state, len(told)) == ("completed", 2)
    record = directory.read()
    assert record.notes == ("out of GPU memory: each batch is computed in 2 micro-batches",)
    assert record.config.train.gradient_accumulation_steps == 2
    assert record.config.train.batch_size == 8


@pytest.mark.usefixtures("_small_gpu")
@pytest.mark.parametrize("values", [{"train.batch_size": 27}])
def test_out_of_memory_twice_says_what_would_help(
    tiny_trial: TrialConfig, colour_images: Images, values: dict[str, Any]
) -> None:
    with pytest.raises(ResourceError, match=r"batch_size 27 in 2 micro-batches.*more of a GPU"):
        run_trial(with_values(tiny_trial, values), images=colour_images)


def test_out_of_memory_in_a_later_epoch_tells_no_epoch_twice(
    tiny_trial: TrialConfig, colour_images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_epoch, failed = trial_module._run_epoch, []

    def running_out(loop: Loop, reuse: Any, how: Any, epoch: int, begun: Any) -> EpochReport:
        if epoch == 1 and not failed:
            failed.append(epoch)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_epoch(loop, reuse, how, epoch, begun)

    monkeypatch.setattr(trial_module, "_run_epoch", running_out)
    told: list[EpochReport] = []
    run_trial(tiny_trial, told.append, images=colour_images)
    assert [report.epoch for report in told] == [1, 2]


# -- Before training -------------------------------------------------------------------------------


def test_the_memory_check_leaves_no_trace(tiny_trial: TrialConfig, colour_images: Images) -> None:
    from tlrunner.data.world import World
    from tlrunner.model.freeze import levels
    from tlrunner.train.beside import Beside
    from tlrunner.train.probe import check_memory

    values = {**CASES["sgd"], "head.dropout": 0.0}
    config = with_values(tiny_trial, values)
    loop, *_ = trial_module.build(config, colour_images, World(), Beside([config]))
    before = {name: t.clone() for name, t in loop.classifier.state_dict().items()}
    random = torch.get_rng_state()
    full = levels(config.freeze, len(loop.classifier.stages.names), 3)
    check_memory(loop, full, num_images=4, image_size=32)
    after = loop.classifier.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in loop.classifier.parameters())
