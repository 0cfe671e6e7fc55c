import datetime
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.config import TrialConfig
from tlrunner.configfile import config_hash, load
from tlrunner.errors import ConfigError, DataError, InterruptedRun, StorageError
from tlrunner.jobconfig import JobConfig, OutputConfig
from tlrunner.report.rundir import RunDir, begun_run, check_empty, find_run, place_for

WriteTrial = Callable[..., TrialConfig]


def job_in(directory: Path, *assignments: str, name: str = "mine") -> JobConfig:
    flags = {"output.uri": str(directory), "output.name": name}
    return load(JobConfig, None, assignments, flags)


def begin(job: JobConfig) -> RunDir:
    with begun_run(find_run(job, job.output, "tune"), job, "abc") as (run, _):
        return run


def test_a_new_run_says_what_it_is(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    run = begin(job)
    said = json.loads((run.path / "run.json").read_text())
    assert run.path == tmp_path / "mine"
    assert said["run"] == "mine"
    assert said["config_hash"] == run.config_hash == config_hash(job)
    assert JobConfig.model_validate(said["config"]) == job
    assert said["data"] == {"manifest_sha256": "abc"}
    assert {"python", "tlrunner", "torch", "ray"} <= said["versions"].keys()


def test_the_same_config_continues_a_run_also_with_other_resources(tmp_path: Path) -> None:
    run = begin(job_in(tmp_path))
    elsewhere = job_in(tmp_path, "resources.cpus_per_worker=4", "log.level=debug")
    assert find_run(elsewhere, elsewhere.output, "tune") == run


def test_another_config_under_the_same_name_is_refused(tmp_path: Path) -> None:
    begin(job_in(tmp_path))
    other = job_in(tmp_path, "train.seed=1")
    with pytest.raises(ConfigError, match=r"run 'mine'.*another config.*choose another --name"):
        find_run(other, other.output, "tune")


def test_a_run_that_is_only_looked_for_leaves_no_trace(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    run = find_run(job, job.output, "tune")
    assert not run.path.exists()
    assert not run.is_finished


def test_runs_without_a_name_are_numbered(tmp_path: Path) -> None:
    job = JobConfig(output=OutputConfig(uri=str(tmp_path)))
    names = [begin(job).path.name for _ in range(3)]
    before, _, number = names[0].rpartition("-")
    assert before.startswith("tune-")
    assert datetime.date.fromisoformat(before.removeprefix("tune-"))
    assert (number, names[1:]) == ("1", [f"{before}-2", f"{before}-3"])


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    job = job_in(tmp_path / "file")
    with pytest.raises(StorageError, match=r"file cannot be written"):
        find_run(job, job.output, "tune")


def test_a_place_for_results_is_empty(tmp_path: Path) -> None:
    output = OutputConfig(uri=str(tmp_path / "runs"), name="mine")
    place = place_for(output, "predict")
    assert place.path == tmp_path / "runs" / "mine"
    assert not place.path.exists()
    check_empty(place)
    place.path.mkdir()
    check_empty(place)
    (place.path / "notes.txt").write_text("not to be lost")
    with pytest.raises(StorageError, match=r"mine holds something already; choose another --name"):
        check_empty(place)
    (tmp_path / "runs" / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file holds something already"):
        check_empty(place_for(output.model_copy(update={"name": "file"}), "predict"))


def test_a_place_without_a_name_is_numbered(tmp_path: Path) -> None:
    output = OutputConfig(uri=str(tmp_path))
    for number in (1, 2):
        place = place_for(output, "predict")
        assert place.path.name == f"predict-{datetime.date.today().isoformat()}-{number}"
        place.path.mkdir()


def test_a_place_where_nothing_can_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file cannot be written"):
        place_for(OutputConfig(uri=str(tmp_path / "file")), "predict")


def test_a_place_of_an_unknown_kind_is_refused() -> None:
    output = OutputConfig(uri="gs://bucket/runs", name="mine")
    with pytest.raises(StorageError, match=r"'gs://' is no place; valid: a path, .*s3://"):
        find_run(JobConfig(output=output), output, "tune")


def test_a_file_uri_is_a_directory(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    output = OutputConfig(uri=f"file://{tmp_path}", name="mine")
    assert find_run(job, output, "tune").path == tmp_path / "mine"


def test_what_ended_is_kept_and_the_rest_is_cleared_to_run_again(
    tmp_path: Path, write_trial: WriteTrial
) -> None:
    job = job_in(tmp_path)
    run = begin(job)
    write_trial(run.trials / "0000-completed", [0.5, 0.6])
    write_trial(run.trials / "0001-stopped", [0.5], "stopped")
    write_trial(run.trials / "0002-diverged", [], "diverged")
    write_trial(run.trials / "0003-failed", [0.5], "failed")
    write_trial(run.trials / "0004-interrupted", [0.5])
    with begun_run(run, job, "abc") as (_, ended):
        assert {record.state for record in ended} == {"completed", "stopped", "diverged"}
    kept = {path.name for path in run.trials.iterdir()}
    assert kept == {"0000-completed", "0001-stopped", "0002-diverged"}


def test_what_never_began_is_cleared_as_well(tmp_path: Path, write_trial: WriteTrial) -> None:
    job = job_in(tmp_path)
    run = begin(job)
    write_trial(run.trials / "0000-completed", [0.5, 0.6])
    (run.trials / "0001-aaaaaa").mkdir()  # killed before its config.json was there
    (run.trials / "0001-aaaaaa" / ".config.json.1.tmp").write_text("{")
    begin(job)
    assert [path.name for path in run.trials.iterdir()] == ["0000-completed"]


def test_a_trial_whose_best_checkpoint_is_damaged_runs_again(
    tmp_path: Path, write_trial: WriteTrial
) -> None:
    job = job_in(tmp_path)
    run = begin(job)
    write_trial(run.trials / "0000-whole", [0.5, 0.6])
    write_trial(run.trials / "0001-rotten", [0.5, 0.6])
    (state,) = (run.trials / "0001-rotten").glob("checkpoints/*/state.json")
    state.write_text(state.read_text().replace("4", "5"))
    begin(job)
    assert [path.name for path in run.trials.iterdir()] == ["0000-whole"]


def test_a_run_is_written_by_one_process(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    refused = pytest.raises(InterruptedRun, match=r"is being written by process \d+ on")
    with begun_run(find_run(job, job.output, "tune"), job, "abc"), refused:
        begin(job)
    assert begin(job).path == tmp_path / "mine"


def test_two_runs_without_a_name_never_share_a_directory(tmp_path: Path) -> None:
    job = JobConfig(output=OutputConfig(uri=str(tmp_path)))
    first, second = (find_run(job, job.output, "tune") for _ in range(2))
    assert first == second
    with begun_run(first, job, "abc") as (one, _), begun_run(second, job, "abc") as (other, _):
        assert one.path != other.path


def test_a_run_is_not_continued_on_other_images(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    run = begin(job)
    changed = begun_run(run, job, "def")
    with pytest.raises(DataError, match="the images changed since run 'mine' was begun"), changed:
        pass


def test_a_directory_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine" / "trials" / "precious").mkdir(parents=True)
    job = job_in(tmp_path)
    with pytest.raises(ConfigError, match=r"holds trials and no run\.json"):
        find_run(job, job.output, "tune")
    assert (tmp_path / "mine" / "trials" / "precious").is_dir()


figures = st.lists(
    st.none() | st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.1, 2.0])),
    min_size=1,
    max_size=6,
)


@given(figures)
def test_trials_are_ranked_by_accuracy_then_loss_then_id(
    tmp_path_factory: pytest.TempPathFactory,
    write_trial: WriteTrial,
    figures: list[tuple[float, float] | None],
) -> None:
    run = RunDir(tmp_path_factory.mktemp("run"), "")
    for number, figure in enumerate(figures):
        val_acc, val_loss = figure or (None, 1.0)
        accs = [] if val_acc is None else [val_acc]
        write_trial(run.trials / f"{number:04d}-a", accs, val_loss=val_loss)
    ranked = [int(record.trial_id[:4]) for record in run.records()]
    known = [number for number in range(len(figures)) if figures[number]]
    known.sort(key=lambda number: (-figures[number][0], figures[number][1], number))
    unknown = [number for number in range(len(figures)) if not figures[number]]
    assert ranked == [*known, *unknown]


def test_a_run_without_trials_has_no_records(tmp_path: Path) -> None:
    assert RunDir(tmp_path, "").records() == []


def test_a_run_that_was_finished_meanwhile_is_not_begun_again(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    run = find_run(job, job.output, "tune")
    (begin(job).path / "_SUCCESS").write_text("{}")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(InterruptedRun, match="was just finished by another process"):
        begun_run(run, job, "abc").__enter__()
    lease = run.path / ".lease.json"
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert before.pop(lease) != after.pop(lease)
    assert before == after
