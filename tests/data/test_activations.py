"""Values kept in a file that many processes fill together, and any of them may be killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tlrunner.data.activations import CHUNK, ActivationFile, Bytes, file_bytes
from tlrunner.data.cache import NodeCache
from tlrunner.errors import StorageError

NUM_ENTRIES, ENTRY_BYTES = 20 * CHUNK + 5, 24

FILLER = """
import sys, time
from pathlib import Path
from tests_of_activations import expected, opened

file = opened(Path(sys.argv[1]))
log = open(sys.argv[2], "a", buffering=1)
for wait in (False, True):
    for chunk in range(file.num_chunks):
        if file.claim(chunk, wait=wait):
            log.write(f"began {chunk}\\n")
            time.sleep(float(sys.argv[3]))
            file.commit(chunk, expected(chunk))
            log.write(f"committed {chunk}\\n")
"""


def opened(directory: Path) -> ActivationFile:
    return ActivationFile(NodeCache(directory, 1 << 30), "values", NUM_ENTRIES, ENTRY_BYTES)


def expected(chunk: int) -> Bytes:
    size = min(CHUNK, NUM_ENTRIES - chunk * CHUNK)
    return np.random.default_rng(chunk).integers(0, 256, (size, ENTRY_BYTES), np.uint8)


def start_filler(directory: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    code = FILLER.replace("tests_of_activations", Path(__file__).stem)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory), str(log), str(seconds)],
        env={**os.environ, "PYTHONPATH": path},
    )


def test_what_one_process_commits_another_reads(tmp_path: Path) -> None:
    one, other = opened(tmp_path), opened(tmp_path)
    assert not other.has(0)
    assert one.claim(0, wait=False)
    one.commit(0, expected(0))
    assert other.has(0)
    assert not other.claim(0, wait=False)
    assert (other.entries[other.span(0)] == expected(0)).all()
    assert not other.has(1)


def test_a_chunk_that_was_given_back_is_not_there(tmp_path: Path) -> None:
    file = opened(tmp_path)
    assert file.claim(3, wait=False)
    file.release(3)
    assert not file.has(3)
    assert file.claim(3, wait=False)


def test_a_chunk_whose_bytes_changed_is_filled_again(tmp_path: Path) -> None:
    file = opened(tmp_path)
    assert file.claim(1, wait=False)
    file.commit(1, expected(1))
    (path,) = tmp_path.glob("*.activations")
    with path.open("r+b") as raw:
        raw.seek(CHUNK * ENTRY_BYTES + 7)
        raw.write(bytes([int(expected(1)[0, 7]) ^ 1]))
    again = opened(tmp_path)
    assert not again.has(1)
    assert again.claim(1, wait=False)
    again.commit(1, expected(1))
    assert opened(tmp_path).has(1)


def test_the_last_chunk_may_be_short(tmp_path: Path) -> None:
    file = opened(tmp_path)
    last = file.num_chunks - 1
    assert file.span(last) == slice(20 * CHUNK, NUM_ENTRIES)
    assert file.claim(last, wait=True)
    file.commit(last, expected(last))
    assert opened(tmp_path).has(last)


def test_a_cache_without_room_says_so(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, file_bytes(NUM_ENTRIES, ENTRY_BYTES) - 1)
    with pytest.raises(StorageError, match="no room"):
        ActivationFile(cache, "values", NUM_ENTRIES, ENTRY_BYTES)


def test_a_disk_that_takes_no_more_is_an_error_and_leaves_the_chunk_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = opened(tmp_path)
    assert file.claim(0, wait=False)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
        with pytest.raises(StorageError, match="no space"):
            file.commit(0, expected(0))
    assert not file.has(0)
    assert file.claim(0, wait=False)


def test_killed_fillers_are_taken_over_and_nothing_committed_is_computed_again(
    tmp_path: Path,
) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    directory, log = tmp_path / "cache", tmp_path / "log"
    log.touch()
    for _ in range(10):
        before = log.stat().st_size
        filler = start_filler(directory, log, seconds=0.01)
        while filler.poll() is None and log.stat().st_size == before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.03))
        filler.send_signal(signal.SIGKILL)
        filler.wait()
        file = opened(directory)
        for chunk in range(file.num_chunks):
            if file.has(chunk):
                assert (file.entries[file.span(chunk)] == expected(chunk)).all()
    assert start_filler(directory, log, seconds=0).wait() == 0
    file = opened(directory)
    assert all(file.has(chunk) for chunk in range(file.num_chunks))
    lines = [line.split() for line in log.read_text().splitlines()]
    committed: set[str] = set()
    for what, chunk in lines:
        assert chunk not in committed, f"chunk {chunk} was computed after it was committed"
        if what == "committed":
            committed.add(chunk)


def test_two_fillers_share_the_work(tmp_path: Path) -> None:
    directory, logs = tmp_path / "cache", [tmp_path / "one", tmp_path / "other"]
    fillers = [start_filler(directory, log, seconds=0.02) for log in logs]
    assert [filler.wait() for filler in fillers] == [0, 0]
    begun = [line for log in logs for line in log.read_text().splitlines() if "began" in line]
    assert sorted(begun) == sorted(f"began {chunk}" for chunk in range(21))
