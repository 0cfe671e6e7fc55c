"""Damaged Parquet files, each from its number alone, and what becomes of them; run by workers.

A worker that crashes or hangs ends, which the pool it belongs to reports.
"""

import faulthandler
import random
import resource
import shutil
from pathlib import Path

from tlrunner.data.dataset import open_dataset, verify_shards
from tlrunner.data.sources import open_source
from tlrunner.data.write import write_shards
from tlrunner.errors import DataError

MOST_SECONDS, MOST_BYTES = 5, 6 << 30


def mutated(data: bytes, number: int) -> bytes:
    """The same damage for the same number; never the same bytes as before."""
    rng = random.Random(number)
    damages = (_flip_bits, _overwrite, _cut, _insert, _zero, _swap, _edit_footer, _edit_length)
    damaged = damages[number % len(damages)](bytearray(data), rng)
    return bytes(damaged) if damaged != data else bytes(damaged[:-1])


def _flip_bits(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _overwrite(data: bytearray, rng: random.Random) -> bytearray:
    at, length = rng.randrange(len(data)), rng.choice((1, 4, 16, 300))
    data[at : at + length] = rng.randbytes(len(data[at : at + length]))
    return data


def _cut(data: bytearray, rng: random.Random) -> bytearray:
    at, length = rng.randrange(len(data)), rng.choice((1, 8, 500, len(data)))
    del data[at : at + length]
    return data


def _insert(data: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
    return data


def _zero(data: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(len(data))
    length = len(data[at : at + rng.choice((4, 100, 5000))])
    data[at : at + length] = bytes(length)
    return data


def _swap(data: bytearray, rng: random.Random) -> bytearray:
    """Two stretches change places, as blocks of a disk do."""
    length = rng.choice((16, 512))
    one, other = (rng.randrange(len(data) // length) * length for _ in range(2))
    data[one : one + length], data[other : other + length] = (
        data[other : other + length],
        data[one : one + length],
    )
    return data


def _edit_footer(data: bytearray, rng: random.Random) -> bytearray:
    start = max(0, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
    for _ in range(rng.choice((1, 1, 2, 4))):
        data[rng.randrange(start, len(data) - 8)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x19))
    return data


def _edit_length(data: bytearray, rng: random.Random) -> bytearray:
    length = int.from_bytes(data[-8:-4], "little")
    other = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**32 - 1, length // 2))
    data[-8:-4] = other.to_bytes(4, "little")
    return data


def be_a_worker() -> None:
    """A process of a pool: memory is limited, so that none can be had without end."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    """What a data set holds: image and label of each key."""
    dataset = open_dataset(directory)
    rows = enumerate(dataset.keys)
    return {key: (bytes(dataset.image_bytes(i)), int(dataset.labels_N[i])) for i, key in rows}


def read_with_manifest(good: Path, name: str, verify: bool, number: int, work: Path) -> str:
    """What becomes of a data set one of whose files is damaged."""
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    copy = Path(shutil.copytree(good, work / f"copy{number}"))
    (copy / name).write_bytes(mutated((good / name).read_bytes(), number))
    try:
        if verify:
            verify_shards(copy)
        return "equal" if contents(copy) == contents(good) else "different"
    except DataError:
        return "refused"
    except Exception as err:  # noqa: BLE001  (whatever it is, the test shows it)
        return f"{number}: {err!r}"
    finally:
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(copy)


def read_as_foreign(good: Path, number: int, work: Path) -> str:
    """What becomes of a damaged Parquet file without a manifest."""
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    place = work / f"foreign{number}"
    place.mkdir()
    (place / "x.parquet").write_bytes(mutated(good.read_bytes(), number))
    try:
        source = open_source(str(place / "x.parquet"), cache_dir=place / "cache")
        manifest = write_shards(source, place / "shards", max_bad_fraction=1.0)
        return "some bad" if manifest.num_bad else "written"
    except DataError as err:
        return "refused" if "\n" not in str(err) else f"{number}: {err!r}"
    except Exception as err:  # noqa: BLE001  (whatever it is, the test shows it)
        return f"{number}: {err!r}"
    finally:
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(place)
