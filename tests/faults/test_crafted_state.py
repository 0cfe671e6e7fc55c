"""State that no tlrunner wrote: refused in one line that names it, and nothing runs or leaks out.

Each file is taken for what it is only after its kind was checked; names lead nowhere else.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tlrunner
from tlrunner.configfile import load
from tlrunner.data.fetch import open_store
from tlrunner.data.store import Entry
from tlrunner.errors import StorageError
from tlrunner.files import sha256_file
from tlrunner.jobconfig import JobConfig
from tlrunner.train.checkpoint import describe_file, resumable, write_commit
from tlrunner.train.images import Images
from tlrunner.train.place import Place
from tlrunner.train.trial_dir import TrialDir
from tlrunner.tune.rank import with_best_backbones

Captured = pytest.CaptureFixture[str]
Job = Callable[..., int]

NO_STATE = {
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "a torn map": b'{"state": ',
    "another map": b'{"epoch": {}, "status": [], "state": 7, "config_hash": null, "data": []}',
    "nested deeply": b"[" * 100_000,
    "bytes": b"\x80\x04\x95\xff\xfe",
}


def refused(train_job: Job, capsys: Captured, named: str, *flags: str) -> str:
    """The line with which the job refuses a file by its name."""
    capsys.readouterr()
    code = train_job(*flags)
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (73, 1), lines
    assert named in lines[0]
    assert len(lines[0]) < 1000
    return lines[0]


def trial_of(run: Path) -> Path:
    (trial,) = (run / "trials").iterdir()
    return trial


def content_of(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): sha256_file(path) for path in files}


def test_a_run_that_was_broken_off_goes_on(train_job: Job, broken_off: Path) -> None:
    assert resumable(trial_of(broken_off) / "checkpoints") is not None
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
    refused(train_job, capsys, str(finished / "summary.json"))


def test_a_finished_run_without_its_summary_is_refused(
    train_job: Job, finished: Path, capsys: Captured
) -> None:
    (finished / "summary.json").unlink()
    refused(train_job, capsys, "holds no summary.json")


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


def test_a_checkpoint_of_more_epochs_than_there_are_is_refused(
    train_job: Job, checkpoint: Checkpoint, capsys: Captured
) -> None:
    state = json.loads((checkpoint.path / "state.json").read_text())
    checkpoint.put("state.json", json.dumps({**state, "epoch": 99}).encode())
    refused(train_job, capsys, "epoch 99")


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
    assert resumable(checkpoint.path.parent) is None


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


# -- Names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../mine",
        "/tmp/mine",
        "a/b",
        "..",
        ".",
        "",
        "Mine",
        "-x",
        "a b",
        "a\0b",
        "a\n",
        "ä",
        "x" * 64,
    ],
)
def test_a_name_of_a_run_is_a_plain_word(
    train_job: Job, tmp_path: Path, capsys: Captured, name: str
) -> None:
    assert train_job(f"--name={name}") == 64
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "output.name" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_of_a_run_is_taken(train_job: Job, tmp_path: Path) -> None:
    assert train_job(f"--name={'x' * 63}", "--set", "train.epochs=1") == 0
    assert (tmp_path / "runs" / ("x" * 63) / "_SUCCESS").exists()


@pytest.mark.parametrize("name", ["notes", "0000-ABC", "0000-abcdef-copy", "0000-abc def", "0-abc"])
def test_a_directory_among_the_trials_that_is_none_is_refused_and_kept(
    train_job: Job, broken_off: Path, capsys: Captured, name: str
) -> None:
    foreign = broken_off / "trials" / name
    foreign.mkdir()
    (foreign / "precious.txt").write_text("not to be lost")
    refused(train_job, capsys, repr(name))
    assert (foreign / "precious.txt").exists()


@pytest.mark.parametrize(
    "name", ["best", "trials", "trials/TRIAL", "trials/TRIAL/checkpoints", "trials/0001-abcdef"]
)
def test_a_link_that_leads_out_of_a_run_is_refused(
    train_job: Job, broken_off: Path, tmp_path: Path, capsys: Captured, name: str
) -> None:
    path = broken_off / name.replace("TRIAL", trial_of(broken_off).name)
    outside = tmp_path / "outside"
    if path.exists():
        path.rename(outside)
    else:
        outside.mkdir()
        (outside / "COMMIT.json").write_text("{}")
    path.symlink_to(outside, target_is_directory=True)
    before = content_of(outside)
    assert f"is a link to {outside}" in refused(train_job, capsys, str(path))
    assert content_of(outside) == before


@pytest.mark.parametrize("name", ["run.json", "log.txt", "summary.json", "trials/TRIAL/end.json"])
def test_a_file_that_is_a_link_out_of_a_run_is_not_written_through(
    train_job: Job, broken_off: Path, tmp_path: Path, capsys: Captured, name: str
) -> None:
    path = broken_off / name.replace("TRIAL", trial_of(broken_off).name)
    (tmp_path / "outside").write_text("precious")
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "outside")
    refused(train_job, capsys, str(path))
    assert (tmp_path / "outside").read_text() == "precious"


def test_links_to_a_run_and_within_it_are_followed(
    train_job: Job, broken_off: Path, tmp_path: Path
) -> None:
    broken_off.rename(tmp_path / "elsewhere")
    broken_off.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (broken_off / "again").symlink_to("run.json")
    assert train_job() == 0


class Listing:
    """A store that lists what names it is told."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def list(self) -> list[Entry]:
        return [Entry(name, 1) for name in self.names]


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "..", "/etc/evil", "a//evil", "./evil", "a/./evil", "a\0b"]
)
def test_a_key_of_a_bucket_does_not_lead_out_of_a_working_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tlrunner.train.place.open_store", lambda uri: Listing("run.json", name))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "precious").write_text("not to be lost")
    with pytest.raises(StorageError, match=r"s3://b/run holds '.*', which is no path below it"):
        Place(tmp_path / "copy", "s3://b/run").fetch()
    assert content_of(tmp_path).keys() == {"copy/precious"}


def test_a_store_lists_names_that_are_paths_below_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "..c").write_text("x")
    assert [entry.name for entry in open_store(str(tmp_path)).list()] == ["a/b/..c"]
