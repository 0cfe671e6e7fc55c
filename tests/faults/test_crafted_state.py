"""State that no tlrunner wrote: refused in one line that names it, and nothing runs or leaks out.

Each file is taken for what it is only after its kind was checked.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from crafted import Captured, Job, content_of, refused, trial_of
from rich.console import Console

import tlrunner
from tlrunner.configfile import load
from tlrunner.errors import StorageError
from tlrunner.jobconfig import JobConfig
from tlrunner.train.checkpoint import describe_file, resumable, write_commit
from tlrunner.train.images import Images
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import TrialDir
from tlrunner.tune.rank import with_best_backbones

NO_STATE = {
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "a torn map": b'{"state": ',
    "another map": b'{"epoch": {}, "status": [], "state": 7, "config_hash": null, "data": []}',
    "nested deeply": b"[" * 100_000,
    "bytes": b"\x80\x04\x95\xff\xfe",
}


def test_a_run_that_was_broken_off_goes_on(train_job: Job, broken_off: Path) -> None:
    assert TrialDir(trial_of(broken_off)).to_go_on_from() is not None
    assert train_job() == 0
    assert [e.epoch for e in TrialDir(trial_of(broken_off)).read().epochs] == [1, 2]


# -- Files that hold something else ----------------------------------------------------------------


@pytest.mark.parametrize("content", NO_STATE)
@pytest.mark.parametrize("name", ["run.json", "config.json", "metrics.jsonl", "end.json"])
def test_a_state_file_of_another_kind_is_named(
    train_job: Job, broken_off: Path, capsys: Captured, name: str, content: str
) -> None:
    parent = broken_off if name == "run.json" else trial_of(broken_off)
    end = b"\n" if name == "metrics.jsonl" else b""  # or it would be a line that a kill tore
    (parent / name).write_bytes(NO_STATE[content] + end)
    before = content_of(broken_off / "trials")
    refused(train_job, capsys, str(parent / name))
    assert content_of(broken_off / "trials") == before


@pytest.mark.parametrize("name", ["run.json", "config.json", "metrics.jsonl", "end.json"])
def test_a_state_file_beyond_all_measure_is_not_read(
    train_job: Job, broken_off: Path, capsys: Captured, name: str
) -> None:
    parent = broken_off if name == "run.json" else trial_of(broken_off)
    os.truncate(os.open(parent / name, os.O_RDWR | os.O_CREAT), 1 << 40)
    assert "1,099,511,627,776 bytes; valid: at most" in refused(
        train_job, capsys, str(parent / name)
    )


@pytest.mark.parametrize("content", NO_STATE)
def test_a_finished_run_whose_summary_is_another_is_refused(
    train_job: Job, finished: Path, capsys: Captured, content: str
) -> None:
    (finished / "summary.json").write_bytes(NO_STATE[content])
    before = content_of(finished)
    refused(train_job, capsys, str(finished / "summary.json"))
    assert content_of(finished) == before


def test_a_finished_run_without_its_summary_is_refused(
    train_job: Job, finished: Path, capsys: Captured
) -> None:
    (finished / "summary.json").unlink()
    before = content_of(finished)
    refused(train_job, capsys, "summary.json does not read back as it was written")
    assert content_of(finished) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 0},
        {"epoch": "one"},
        {"val_acc": None},
        {"val_loss": float("nan")},
        {"val_loss": float("inf")},
        {"checkpoint": 7},
        {"checkpoint": "../../../../etc"},
        {"checkpoint": "/etc"},
        {"checkpoint": ".."},
        {"checkpoint": "00000004-0/../../.."},
        {"checkpoint": "00000004-0\n"},
        {"checkpoint": None},
    ],
    ids=str,
)
def test_figures_that_no_trial_has_are_refused(
    train_job: Job, broken_off: Path, capsys: Captured, changes: dict[str, Any]
) -> None:
    metrics = trial_of(broken_off) / "metrics.jsonl"
    metrics.write_text(json.dumps({**json.loads(metrics.read_text()), **changes}) + "\n")
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be read"):
        trial = TrialDir(metrics.parent)
        trial.best_checkpoint(trial.read().epochs[0])
    if changes != {"checkpoint": None}:  # which an epoch that is not the best may have
        refused(train_job, capsys, str(metrics))


def test_a_ranking_of_another_kind_is_refused(
    tmp_path: Path, colour_images: Images, job_config: Path
) -> None:
    space = {"backbone.name": {"choice": ["squeezenet1_0", "squeezenet1_1"]}}
    tree = {**json.loads(job_config.read_text()), "search": {"space": space, "rank": {"keep": 1}}}
    (tmp_path / "job.json").write_text(json.dumps(tree))
    job = load(JobConfig, str(tmp_path / "job.json"))
    scores = {"log_me": 1.0, "h_score": 1.0, "ridge_accuracy": 1.0, "seconds": 1.0}
    others = [
        {"backbones": [{"name": "squeezenet1_1", "is_kept": True}]},
        {"backbones": [{"name": "another", "is_kept": True, **scores}]},
        {"backbones": []},
    ]
    for content in (*NO_STATE.values(), *(json.dumps(other).encode() for other in others)):
        (tmp_path / "rank.json").write_bytes(content)
        with pytest.raises(StorageError, match=r"rank\.json cannot be read"):
            with_best_backbones(job, colour_images, Place(tmp_path), None, Console(quiet=True))


# -- Checkpoints whose commit was made anew --------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    path: Path

    def put(self, name: str, content: bytes) -> None:
        (self.path / name).write_bytes(content)
        write_commit(self.path)


@pytest.fixture
def checkpoint(broken_off: Path) -> Checkpoint:
    (path,) = (trial_of(broken_off) / "checkpoints").iterdir()
    return Checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        *NO_STATE.values(),
        b"{}",
        b'{"step": 1, "epoch": -1, "seconds": 1}',
        b'{"step": 1, "epoch": 1, "seconds": NaN}',
        b'{"step": 1, "epoch": 1, "seconds": 1, "begun": {"num_batches": "x"}}',
        b'{"step": 1, "epoch": 1, "seconds": 1, "begun": [[]]}',
        b'{"step": 1, "epoch": 1, "seconds": 1, "ema_steps": {}}',
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_checkpoint_whose_state_is_another_is_refused(
    train_job: Job, checkpoint: Checkpoint, capsys: Captured, content: bytes
) -> None:
    checkpoint.put("state.json", content)
    refused(train_job, capsys, str(checkpoint.path / "state.json"))


def test_a_checkpoint_of_more_epochs_than_were_told_is_passed_over(
    train_job: Job, broken_off: Path, checkpoint: Checkpoint
) -> None:
    state = json.loads((checkpoint.path / "state.json").read_text())
    checkpoint.put("state.json", json.dumps({**state, "epoch": 99}).encode())
    assert train_job() == 0
    assert [e.epoch for e in TrialDir(trial_of(broken_off)).read().epochs] == [1, 2]


@pytest.mark.parametrize("content", [*NO_STATE.values(), b'{"x": {}}', b'{"x": [1, 2]}'])
def test_a_checkpoint_whose_commit_cannot_be_read_does_not_exist(
    train_job: Job, checkpoint: Checkpoint, content: bytes
) -> None:
    (checkpoint.path / "COMMIT.json").write_bytes(content)
    assert train_job() == 0


@pytest.mark.parametrize("root", ["..", ""])
def test_a_commit_vouches_for_nothing_elsewhere(checkpoint: Checkpoint, root: str) -> None:
    outside = checkpoint.path.parent / "outside"
    outside.write_text("x")
    commit = {f"{root}/outside" if root else str(outside): asdict(describe_file(outside))}
    (checkpoint.path / "COMMIT.json").write_text(json.dumps(commit))
    assert resumable(checkpoint.path.parent, 9) is None


@pytest.mark.parametrize("content", NO_STATE)
@pytest.mark.parametrize("name", ["labels.json", "preprocess.json", "trial.json", "COMMIT.json"])
def test_a_model_of_another_kind_is_refused(finished: Path, name: str, content: str) -> None:
    best = finished / "best"
    (best / name).write_bytes(NO_STATE[content])
    if name != "COMMIT.json":
        write_commit(best)
    with pytest.raises(StorageError, match=rf"{name} cannot be read"):
        tlrunner.load(best)


def test_a_model_with_labels_of_another_number_is_refused(finished: Path) -> None:
    (finished / "best" / "labels.json").write_text('["a", "b"]')
    write_commit(finished / "best")
    with pytest.raises(StorageError, match=r"model\.safetensors cannot be read: .*size mismatch"):
        tlrunner.load(finished / "best")
