import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tlrunner.cli import main, run_job
from tlrunner.data.dataset import open_dataset
from tlrunner.errors import ConfigError, DataError, ResourceError, StorageError
from tlrunner.jobconfig import PredictJob, TrainJob

Captured = pytest.CaptureFixture[str]


def run(*argv: str, job: Callable[..., int] | None = None, **options: Any) -> int:
    """A job through its flags; `job` is what it does."""
    return run_job("train", TrainJob, job or (lambda *_: 0), argv=list(argv), **options)


def failing(error: BaseException) -> Callable[..., int]:
    def job(*_: object) -> int:
        raise error

    return job


# -- Jobs ------------------------------------------------------------------------------------------


def test_a_job_gets_its_config_its_name_and_whether_to_show_only() -> None:
    seen = []

    def job(config: TrainJob, name: str, console: object, dry_run: bool) -> int:
        seen.append((config, name, dry_run))
        return 3

    flags = ["--data", "DIR", "--out", "runs2", "--name", "mine", "--set", "optim.lr=1e-3"]
    assert run(*flags, "--set", "train.epochs=2", "--dry-run", job=job) == 3
    config, name, dry_run = seen[0]
    assert (config.data.uri, config.output.uri, config.output.name) == ("DIR", "runs2", "mine")
    assert (config.optim.lr, config.train.epochs) == (0.001, 2)
    assert (name, dry_run) == ("train", True)


def test_a_job_that_needs_a_model_gets_it_and_no_other_has_the_flag() -> None:
    seen: list[str] = []

    def job(config: PredictJob, model: str, *_: object) -> int:
        seen.append(model)
        return 0

    assert run_job("predict", PredictJob, job, needs_model=True, argv=["--model", "RUN/best"]) == 0
    assert seen == ["RUN/best"]
    with pytest.raises(SystemExit, match="64"):
        run_job("predict", PredictJob, job, needs_model=True, argv=[])
    with pytest.raises(SystemExit, match="64"):
        run("--model", "RUN/best")


def test_the_default_config_gives_way_to_a_given_one(tmp_path: Path) -> None:
    shipped, given = tmp_path / "shipped.yaml", tmp_path / "given.yaml"
    shipped.write_text("train: {epochs: 7}\n")
    given.write_text("optim: {lr: 0.5}\n")
    seen = []

    def job(config: TrainJob, *_: object) -> int:
        seen.append((config.train.epochs, config.optim.lr))
        return 0

    run(job=job, default_config=shipped)
    run("--config", str(given), job=job, default_config=shipped)
    assert seen == [(7, TrainJob().optim.lr), (TrainJob().train.epochs, 0.5)]


@pytest.mark.parametrize("flags", [["--nme", "x"], ["--dry"], ["stray"], ["--set"]])
def test_wrong_flags_are_a_wrong_config(flags: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*flags)
    assert caught.value.code == 64
    assert "usage: train.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("found", "valid", "remedy"), 64),
        (DataError("found", "valid", "remedy"), 65),
        (ResourceError("found", "valid", "remedy"), 69),
        (StorageError("found", "valid", "remedy"), 73),
    ],
)
def test_an_error_for_a_user_is_one_line_and_its_exit_code(
    error: Exception, code: int, capsys: Captured
) -> None:
    assert run(job=failing(error)) == code
    captured = capsys.readouterr()
    assert captured.err == "tlrunner: found; valid: valid; remedy\n"
    assert captured.out == ""


def test_a_traceback_is_shown_where_it_is_asked_for(capsys: Captured) -> None:
    run("--set", "log.level=debug", job=failing(DataError("found")))
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_bug_is_a_line_and_where_it_happened(capsys: Captured) -> None:
    assert run(job=failing(ZeroDivisionError("division by zero"))) == 70
    said = capsys.readouterr().err
    assert said.startswith("tlrunner: unexpected ZeroDivisionError: division by zero\nTraceback")


def test_ctrl_c_and_sigterm_end_a_job_as_interrupted(capsys: Captured) -> None:
    def terminated(*_: object) -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    for job in (failing(KeyboardInterrupt()), terminated):
        assert run(job=job) == 75
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_has_seen_enough_is_no_error(capsys: Captured) -> None:
    assert run(job=failing(BrokenPipeError())) == 0
    assert capsys.readouterr().err == ""


def test_a_wrong_key_is_answered_before_the_job_is_imported(capsys: Captured) -> None:
    assert run("--set", "optim.lrr=1", job="no.such.module:job") == 64
    assert "unknown key 'optim.lrr'" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(Path(__file__).parents[1].glob("jobs/*.yaml")), ids=str)
def test_every_shipped_config_is_valid(file: Path) -> None:
    from tlrunner.jobconfig import JobConfig

    assert run_job("tune", JobConfig, lambda *_: 0, argv=["--config", str(file)]) == 0


# -- The tlrunner command --------------------------------------------------------------------------


def test_backbones_are_listed_by_part_of_their_name(capsys: Captured) -> None:
    assert main(["backbones", "squeezenet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"squeezenet1_0", "squeezenet1_1"} <= set(lines)
    assert all("squeezenet" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["head"], "head, 5 classes: 2,565 of 11,179,077 parameters train"),
        (["last_stages", "--num-stages", "1"], "last_stages 1, 5 classes: 8,396,293 of 11,179,077"),
        (["full"], "full, 5 classes: 11,179,077 of 11,179,077 parameters train (100.0%)"),
        (["lp_ft"], "lp_ft 1, 5 classes: 2,565 of"),
        (["lp_ft", "--epoch", "1"], "lp_ft 1, 5 classes: 11,179,077 of"),
    ],
)
def test_an_audit_says_what_a_strategy_trains(
    arguments: list[str], sentence: str, capsys: Captured
) -> None:
    assert main(["freeze", "resnet18", *arguments]) == 0
    out = capsys.readouterr().out
    assert sentence in out
    for stage in ("stem", "layer1", "layer4", "head"):
        assert stage in out


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["resnet19", "head"], ["'resnet19'", "did you mean resnet1"]),
        (["resnet18", "headd"], ["strategy is 'headd'", "last_stages"]),
        (["resnet18", "head", "--num-stages", "2"], ["'num_stages' is not used with"]),
        (["resnet18", "last_stages", "--num-stages", "6"], ["resnet18 has 5 stages", "1..5"]),
    ],
)
def test_an_audit_of_what_cannot_be_is_a_config_error(
    arguments: list[str], fragments: list[str], capsys: Captured
) -> None:
    assert main(["freeze", *arguments]) == 64
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    for fragment in fragments:
        assert fragment in err


def test_shards_are_written_by_the_command_as_by_the_job(
    colour_folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    flags = ["--data", str(colour_folder), "--out", str(tmp_path), "--name", "made"]
    assert main(["shard", *flags, "--set", "shards.max_side=20"]) == 0
    assert "36 images of 3 classes in 1 shards, 0 unusable" in capsys.readouterr().out
    assert (open_dataset(tmp_path / "made").sizes_N2 == 20).all()
    with pytest.raises(SystemExit, match="64"):
        main(["shard", "--max-side", "20"])
    assert "usage: tlrunner shard" in capsys.readouterr().err
