"""Which sample goes where, and when: pure functions of sample ids, seeds and epochs.

Everything random about data is a 64-bit hash of what it depends on. There is no generator with a
state, so a sample's split, place and augmentation are the same for any world size, any number of
threads, any layout of the shards, after any resume, and under any version of numpy.

Shapes: N samples, B of them in a batch. Ids are uint64, rows and positions int64.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tlrunner.data.world import World
from tlrunner.errors import ConfigError, DataError

Ids = NDArray[np.uint64]
Rows = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Splits:
    """Row numbers of each split, each in ascending order of sample id."""

    train: Rows
    val: Rows
    test: Rows


def sample_id(key: str) -> int:
    """The first 8 bytes of the SHA-256 of a sample's key, as an unsigned number."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def sample_ids(keys: Iterable[str]) -> Ids:
    return np.fromiter((sample_id(key) for key in keys), np.uint64)


def hash_of(*parts: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit hash of numbers or broadcastable arrays, elementwise; at least one-dimensional.

    Each part goes through the finaliser of splitmix64 (Steele, Lea and Flood, 2014).
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        # numpy warns of overflow for scalars only, so even numbers are arrays here
        state = (state ^ np.atleast_1d(np.asarray(part, np.uint64))) + _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def uniforms(ids_B: Ids, seed: int, view: int, stream: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each sample, of shape (B, count).

    `stream` separates consumers: two that draw for the same sample must not share one.
    """
    counters = np.arange(count, dtype=np.uint64)[None, :]
    bits = hash_of(ids_B[:, None], seed, view, stream, counters)
    numbers: NDArray[np.float64] = np.ldexp(bits >> np.uint64(11), -53)
    return numbers


def epoch_order(ids_N: Ids, seed: int, epoch: int) -> Rows:
    """The order in which an epoch visits the samples: a permutation of 0..N-1."""
    return np.argsort(hash_of(ids_N, seed, epoch), kind="stable")


def cut_batches(num_samples: int, batch_size: int) -> list[slice]:
    """Cut an epoch into ceil(N / batch_size) batches whose sizes differ by at most one.

    A short last batch would weigh its samples more, and one of size 1 breaks BatchNorm.
    """
    count = -(-num_samples // batch_size)
    return [slice(i * num_samples // count, (i + 1) * num_samples // count) for i in range(count)]


def rank_slice(batch: slice, world: World) -> slice:
    """The share of a global batch that one rank reads; may be empty.

    Neighbours 2i and 2i+1 of the batch stay together, as mixup and cutmix pair them.
    """
    size = batch.stop - batch.start
    pairs = (size + 1) // 2
    first, last = (2 * (pairs * r // world.size) for r in (world.rank, world.rank + 1))
    return slice(batch.start + min(first, size), batch.start + min(last, size))


def split_rows(
    ids_N: Ids,
    labels_N: Rows,
    val_fraction: float,
    test_fraction: float,
    limit: int | None = None,
    class_names: Sequence[str] = (),
) -> Splits:
    """Split each class by hash: the lowest ids validate, the next test, the rest train.

    A sample's split depends on its key and on how many samples its class has, never on shards or
    seeds. `limit` is applied after the split, so a limited split is a part of the full one.

    Raises:
        DataError: a class has too few images to have one in each split.
        ConfigError: `limit` is too small to have one of each class in each split.
    """
    parts: list[Rows] = []  # of each class in turn: val, test, train
    for label in range(max(len(class_names), int(labels_N.max(initial=-1)) + 1)):
        rows = _by_id(ids_N, np.flatnonzero(labels_N == label))
        num_val = _share_of(len(rows), val_fraction)
        num_test = _share_of(len(rows), test_fraction)
        if len(rows) <= num_val + num_test:
            name = class_names[label] if label < len(class_names) else str(label)
            raise _too_few(name, len(rows), val_fraction, test_fraction)
        parts += np.split(rows, [num_val, num_val + num_test])
    if limit is not None:
        parts = _limited(parts, limit, "one of each class in each split")
    val, test, train = (_by_id(ids_N, *parts[i::3]) for i in range(3))
    return Splits(train=train, val=val, test=test)


def limit_rows(ids_N: Ids, labels_N: Rows, limit: int | None = None) -> Rows:
    """At most `limit` rows, the lowest ids of each class, in ascending order of sample id.

    Unlabelled samples, -1, count as a class.

    Raises:
        ConfigError: `limit` is too small to have one of each class.
    """
    parts = [_by_id(ids_N, np.flatnonzero(labels_N == label)) for label in np.unique(labels_N)]
    if limit is not None:
        parts = _limited(parts, limit, "one of each class")
    return _by_id(ids_N, *parts)


def proportional(sizes: Sequence[int], total: int) -> list[int]:
    """Share `total` over groups in proportion to their sizes, by largest remainder.

    A group that is not empty gets at least one, as long as `total` suffices for that.
    """
    sizes_G = np.asarray(sizes, np.int64)
    if total >= sizes_G.sum():
        return [int(size) for size in sizes_G]
    quotas = sizes_G * (total / sizes_G.sum())
    counts = np.maximum(np.floor(quotas).astype(np.int64), sizes_G > 0)
    while counts.sum() < total:
        counts[np.argmax(np.where(counts < sizes_G, quotas - counts, -np.inf))] += 1
    while counts.sum() > total:
        counts[np.argmin(np.where(counts > 1, quotas - counts, np.inf))] -= 1
    return [int(count) for count in counts]


def _share_of(count: int, fraction: float) -> int:
    return max(1, int(count * fraction + 0.5)) if fraction > 0 else 0


def _limited(parts: list[Rows], limit: int, which: str) -> list[Rows]:
    """The first rows of each part, `limit` together in proportion; `which`: what is the least."""
    sizes = [len(rows) for rows in parts]
    needed = sum(size > 0 for size in sizes)
    if limit < needed:
        raise ConfigError(f"data.limit is {limit}", f"at least {needed}, {which}")
    return [rows[:count] for rows, count in zip(parts, proportional(sizes, limit), strict=True)]


def _by_id(ids_N: Ids, *parts: Rows) -> Rows:
    rows = np.concatenate(parts) if parts else np.empty(0, np.int64)
    return rows[np.argsort(ids_N[rows], kind="stable")]


def _too_few(name: str, count: int, val_fraction: float, test_fraction: float) -> DataError:
    splits = "train and val" if test_fraction == 0 else "train, val and test"
    return DataError(
        f"class '{name}' has {count} usable image{'s' * (count != 1)}",
        f"at least one for each of {splits} (data.val_fraction={val_fraction}, "
        f"data.test_fraction={test_fraction})",
        "add images to the class, remove it, or lower the fractions",
    )
