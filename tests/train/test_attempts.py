"""Of those who took a trial one after the other, the latest writes it, and no epoch is lost."""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from s3_servers import Bucket

from tlrunner.config import TrialConfig
from tlrunner.configfile import with_values
from tlrunner.data.s3 import S3Store
from tlrunner.errors import InterruptedRun, StorageError
from tlrunner.files import write_json
from tlrunner.train import loop as loop_module
from tlrunner.train.attempts import note_attempt, take
from tlrunner.train.between import Due
from tlrunner.train.checkpoint import write_checkpoint
from tlrunner.train.images import Images
from tlrunner.train.keeper import Keeper
from tlrunner.train.place import Place
from tlrunner.train.resume import epoch_of
from tlrunner.train.trial import run_trial
from tlrunner.train.trial_dir import EpochReport, TrialDir

REPORT = EpochReport(1, 0.5, 1.0, 2.0, 50.0, 10, 20, 0.01, 1.5, None)
WRITES: dict[str, Callable[[TrialDir, TrialConfig], object]] = {
    "begin": lambda trial, config: trial.begin(config),
    "note": lambda trial, config: trial.note("a note"),
    "attempt": lambda trial, config: note_attempt(trial.place, "halted", 3),
    "append": lambda trial, config: trial.append(replace(REPORT, epoch=2)),
    "keep": lambda trial, config: trial.keep(trial.checkpoints / "00000004-0"),
    "keep_only": lambda trial, config: trial.keep_only(None),
    "keep_weights": lambda trial, config: trial.keep_weights(),
    "end": lambda trial, config: trial.end("stopped"),
    "fail": lambda trial, config: trial.fail(RuntimeError("should be gone"), config),
}


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """The directory of a trial."""
    if request.param == "local":
        yield Place(tmp_path / "0000-abcdef")
        return
    bucket: Bucket = request.getfixturevalue("moto_bucket")
    yield Place(tmp_path / "0000-abcdef", f"{bucket.uri}/0000-abcdef")


def elsewhere(place: Place, tmp_path: Path) -> Place:
    """The same directory, as another node sees it."""
    return replace(place, path=tmp_path / "other" / place.path.name) if place.uri else place


def content_of(place: Place) -> dict[str, bytes]:
    return {entry.name: place.store.read(entry.name) for entry in place.store.list()}


@pytest.mark.parametrize("write", WRITES)
def test_who_took_a_trial_before_writes_nothing_more(
    place: Place, tmp_path: Path, tiny_trial: TrialConfig, write: str
) -> None:
    trial = pickle.loads(pickle.dumps(TrialDir(take(place))))  # noqa: S301  (as in an actor)
    trial.begin(tiny_trial)
    for name in ("COMMIT.json", "state.safetensors", "state.json"):
        write_json(trial.checkpoints / "00000004-0" / name, {})
    trial.keep(trial.checkpoints / "00000004-0")
    trial.append(replace(REPORT, checkpoint="00000004-0"))
    later = TrialDir(take(elsewhere(place, tmp_path)))
    before = content_of(place)
    with pytest.raises(InterruptedRun, match="trial 0000-abcdef was started again elsewhere"):
        WRITES[write](trial, tiny_trial)
    assert content_of(place) == before
    later.place.fetch()
    WRITES[write](later, tiny_trial)


def test_a_write_that_failed_on_the_way_is_not_repeated_once_the_trial_is_taken(
    moto_bucket: Bucket, tmp_path: Path, tiny_trial: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "0000-abcdef", f"{moto_bucket.uri}/0000-abcdef")
    trial = TrialDir(take(place))
    trial.begin(tiny_trial)

    put_well = S3Store._put

    def put(*_: object) -> None:
        monkeypatch.setattr(S3Store, "_put", put_well)
        take(elsewhere(place, tmp_path))
        raise ConnectionError

    monkeypatch.setattr(S3Store, "_put", put)
    with pytest.raises(InterruptedRun, match="trial 0000-abcdef was started again elsewhere"):
        trial.append(REPORT)
    assert place.store.size("metrics.jsonl") is None


def test_what_failed_to_be_removed_is_left_once_the_trial_is_taken(
    moto_bucket: Bucket, tmp_path: Path, tiny_trial: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "0000-abcdef", f"{moto_bucket.uri}/0000-abcdef")
    trial = TrialDir(take(place))
    write_checkpoint(trial.checkpoints, 4, {}, {"epoch": 1}, {})
    trial.keep(trial.checkpoints / "00000004-0")
    kept = content_of(place)
    object_of = S3Store._object

    def taken(store: S3Store, name: str) -> dict[str, str]:
        if name.endswith("COMMIT.json"):
            monkeypatch.setattr(S3Store, "_object", object_of)
            take(elsewhere(place, tmp_path))
            return {"Bucket": "no such bucket"}  # which botocore refuses
        return object_of(store, name)

    monkeypatch.setattr(S3Store, "_object", taken)
    monkeypatch.setattr("tlrunner.data.s3._passes", lambda error: True)
    with pytest.raises(InterruptedRun, match="trial 0000-abcdef was started again elsewhere"):
        trial.keep_only(None)
    assert kept.keys() <= content_of(place).keys()


def test_a_checkpoint_under_way_is_not_committed_once_the_trial_is_taken(tmp_path: Path) -> None:
    trial = TrialDir(take(Place(tmp_path)))

    def may_commit() -> None:
        take(Place(tmp_path))
        trial.place.checked_fence()

    with pytest.raises(InterruptedRun):
        write_checkpoint(trial.checkpoints, 4, {}, {"epoch": 0}, {}, may_commit)
    assert trial.to_go_on_from() is None


def test_what_comes_behind_the_start_is_forgotten_with_its_checkpoints(
    tmp_path: Path, tiny_trial: TrialConfig
) -> None:
    trial = TrialDir(tmp_path)
    for step in (4, 8, 9):
        write_checkpoint(trial.checkpoints, step, {}, {"epoch": step // 4}, {})
    trial.begin(tiny_trial)
    for epoch in (1, 2):
        trial.append(replace(REPORT, epoch=epoch))
    trial.begin(tiny_trial, after_epoch=1, after_step=4)
    assert [path.name for path in trial.checkpoints.iterdir()] == []
    assert [report.epoch for report in trial.read().epochs] == [1]


def test_epochs_that_are_not_one_after_the_other_are_refused(
    tmp_path: Path, tiny_trial: TrialConfig
) -> None:
    trial = TrialDir(tmp_path)
    trial.begin(tiny_trial)
    for epoch in (1, 3):
        trial.append(replace(REPORT, epoch=epoch))
    with pytest.raises(
        StorageError, match=r"metrics\.jsonl cannot be read: epoch 3 behind epoch 1"
    ):
        trial.read()


class KilledError(Exception):
    """What a SIGKILL is to a trial: nothing is written behind it."""


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_trial_killed_between_a_checkpoint_and_its_figures_tells_each_epoch(
    tiny_trial: TrialConfig,
    colour_images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    epoch: int,
) -> None:
    monkeypatch.setattr(loop_module, "LOOK_STEPS", 1)
    monkeypatch.setattr(Keeper, "due", lambda keeper: Due.CHECKPOINT)
    config = with_values(tiny_trial, {"train.epochs": 3})
    trial = TrialDir(tmp_path / "trial")

    def go_on() -> None:
        run_trial(
            config,
            lambda report: None,
            trial_dir=trial.path,
            images=colour_images,
            resume_from=trial.to_go_on_from(),
        )

    def killed(trial: TrialDir, report: EpochReport) -> None:
        if report.epoch == epoch:
            raise KilledError
        append(trial, report)

    append = TrialDir.append
    with monkeypatch.context() as patched:
        patched.setattr(TrialDir, "append", killed)
        with pytest.raises(KilledError):
            go_on()
    trial.tell_kept()
    trial.tell_kept()
    checkpoint = trial.to_go_on_from()
    assert checkpoint
    kept = min(epoch, 2)  # the last epoch leaves nothing to go on from
    assert epoch_of(checkpoint) == len(trial.read().epochs) == kept, "it is not computed again"
    go_on()
    record = trial.read()
    assert [report.epoch for report in record.epochs] == [1, 2, 3]
    assert record.state == "completed"
