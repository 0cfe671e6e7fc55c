"""Shards in S3, through a proxy that counts requests and spoils them. Slow: they start servers."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_proxy import FaultProxy
from pictures import image_folder
from s3_servers import Bucket, use_endpoint

from tlrunner.cli import run_job
from tlrunner.data import shardfile, write
from tlrunner.data.cache import NodeCache
from tlrunner.data.dataset import open_dataset
from tlrunner.data.fetch import open_store
from tlrunner.data.s3 import Patience
from tlrunner.data.sources import open_source
from tlrunner.data.write import write_shards
from tlrunner.errors import DataError, StorageError
from tlrunner.jobconfig import TrainJob

pytestmark = pytest.mark.slow
OPEN = """
import sys
from pathlib import Path
from tlrunner.data.cache import NodeCache
from tlrunner.data.dataset import open_dataset
dataset = open_dataset(sys.argv[1], NodeCache(Path(sys.argv[2]), 10**9))
print(sum(len(dataset.image_bytes(row)) for row in range(len(dataset))))
"""


TRAIN = """
import sys
from tlrunner.config import BackboneConfig, DataConfig, ResourceConfig, TrainConfig, TrialConfig
from tlrunner.train.trial import run_trial
result = run_trial(TrialConfig(
    data=DataConfig(uri=sys.argv[1], cache_dir=sys.argv[2], image_size=32, decoded_cache="on"),
    backbone=BackboneConfig(name="squeezenet1_1", weights="none"),
    train=TrainConfig(epochs=2),
    resources=ResourceConfig(gpus_per_worker=0),
), lambda report: None)
print(result.state, result.best.val_loss)
"""


@pytest.fixture
def shards(rclone_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Several small shards, each of several row groups."""
    monkeypatch.setattr(shardfile, "ROW_GROUP_BYTES", 3000)
    monkeypatch.setattr(shardfile, "MAX_ROW_GROUP_BYTES", 4000)
    monkeypatch.setattr(write, "MIN_SHARD_BYTES", 8000)
    image_folder(tmp_path / "images", each=30)
    uri = f"{rclone_bucket.uri}/images"
    write_shards(open_source(str(tmp_path / "images")), uri)
    return uri


@pytest.fixture
def proxy(rclone_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Any:
    with FaultProxy(rclone_bucket.endpoint, {}) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)
        monkeypatch.setattr(Patience, "pause", lambda self, attempt: 0.001)
        yield proxy


@pytest.mark.parametrize("script", [OPEN, TRAIN], ids=["processes", "trials"])
def test_any_number_at_once_fetch_each_shard_once(
    shards: str, proxy: FaultProxy, tmp_path: Path, script: str
) -> None:
    command = [sys.executable, "-c", script, shards, str(tmp_path / "node")]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {reader.communicate()[0] for reader in readers}
    assert all(reader.returncode == 0 for reader in readers)
    assert len(printed) == 1
    fetched = {read: count for read, count in proxy.reads.items() if ".parquet" in read[0]}
    assert len({name for name, _ in fetched}) > 2
    assert set(fetched.values()) == {1}


@pytest.mark.parametrize("streamed", [False, True])
def test_faults_change_no_byte(
    shards: str, proxy: FaultProxy, tmp_path: Path, streamed: bool
) -> None:
    expected = open_dataset(shards, NodeCache(tmp_path / "whole", 10**9))
    proxy.rates = dict.fromkeys(("500", "503", "reset", "half", "flip"), 0.05)
    cache = NodeCache(tmp_path / "node", 10**9)
    dataset = open_dataset(shards, cache, streamed=streamed)
    rows = np.argsort(dataset.groups_N, kind="stable") if streamed else np.arange(len(dataset))
    dataset.plan(rows)
    for row in rows.tolist():
        assert dataset.image_bytes(row) == expected.image_bytes(row)
    assert sum(proxy.injected.values()) > 3


@pytest.fixture
def train(
    shards: str, tiny_tree: dict[str, Any], tmp_path: Path, rclone_bucket: Bucket
) -> Callable[..., int]:
    def job(*flags: str) -> int:
        data = {**tiny_tree["data"], "uri": shards, "cache_dir": str(tmp_path / "cache")}
        config = tmp_path / "config.json"
        config.write_text(json.dumps({**tiny_tree, "data": data}))
        given = ["--config", str(config), "--out", f"{rclone_bucket.uri}/runs", "--name", "mine"]
        return run_job("train", TrainJob, "tlrunner.run:train", argv=[*given, *flags])

    return job


def test_a_job_goes_on_through_faults_and_ends_in_one_line_where_nothing_answers(
    train: Callable[..., int],
    proxy: FaultProxy,
    capsys: pytest.CaptureFixture[str],
    rclone_bucket: Bucket,
) -> None:
    proxy.rates = {"503": 1.0}
    assert train() == 73
    (line,) = capsys.readouterr().err.splitlines()
    assert "503" in line
    assert "8 times" in line
    proxy.rates, proxy.num_spared = {"503": 1.0}, proxy.num_requests + 40
    assert train() == 73  # somewhere in the middle
    proxy.rates = dict.fromkeys(("500", "503", "reset", "half", "flip"), 0.03)
    assert train() == 0
    assert open_store(f"{rclone_bucket.uri}/runs/mine").size("_SUCCESS")
    assert proxy.injected.total() > 20


def test_a_shard_that_was_replaced_is_refused_and_named(
    shards: str, rclone_bucket: Bucket, tmp_path: Path, proxy: FaultProxy
) -> None:
    name = "images/shard-00001.parquet"
    client = rclone_bucket.client
    body = client.get_object(Bucket=rclone_bucket.name, Key=name)["Body"].read()
    client.put_object(Bucket=rclone_bucket.name, Key=name, Body=body[:-1] + b"?")
    with pytest.raises((DataError, StorageError), match=r"shard-00001\.parquet.*not those"):
        open_dataset(shards, NodeCache(tmp_path / "node", 10**9))
    client.delete_object(Bucket=rclone_bucket.name, Key=name)
    with pytest.raises(DataError, match=r"shard-00001\.parquet is not in .*the manifest lists it"):
        open_dataset(shards, NodeCache(tmp_path / "node", 10**9))
    whole = Counter(path.suffix for path in (tmp_path / "node").iterdir())
    assert whole[".new"] == 0


def test_a_cache_that_is_too_small_says_what_to_do(shards: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no room .*raise data\.cache_bytes.*streaming=on"):
        open_dataset(shards, NodeCache(tmp_path / "node", 20_000))


def test_a_place_without_a_manifest_is_no_data_set(rclone_bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        open_dataset(f"{rclone_bucket.uri}/nothing", NodeCache(tmp_path, 10**9))
    with pytest.raises(StorageError, match="there is no such bucket"):
        open_dataset("s3://no-such-bucket-at-all/x", NodeCache(tmp_path, 10**9))
