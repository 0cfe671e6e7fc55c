import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from s3_servers import Bucket

from tlrunner.config import TrainConfig, TrialConfig
from tlrunner.errors import StorageError, UnavailableError
from tlrunner.train.checkpoint import committed, verify_commit, write_checkpoint
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import EpochReport, TrialDir, TrialRecord

WriteTrial = Callable[..., TrialConfig]

REPORT = EpochReport(1, 0.5, 1.0, 2.0, 50.0, 10, 20, 0.01, 1.5, "00000004-0")
LINES = [replace(REPORT, epoch=epoch, checkpoint=None) for epoch in (1, 2, 3)]


def test_reports_read_back_as_they_were_appended(tmp_path: Path, tiny_trial: TrialConfig) -> None:
    trial = TrialDir(tmp_path / "0000-abcdef")
    trial.begin(tiny_trial)
    trial.append(REPORT)
    record = trial.read()
    assert (record.trial_id, record.config) == ("0000-abcdef", tiny_trial)
    assert record.epochs == (REPORT,)


def test_a_trial_that_failed_before_it_began_is_one_that_failed(
    tmp_path: Path, tiny_trial: TrialConfig
) -> None:
    trial = TrialDir(tmp_path / "0000-abcdef")
    trial.fail(StorageError("what it was to go on from is gone"), tiny_trial)
    record = trial.read()
    assert (record.state, record.detail) == ("failed", "what it was to go on from is gone")


def test_what_is_removed_while_it_is_fetched_may_be_fetched_again(
    moto_bucket: Bucket, tmp_path: Path, tiny_trial: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = TrialDir(Place(tmp_path / "one", f"{moto_bucket.uri}/one"))
    trial.begin(tiny_trial)
    elsewhere = replace(trial.place, path=tmp_path / "other")

    def removed(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("tlrunner.train.place.download", removed)
    with pytest.raises(UnavailableError, match="was removed while it was being fetched"):
        elsewhere.fetch()


@given(st.integers(0, 2000))
def test_wherever_a_kill_tears_the_metrics_every_whole_line_is_read(
    tmp_path_factory: pytest.TempPathFactory, num_bytes: int
) -> None:
    trial = TrialDir(tmp_path_factory.mktemp("torn"))
    trial.begin(TrialConfig(train=TrainConfig(epochs=3)))
    for report in LINES:
        trial.append(report)
    path = trial.path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:num_bytes])
    record = trial.read()
    assert record.epochs == tuple(LINES[: whole[:num_bytes].count(b"\n")])
    assert record.state == ("completed" if len(record.epochs) == 3 else "interrupted")


@pytest.mark.parametrize(
    ("val_accs", "end", "state", "is_settled"),
    [
        ([], None, "interrupted", False),
        ([0.5], None, "interrupted", False),
        ([0.5, 0.6], None, "completed", True),
        ([0.5], "stopped", "stopped", True),
        ([0.5], "diverged", "diverged", True),
        ([], "diverged", "diverged", True),
        ([0.5, 0.6], "failed", "failed", False),
    ],
)
def test_a_directory_tells_how_its_trial_ended(
    tmp_path: Path,
    write_trial: WriteTrial,
    val_accs: list[float],
    end: str | None,
    state: str,
    is_settled: bool,
) -> None:
    write_trial(tmp_path, val_accs, end, detail="because")
    record = TrialDir(tmp_path).read()
    assert (record.state, record.is_settled) == (state, is_settled)
    assert record.detail == ("because" if end else "")


@given(st.lists(st.floats(0, 1), max_size=6))
def test_the_best_epoch_is_the_first_with_the_highest_accuracy(val_accs: list[float]) -> None:
    epochs = tuple(
        replace(REPORT, epoch=epoch, val_acc=val_acc)
        for epoch, val_acc in enumerate(val_accs, start=1)
    )
    best = TrialRecord("0000-abcdef", TrialConfig(), epochs, "completed", "").best
    assert best == (epochs[val_accs.index(max(val_accs))] if epochs else None)


def test_a_figure_that_is_no_number_is_not_written(tmp_path: Path, write_trial: WriteTrial) -> None:
    write_trial(tmp_path, [0.5])
    with pytest.raises(ValueError, match="JSON"):
        TrialDir(tmp_path).append(replace(REPORT, epoch=2, val_loss=math.nan))
    assert len(TrialDir(tmp_path).read().epochs) == 1


def test_metrics_that_cannot_be_written_are_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written"):
        TrialDir(tmp_path / "absent").append(REPORT)


def test_a_config_that_is_torn_is_not_read(tmp_path: Path, write_trial: WriteTrial) -> None:
    write_trial(tmp_path, [0.5])
    path = tmp_path / "config.json"
    path.write_text(path.read_text()[:-5])
    with pytest.raises(StorageError, match=r"config\.json cannot be read"):
        TrialDir(tmp_path).read()


@pytest.mark.slow
def test_the_weights_of_the_best_epoch_are_kept_without_a_look_at_any(
    moto_bucket: Bucket, tiny_trial: TrialConfig, tmp_path: Path
) -> None:
    uri = f"{moto_bucket.uri}/trials/0000-abcdef"
    trial = TrialDir(Place(tmp_path / "there" / "0000-abcdef", uri))
    trial.begin(tiny_trial)
    for step in (4, 8):
        some = {"weight": torch.ones(3)}
        trial.keep(write_checkpoint(trial.checkpoints, step, some, {}, training_state=some))
    trial.append(replace(REPORT, checkpoint="00000004-0"))

    here = TrialDir(Place(tmp_path / "here" / "0000-abcdef", uri))
    here.place.fetch(without_suffix=".safetensors")
    here.keep_weights()
    assert not list(here.path.rglob("*.safetensors"))
    here.place.fetch()
    (checkpoint,) = here.checkpoints.iterdir()
    assert checkpoint.name == "00000004-0"
    assert sorted(committed(checkpoint)) == ["state.json", "trainable.safetensors"]
    assert not (checkpoint / "state.safetensors").exists()
    verify_commit(checkpoint)
