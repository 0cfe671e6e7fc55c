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


def padded_share(batch: slice, world: World) -> tuple[slice, int]:
    """A rank's share of an evaluation's batch, and by how many it is short of the others'.

    Every rank has ceil(size / world size) places, so that all compute the same shapes; what the
    last ranks lack is padding, which counts for nothing.
    """
    size = batch.stop - batch.start
    places = -(-size // world.size)
    first, last = (min(places * rank, size) for rank in (world.rank, world.rank + 1))
    return slice(batch.start + first, batch.start + last), places - (last - first)


def window_order(ids_N: Ids, groups_N: Rows, seed: int, epoch: int, window: int) -> Rows:
    """The order of an epoch over samples that are stored in groups: a permutation of 0..N-1.

    Groups come in random order, `window` at a time, and the samples of such a window are shuffled.
    So no more than `window` groups have to be at hand, whatever the number of samples.
    """
    groups_G, group_of_N = np.unique(groups_N, return_inverse=True)
    places_G = np.empty(len(groups_G), np.int64)
    shuffled_G = np.argsort(hash_of(seed, epoch, groups_G.astype(np.uint64)), kind="stable")
    places_G[shuffled_G] = np.arange(len(groups_G))
    windows_N = places_G[group_of_N] // window
    return np.lexsort((hash_of(ids_N, seed, epoch), windows_N))


def split_rows(
    ids_N: Ids,
    labels_N: Rows,
    val_fraction: float,
    test_fraction: float,
    limit: int | None = None,
    class_names: Sequence[str] = (),
    given_N: Rows | None = None,
) -> Splits:
    """Split each class by hash: the lowest ids validate, the next test, the rest train.

    A sample's split depends on its key and on how many samples its class has, never on shards or
    seeds. `limit` is applied after the split, so a limited split is a part of the full one.

    `given_N`: what the source says of each row, 0 nothing, 1 train, 2 val, 3 test. It is taken at
    its word; where it names no validation images at all, they are cut from its training images.

    Raises:
        DataError: a class has too few images to have one in each split.
        ConfigError: `limit` is too small to have one of each class in each split.
    """
    given_N = np.zeros_like(labels_N) if given_N is None else given_N
    fractions_of = {0: (val_fraction, test_fraction), 1: (0.0, 0.0), 2: (1.0, 0.0), 3: (0.0, 1.0)}
    if not (given_N == 2).any():
        fractions_of[1] = (val_fraction, 0.0)
    parts: list[Rows] = []  # of each class in turn: val, test, train
    for label in range(max(len(class_names), int(labels_N.max(initial=-1)) + 1)):
        pieces: list[list[Rows]] = [[], [], []]
        for given, fractions in fractions_of.items():
            rows = _by_id(ids_N, np.flatnonzero((labels_N == label) & (given_N == given)))
            num_val, num_test = (_share_of(len(rows), fraction) for fraction in fractions)
            for piece, of in zip(
                pieces, np.split(rows, [num_val, num_val + num_test]), strict=True
            ):
                piece.append(of)
        of_class = [_by_id(ids_N, *piece) for piece in pieces]
        if not len(of_class[2]):
            name = class_names[label] if label < len(class_names) else str(label)
            raise _too_few(name, int((labels_N == label).sum()), val_fraction, test_fraction)
        parts += of_class
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
    return min(count, max(1, int(count * fraction + 0.5))) if fraction > 0 else 0


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
