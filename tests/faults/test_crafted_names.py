"""Names that would lead elsewhere: nothing outside a run is read as state, written or removed."""

from pathlib import Path

import pytest
from crafted import Captured, Job, content_of, refused, trial_of

from tlrunner.data.fetch import open_store
from tlrunner.data.store import Entry
from tlrunner.errors import StorageError
from tlrunner.train.place import Place


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
