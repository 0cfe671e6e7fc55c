"""Memory that reading takes: bounded, however many rows there are and epochs are read. Slow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import encoded, picture

from tlrunner.data.source import Source
from tlrunner.data.write import write_shards

pytestmark = pytest.mark.slow
MIB = 1 << 20
READ = """
import json, re, sys
from pathlib import Path
import numpy as np
from tlrunner.config import AugmentConfig, Preprocess
from tlrunner.data.augment import TrainTransform
from tlrunner.data.dataset import open_dataset
from tlrunner.data.loader import train_batches
from tlrunner.data.world import World

where, num_epochs, streamed = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "streamed"
dataset = open_dataset(where, streamed=streamed)
preprocess = Preprocess(
    image_size=32, crop_fraction=1, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear"
)
transform = TrainTransform(AugmentConfig(), preprocess, 0)
peaks, seen = [], 0
for epoch in range(num_epochs):
    for batch in train_batches(
        dataset, np.arange(len(dataset)), transform, seed=0, epoch=epoch, batch_size=64,
        world=World(), num_threads=2,
    ):
        seen += len(batch.labels_B)
    # of this program; that of getrusage is no less than that of the process it was forked from
    status = Path("/proc/self/status").read_text()
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
print(json.dumps({"seen": seen, "peaks": peaks}))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Small images, by their number."""
    images = [encoded(picture(i, width=16, height=16)) for i in range(100)]
    made = {}
    for count in (1_000, 50_000):
        source = Source(
            uri=f"made:{count}",
            class_names=("ant", "bee"),
            keys=[str(i) for i in range(count)],
            labels=[i % 2 for i in range(count)],
            fingerprint=str(count),
            num_bytes=0,
            read=lambda i: images[i % 100],
        )
        made[count] = tmp_path_factory.mktemp("made") / str(count)
        write_shards(source, made[count])
    return made


def peaks(where: Path, num_epochs: int, how: str = "kept") -> list[int]:
    """Peak memory after each epoch."""
    command = [sys.executable, "-c", READ, str(where), str(num_epochs), how]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert found["seen"] == num_epochs * int(where.name)
    print(where.name, how, [f"{peak / MIB:.0f} MiB" for peak in found["peaks"]])
    return found["peaks"]


def test_ten_epochs_take_the_memory_of_one(shards: dict[int, Path]) -> None:
    after = peaks(shards[1_000], 10)
    assert after[-1] - after[0] < 16 * MIB


def test_fifty_times_the_rows_take_little_more_than_their_index(shards: dict[int, Path]) -> None:
    few, many = (peaks(shards[count], 1)[0] for count in (1_000, 50_000))
    assert many - few < 49_000 * 500  # bytes a row: ids, labels, sizes, and the epoch's order


def test_streaming_holds_no_more_than_its_windows(shards: dict[int, Path]) -> None:
    kept, streamed = (peaks(shards[50_000], 1, how)[0] for how in ("kept", "streamed"))
    whole = sum(path.stat().st_size for path in shards[50_000].glob("*.parquet"))
    assert streamed - kept < whole + 16 * MIB
