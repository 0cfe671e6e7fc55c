"""A share of the requests fails, in every way that S3 and networks do."""

import hashlib
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from fault_proxy import KINDS, FaultProxy
from s3_servers import Bucket, use_endpoint

from tlrunner.data import fetch as module
from tlrunner.data.fetch import download, fetch
from tlrunner.data.s3 import Patience, S3Store
from tlrunner.data.store import Entry, Part
from tlrunner.errors import StorageError

PART_BYTES = 1 << 20
CONTENT = random.Random(0).randbytes(40 * PART_BYTES)
PARTS = [
    Part(start, PART_BYTES, hashlib.sha256(CONTENT[start : start + PART_BYTES]).hexdigest())
    for start in range(0, len(CONTENT), PART_BYTES)
]
# seven kinds at 10 % leave 30 % of the requests unspoiled: 60 attempts fail once in 2 billion
STUBBORN = Patience(attempts=60, timeout_seconds=1.5, first_pause_seconds=0.001)
QUICK = Patience(attempts=3, timeout_seconds=0.7, first_pause_seconds=0.001)


pytestmark = pytest.mark.slow


@pytest.fixture
def big(rclone_bucket: Bucket) -> Bucket:
    rclone_bucket.client.put_object(Bucket=rclone_bucket.name, Key="big", Body=CONTENT)
    return rclone_bucket


def check_retries(store: S3Store, proxy: FaultProxy) -> None:
    """Each spoiled request was made again, and no other; a busy machine stalls by itself, too."""
    stalled = store.retries.count("the answer stalled")
    assert stalled >= proxy.injected["stall"]
    assert len(store.retries) - stalled == proxy.injected.total() - proxy.injected["stall"]


def test_a_download_through_every_fault_is_identical(
    s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="big", Body=CONTENT)
    with FaultProxy(s3_bucket.endpoint, dict.fromkeys(KINDS, 0.1)) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)
        store = S3Store(s3_bucket.name, patience=STUBBORN)
        download(store, "big", tmp_path / "big", PARTS)
        assert set(proxy.injected) == set(KINDS)
        check_retries(store, proxy)
    assert (tmp_path / "big").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", KINDS)
def test_a_tenth_of_one_fault_is_survived_with_the_usual_number_of_attempts(
    big: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    usual = Patience(timeout_seconds=3, first_pause_seconds=0.001)
    with FaultProxy(big.endpoint, {kind: 0.1}) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)
        store = S3Store(big.name, patience=usual)
        download(store, "big", tmp_path / "big", PARTS)
        assert proxy.injected[kind] > 0
        check_retries(store, proxy)
    assert (tmp_path / "big").read_bytes() == CONTENT


def test_what_is_put_and_listed_through_every_fault_is_identical(
    s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # a flipped bit in a list of names shows in nothing: that is what TLS is for
    kinds = [kind for kind in KINDS if kind != "flip"]
    contents = {f"{n:02d}": CONTENT[n << 16 : (n << 16) + 100_000] for n in range(20)}
    with FaultProxy(s3_bucket.endpoint, dict.fromkeys(kinds, 0.1)) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)
        store = S3Store(s3_bucket.name, "put", patience=STUBBORN)
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
            store.put(name, tmp_path / name)
            assert store.size(name) == len(content)
        for _ in range(30):
            assert store.list() == [Entry(name, 100_000) for name in contents]
        store.delete("00")
        check_retries(store, proxy)
        assert set(proxy.injected) == set(kinds)
    use_endpoint(monkeypatch, s3_bucket.endpoint)
    direct = S3Store(s3_bucket.name, "put")
    del contents["00"]
    assert {entry.name: direct.read(entry.name) for entry in direct.list()} == contents


def test_a_flipped_bit_in_a_whole_file_shows_by_the_checksum_it_was_put_with(
    rclone_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "whole").write_bytes(CONTENT[:100_000])
    S3Store(rclone_bucket.name).put("whole", tmp_path / "whole")
    with FaultProxy(rclone_bucket.endpoint, {"flip": 1}) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)
        store = S3Store(rclone_bucket.name, patience=QUICK)
        with pytest.raises(StorageError, match=WORDS["flip"]):
            store.read("whole")
        proxy.rates = {}
        assert store.read("whole") == CONTENT[:100_000]


VERBS: dict[str, Callable[[S3Store], object]] = {
    "list": lambda store: store.list(),
    "size": lambda store: store.size("big"),
    "read": lambda store: store.read("big", PARTS[7]),
    "put": lambda store: store.put("other", Path(__file__)),
    "delete": lambda store: store.delete("other"),
}
WORDS = {
    "500": "(HTTP 500)",
    "503": "(HTTP 503)",
    "reset": "the connection broke",
    "lost": "the connection broke",
    "half": "the connection broke",
    "stall": "the answer stalled",
    "flip": "its bytes are not those that were written",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_does_not_end_is_one_line_after_the_last_attempt(
    big: Bucket, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # only a body can be halved or flipped
    verbs = ["read"] if kind in ("half", "flip") else [*VERBS]
    with FaultProxy(big.endpoint, {kind: 1}) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)
        for number, verb in enumerate(verbs, start=1):
            store = S3Store(big.name, patience=QUICK)
            with pytest.raises(StorageError) as caught:
                VERBS[verb](store)
            assert f"{WORDS[kind]}, 3 times" in str(caught.value)
            assert proxy.injected[kind] == proxy.num_requests == 3 * number
            assert len(store.retries) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_download_leaves_nothing_and_the_next_one_succeeds(
    big: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.setattr(module, "S3Store", partial(S3Store, patience=QUICK))
    monkeypatch.setattr(module, "RANGE_BYTES", PART_BYTES)
    digest = hashlib.sha256(CONTENT).hexdigest()
    # the size and a few ranges come, then nothing does
    with FaultProxy(big.endpoint, {kind: 1}, num_spared=9) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)
        # without a digest for each part, flipped bits show in the whole file only
        with pytest.raises(StorageError, match="has SHA-256" if kind == "flip" else ", 3 times"):
            fetch(f"{big.uri}/big", tmp_path, digest)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        proxy.rates = {}
        assert fetch(f"{big.uri}/big", tmp_path, digest).read_bytes() == CONTENT
