"""The jobs on shards in S3, with their results there too; on two servers, so slow."""

import csv
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from s3_servers import Bucket

import tlrunner
from tlrunner.cli import run_job
from tlrunner.data.dataset import open_dataset
from tlrunner.data.fetch import open_store
from tlrunner.data.s3 import S3Store
from tlrunner.errors import StorageError
from tlrunner.files import sha256_file
from tlrunner.jobconfig import JobConfig, PredictJob, PrepareJob, TrainJob
from tlrunner.train.place import LEASE
from tlrunner.train.trial_dir import EpochReport

pytestmark = pytest.mark.slow
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def shards(s3_bucket: Bucket, colour_folder: Path, tmp_path: Path) -> str:
    """The coloured images as shards in S3."""
    flags = ["--data", str(colour_folder), "--out", f"{s3_bucket.uri}/images", "--name", "colours"]
    assert run_job("prepare_images", PrepareJob, "tlrunner.run:prepare_images", argv=flags) == 0
    return f"{s3_bucket.uri}/images/colours"


@pytest.fixture
def job(
    s3_bucket: Bucket, shards: str, tiny_tree: dict[str, Any], tmp_path: Path
) -> Callable[..., int]:
    """`job(kind, *flags)`: train or tune on the shards, as run `mine` below s3://BUCKET/runs."""

    def run(kind: str, *flags: str, cache: str = "cache", **sections: Any) -> int:
        data = {**tiny_tree["data"], "uri": shards, "cache_dir": str(tmp_path / cache)}
        config = tmp_path / f"{kind}.json"
        config.write_text(json.dumps({**tiny_tree, "data": data, **sections}))
        given = ["--config", str(config), "--out", f"{s3_bucket.uri}/runs", "--name", "mine"]
        config_class = TrainJob if kind == "train" else JobConfig
        return run_job(kind, config_class, f"tlrunner.run:{kind}", argv=[*given, *flags])

    return run


def names_in(uri: str) -> set[str]:
    return {entry.name for entry in open_store(uri).list()}


def json_at(uri: str, name: str) -> Any:
    return json.loads(open_store(uri).read(name))


def test_a_trial_reads_shards_from_s3_and_leaves_its_run_there(
    job: Callable[..., int],
    s3_bucket: Bucket,
    tmp_path: Path,
    colour_folder: Path,
    capsys: Captured,
) -> None:
    run = f"{s3_bucket.uri}/runs/mine"
    assert job("train") == 0
    assert f"model: {run}/best" in capsys.readouterr().out
    tops = {name.split("/")[0] for name in names_in(run)}
    assert tops == {
        *(".lease.json", "run.json", "trials", "best", "leaderboard.csv"),
        *("summary.json", "report.html", "_SUCCESS"),
    }
    for name, facts in json_at(run, "_SUCCESS").items():
        copy = tmp_path / "copy"
        copy.write_bytes(open_store(run).read(name))
        assert facts == {"num_bytes": copy.stat().st_size, "sha256": sha256_file(copy)}
    (checkpoint,) = {n.rpartition("/")[0] for n in names_in(run) if "/checkpoints/" in n}
    assert f"{checkpoint}/COMMIT.json" in names_in(run)

    # -- The same command on another machine: nothing is computed, nothing changes -----------------
    before = names_in(run)
    assert job("train", cache="elsewhere") == 0
    assert f"run {run} is finished already" in capsys.readouterr().out
    assert names_in(run) == before

    # -- The model is used from there --------------------------------------------------------------
    assert tlrunner.load(f"{run}/best", cache_dir=tmp_path / "models").labels[0] == "blue"
    flags = ["--model", f"{run}/best", "--data", f"{s3_bucket.uri}/images/colours"]
    flags += ["--out", f"{s3_bucket.uri}/predictions", "--name", "p"]
    flags += ["--set", f"data.cache_dir={tmp_path / 'third'}"]
    predict = "tlrunner.predict:predict"
    assert run_job("predict", PredictJob, predict, needs_model=True, argv=flags) == 0
    metrics = json_at(f"{s3_bucket.uri}/predictions/p", "metrics.json")
    best = json_at(run, "summary.json")["best"]
    assert metrics["by_split"]["val"]["accuracy"] == best["val_acc"]
    assert "predictions.parquet" in names_in(f"{s3_bucket.uri}/predictions/p")


@pytest.mark.parametrize("s3_bucket", ["rclone_bucket"], indirect=True)
def test_shards_on_the_disk_streamed_and_in_s3_give_the_same_model(
    job: Callable[..., int], s3_bucket: Bucket
) -> None:
    accs = []
    for name, flags in {
        "kept": ("--set", "data.decoded_cache=off"),
        "streamed": ("--set", "data.streaming=on"),
        "small": ("--set", "data.cache_bytes=4096"),
    }.items():
        assert job("train", "--name", name, *flags, cache=name) == 0
        run = f"{s3_bucket.uri}/runs/{name}"
        accs.append(json_at(run, "summary.json")["best"]["val_loss"])
        streaming = json_at(run, "run.json")["config"]["data"]["streaming"]
        assert streaming == ("off" if name == "kept" else "on")
    assert accs[1] == accs[2]
    assert accs[0] == pytest.approx(accs[1], rel=1e-6)  # one row group: the order is the same


def test_an_interrupted_run_goes_on_where_no_disk_knows_of_it(
    job: Callable[..., int],
    s3_bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    from tlrunner.train.place import Place

    real = Place.save

    def interrupted(place: Place, *files: Path) -> None:
        if any(file.name == "metrics.jsonl" for file in files):
            raise KeyboardInterrupt
        real(place, *files)

    monkeypatch.setattr(Place, "save", interrupted)
    assert job("train") == 75
    monkeypatch.setattr(Place, "save", real)
    run = f"{s3_bucket.uri}/runs/mine"
    assert json_at(run, "summary.json")["status"] == "interrupted"
    assert "_SUCCESS" not in names_in(run)
    capsys.readouterr()
    assert job("train", cache="another") == 0
    assert json_at(run, "summary.json")["status"] == "ok"
    assert json_at(run, "run.json")["fence"] == 2, "the second to hold it"
    assert job("train", "--set", "train.seed=3", cache="third") == 64
    assert "was begun with another config" in capsys.readouterr().err


@pytest.mark.parametrize("s3_bucket", ["moto_bucket"], indirect=True)
@pytest.mark.parametrize("kind", ["train", "tune"])
def test_a_run_that_is_taken_over_is_written_no_more(
    job: Callable[..., int],
    s3_bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    kind: str,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    store = open_store(f"{s3_bucket.uri}/runs/mine")
    assert isinstance(store, S3Store)
    taken: dict[str, str] = {}

    def etags() -> dict[str, str]:
        return {entry.name: store.read_version(entry.name)[1] for entry in store.list()}

    def take_over() -> None:
        while not any(name.endswith("/metrics.jsonl") for name in names_in(store.uri)):
            time.sleep(0.05)
        other = {"fence": 9, "holder": "process 1 on elsewhere", "token": "", "renewals": 0}
        store.write(LEASE, json.dumps(other | {"released": False}).encode())
        time.sleep(1)  # what was asked for before may still be written
        taken.update(etags())

    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(take_over)
        search = {"space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}}, "budget": {"num_trials": 8}}
        sections = {"search": search} if kind == "tune" else {}
        long = {"epochs": 1000, "batch_size": 8}
        assert job(kind, train=long, **sections) == 75
        taking.result()
    assert "run 'mine' was taken over by process 1 on elsewhere" in capsys.readouterr().err
    assert etags() == taken


@pytest.mark.parametrize("s3_bucket", ["moto_bucket"], indirect=True)
def test_the_main_job_searches_on_s3(
    job: Callable[..., int], s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    space = {"optim.lr": {"loguniform": [1e-4, 1e-2]}}
    search = {"space": space, "budget": {"num_trials": 3}, "max_concurrent_trials": 2}
    assert job("tune", search=search) == 0
    run = f"{s3_bucket.uri}/runs/mine"
    rows = list(csv.DictReader(open_store(run).read("leaderboard.csv").decode().splitlines()))
    assert [row["state"] for row in rows] == ["completed"] * 3
    for row in rows:
        trial = f"{run}/trials/{row['trial_id']}"
        lines = open_store(trial).read("metrics.jsonl").decode().splitlines()
        assert len([EpochReport(**json.loads(line)) for line in lines]) == 2
    # a trial that is lost from the store is run again, the others are not
    lost = rows[1]["trial_id"]
    store = open_store(run)
    for name in names_in(run):
        if lost in name or name in ("_SUCCESS", "best/COMMIT.json"):
            store.delete(name)
    seconds = {row["trial_id"]: row["seconds"] for row in rows}
    assert job("tune", search=search, cache="elsewhere") == 0
    again = list(csv.DictReader(open_store(run).read("leaderboard.csv").decode().splitlines()))
    assert [row["trial_id"] for row in again] == [row["trial_id"] for row in rows]
    changed = [row["trial_id"] for row in again if row["seconds"] != seconds[row["trial_id"]]]
    assert changed == [lost]


def test_bad_images_are_listed_beside_the_shards_and_in_the_run(
    s3_bucket: Bucket, colour_folder: Path, tmp_path: Path
) -> None:
    for kind in ("red", "blue"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for file in (colour_folder / kind).iterdir():
            (tmp_path / "images" / kind / file.name).write_bytes(file.read_bytes())
    (tmp_path / "images" / "red" / "bad.jpg").write_bytes(b"no image")
    flags = ["--data", str(tmp_path / "images"), "--out", s3_bucket.uri, "--name", "made"]
    allow = ["--set", "data.max_bad_fraction=0.1"]
    prepare = "tlrunner.run:prepare_images"
    assert run_job("prepare_images", PrepareJob, prepare, argv=flags) == 65
    assert names_in(f"{s3_bucket.uri}") == {"made.bad_images.parquet"}
    assert run_job("prepare_images", PrepareJob, prepare, argv=[*flags, *allow]) == 0
    listing = tmp_path / "bad.parquet"
    listing.write_bytes(open_store(f"{s3_bucket.uri}/made").read("bad_images.parquet"))
    assert pq.read_table(listing)["key"].to_pylist() == ["red/bad.jpg"]
    streamed = open_dataset(f"{s3_bucket.uri}/made", _cache(tmp_path), streamed=True)
    assert len(streamed) == 24


def _cache(directory: Path) -> Any:
    from tlrunner.data.cache import NodeCache

    return NodeCache(directory / "node", 10**8)


def test_a_fetch_that_fails_costs_no_trial(
    job: Callable[..., int], s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tlrunner.train import place

    assert job("train") == 0
    run = f"{s3_bucket.uri}/runs/mine"
    before = names_in(run)
    store, real = open_store(run), place.download
    store.delete("_SUCCESS")

    def failing(store: Any, name: str, path: Path, parts: Any) -> None:
        if name.endswith("trainable.safetensors"):
            path.write_bytes(bytes(sum(part.num_bytes for part in parts)))  # of the right size
            raise StorageError("the store is down")
        real(store, name, path, parts)

    monkeypatch.setattr(place, "download", failing)
    assert job("train", cache="another") == 73
    monkeypatch.setattr(place, "download", real)
    assert not list((tmp_path / "another").rglob("trainable.safetensors"))
    assert job("train", cache="another") == 0
    assert names_in(run) == before
    # a working copy that rotted is no reason to lose a trial either
    store.delete("_SUCCESS")
    (rotten,) = (tmp_path / "another").rglob("trials/*/checkpoints/*/trainable.safetensors")
    when = json_at(run, "summary.json")["best"]["seconds"]
    rotten.write_bytes(bytes(rotten.stat().st_size))
    assert job("train", cache="another") == 0
    assert json_at(run, "summary.json")["best"]["seconds"] == when
