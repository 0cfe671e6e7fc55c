import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlrunner.data.order import (
    cut_batches,
    epoch_order,
    limit_rows,
    padded_share,
    proportional,
    rank_slice,
    sample_id,
    sample_ids,
    split_rows,
    uniforms,
    window_order,
)
from tlrunner.data.world import World
from tlrunner.errors import ConfigError, DataError

counts = st.integers(1, 300)
sizes = st.integers(1, 64)
worlds = st.sampled_from([1, 2, 3, 8])


def ids_of(count: int) -> np.ndarray:
    return sample_ids(f"class/{i}.jpg" for i in range(count))


def test_a_sample_id_is_the_start_of_the_keys_sha256() -> None:
    assert sample_id("abc") == 0xEACF018FBF1678BA  # ba7816bf 8f01cfea, as SHA-256 of "abc" begins


def test_hashes_are_those_of_the_first_release() -> None:
    drawn = uniforms(ids_of(1), seed=3, view=5, stream=1, count=2)[0]
    assert epoch_order(ids_of(8), seed=0, epoch=0).tolist() == [0, 3, 1, 7, 4, 5, 2, 6]
    assert drawn.tolist() == [0.4635611206315149, 0.022614787497565847]


@given(counts, sizes, worlds)
def test_over_all_ranks_each_sample_comes_exactly_once(n: int, batch: int, size: int) -> None:
    worlds = [World(rank, size) for rank in range(size)]
    cuts = [rank_slice(cut, world) for cut in cut_batches(n, batch) for world in worlds]
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(n))


@given(counts, sizes, worlds)
def test_ranks_never_tear_a_pair(n: int, batch: int, size: int) -> None:
    for cut in cut_batches(n, batch):
        for rank in range(size):
            assert (rank_slice(cut, World(rank, size)).start - cut.start) % 2 == 0 or (
                rank_slice(cut, World(rank, size)).start == cut.stop
            )


def shares(n: int, batch: int, size: int) -> list[list[tuple[slice, int]]]:
    """Of each batch, each rank's share in an evaluation."""
    cuts = cut_batches(n, batch)
    return [[padded_share(cut, World(rank, size)) for rank in range(size)] for cut in cuts]


@given(counts, sizes, worlds)
def test_an_evaluation_drops_and_repeats_nothing(n: int, batch: int, size: int) -> None:
    parts = [part for of_batch in shares(n, batch, size) for part, _ in of_batch]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))


@given(counts, sizes, worlds)
def test_padding_makes_the_shares_of_all_ranks_as_long(n: int, batch: int, size: int) -> None:
    for cut, of_batch in zip(cut_batches(n, batch), shares(n, batch, size), strict=True):
        lengths = {part.stop - part.start + padding for part, padding in of_batch}
        assert lengths == {-(-(cut.stop - cut.start) // size)}
        assert all(padding >= 0 for _, padding in of_batch)


@given(counts, sizes, worlds)
def test_ranks_together_evaluate_the_batches_of_one(n: int, batch: int, size: int) -> None:
    for (whole,), of_batch in zip(shares(n, batch, 1), shares(n, batch, size), strict=True):
        assert whole == (slice(of_batch[0][0].start, of_batch[-1][0].stop), 0)


@given(counts, sizes, worlds, st.data())
def test_what_is_left_of_an_epoch_depends_on_the_position_alone(
    n: int, batch: int, size: int, data: st.DataObject
) -> None:
    order, cuts = epoch_order(ids_of(n), 1, 2), cut_batches(n, batch)
    position = data.draw(st.integers(0, len(cuts)))
    done, left = (
        {
            int(row)
            for cut in part
            for r in range(size)
            for row in order[rank_slice(cut, World(r, size))]
        }
        for part in (cuts[:position], cuts[position:])
    )
    assert done | left == set(range(n))
    assert not done & left


groups = st.lists(st.integers(0, 2**40), min_size=1, max_size=12, unique=True)


@given(groups, st.lists(st.integers(0, 11), max_size=200), st.integers(1, 14), st.integers(0, 9))
def test_a_window_order_has_every_row_once_and_few_groups_at_a_time(
    groups: list[int], places: list[int], window: int, epoch: int
) -> None:
    groups_N = np.array([groups[place % len(groups)] for place in places], np.int64)
    order = window_order(ids_of(len(places)), groups_N, 0, epoch, window)
    assert sorted(order.tolist()) == list(range(len(places)))
    seen = groups_N[order].tolist()
    first = {group: i for i, group in reversed(list(enumerate(seen)))}
    last = {group: i for i, group in enumerate(seen)}
    for i in range(len(seen)):
        assert sum(first[group] <= i <= last[group] for group in first) <= window


def test_a_window_order_differs_by_seed_and_epoch_in_groups_and_within_them() -> None:
    ids, groups_N = ids_of(60), np.repeat(np.arange(6), 10)
    orders = [window_order(ids, groups_N, s, e, 2) for s in range(4) for e in range(4)]
    assert len({tuple(order) for order in orders}) == 16
    assert len({tuple(sorted(set(groups_N[order[:20]].tolist()))) for order in orders}) > 4
    assert any((np.diff(order) < 0).any() for order in orders)


def test_a_window_over_all_groups_is_a_plain_shuffle() -> None:
    ids, groups_N = ids_of(60), np.arange(60) // 7
    assert (window_order(ids, groups_N, 3, 4, 99) == epoch_order(ids, 3, 4)).all()


def test_a_window_order_follows_samples_and_groups_not_rows() -> None:
    ids, groups_N = ids_of(60), np.arange(60) // 7
    there = window_order(ids, groups_N, 3, 4, 2)
    back = window_order(ids[::-1], groups_N[::-1], 3, 4, 2)
    assert (ids[there] == ids[::-1][back]).all()


@given(counts, sizes)
def test_batches_differ_by_at_most_one_and_never_exceed_the_batch_size(n: int, batch: int) -> None:
    lengths = [cut.stop - cut.start for cut in cut_batches(n, batch)]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= batch
    assert len(lengths) == -(-n // batch)


@given(counts, st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_an_epochs_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(ids_of(n), seed, epoch)) == list(range(n))


def test_order_changes_with_seed_and_with_epoch() -> None:
    orders = {tuple(epoch_order(ids_of(50), s, e)) for s in range(5) for e in range(5)}
    assert len(orders) == 25


def test_order_follows_samples_however_rows_are_laid_out() -> None:
    ids = ids_of(40)
    shuffled = ids[::-1].copy()
    first, second = ids[epoch_order(ids, 1, 2)], shuffled[epoch_order(shuffled, 1, 2)]
    assert (first == second).all()


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    drawn = uniforms(ids_of(2000), seed=0, view=0, stream=0, count=10)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.abs(np.histogram(drawn, 10, (0, 1))[0] / 2000 - 1).max() < 0.1
    assert np.abs(np.corrcoef(drawn.T) - np.eye(10)).max() < 0.1


def test_uniforms_differ_by_sample_seed_view_stream_and_place() -> None:
    ids = ids_of(3)
    drawn = [
        uniforms(ids, seed, view, stream, 4)
        for seed in range(3)
        for view in range(3)
        for stream in range(3)
    ]
    assert len(np.unique(drawn)) == 3**3 * 3 * 4


@given(
    st.lists(st.integers(4, 60), min_size=1, max_size=6),
    st.floats(0.01, 0.4),
    st.floats(0, 0.3),
)
def test_splits_are_disjoint_complete_and_stratified(
    sizes: list[int], val_fraction: float, test_fraction: float
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    ids = ids_of(len(labels))
    splits = split_rows(ids, labels, val_fraction, test_fraction)
    everything = np.concatenate([splits.train, splits.val, splits.test])
    assert sorted(everything) == list(range(len(labels)))
    for label, size in enumerate(sizes):
        assert (labels[splits.val] == label).sum() == max(1, int(size * val_fraction + 0.5))
        assert (labels[splits.train] == label).sum() >= 1


def test_the_split_of_a_sample_does_not_depend_on_its_row() -> None:
    ids, labels = ids_of(60), np.arange(60) % 3
    there, back = split_rows(ids, labels, 0.2, 0.2), split_rows(ids[::-1], labels[::-1], 0.2, 0.2)
    for name in ("train", "val", "test"):
        assert ids[getattr(there, name)].tolist() == ids[::-1][getattr(back, name)].tolist()


@given(st.integers(4, 90), st.integers(4, 90))
def test_a_limited_split_is_a_part_of_any_less_limited_one(first: int, second: int) -> None:
    ids, labels = ids_of(90), np.repeat([0, 1], [30, 60])
    less, more = sorted((first, second))
    small = split_rows(ids, labels, 0.2, 0, less)
    large = split_rows(ids, labels, 0.2, 0, more)
    full = split_rows(ids, labels, 0.2, 0)
    assert len(small.train) + len(small.val) == less
    assert set(small.val) <= set(full.val)
    assert set(small.train) <= set(full.train)
    assert set(large.val) <= set(full.val)


def test_a_class_that_is_too_small_is_named() -> None:
    labels = np.array([0] * 10 + [1])
    with pytest.raises(DataError, match=r"class 'bee' has 1 usable image;.*train and val"):
        split_rows(ids_of(11), labels, 0.2, 0, class_names=("ant", "bee"))


def test_a_class_without_any_image_is_named() -> None:
    with pytest.raises(DataError, match="class 'bee' has 0 usable images"):
        split_rows(ids_of(5), np.zeros(5, np.int64), 0.2, 0, class_names=("ant", "bee"))


def test_a_limit_that_cannot_cover_all_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.limit is 3; valid: at least 4"):
        split_rows(ids_of(20), np.arange(20) % 2, 0.2, 0, limit=3)


@given(
    st.lists(st.integers(-1, 5), min_size=1, max_size=60).map(np.array),
    st.none() | st.integers(7, 70),
)
def test_a_limit_takes_the_lowest_ids_of_each_class(labels: np.ndarray, limit: int | None) -> None:
    ids = ids_of(len(labels))
    rows = limit_rows(ids, labels, limit)
    assert len(rows) == min(limit or len(labels), len(labels))
    assert (np.diff(ids[rows].astype(object)) > 0).all()
    left = np.setdiff1d(np.arange(len(labels)), rows)
    for label in np.unique(labels):
        taken, others = (ids[part[labels[part] == label]] for part in (rows, left))
        assert len(taken) > 0
        assert not len(others) or taken.max() < others.min()


def test_a_limit_takes_classes_in_proportion() -> None:
    labels = np.repeat([0, 1, 3], [60, 30, 10])  # nothing of class 2
    taken = labels[limit_rows(ids_of(100), labels, 20)]
    assert np.bincount(taken).tolist() == [12, 6, 0, 2]


def test_a_limit_below_the_number_of_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.limit is 3; valid: at least 4, one of each"):
        limit_rows(ids_of(20), np.arange(20) % 4, 3)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 200))
def test_shares_add_up_and_fit(sizes: list[int], total: int) -> None:
    total = max(total, sum(size > 0 for size in sizes))
    shares = proportional(sizes, total)
    assert sum(shares) == min(total, sum(sizes))
    assert all(share <= size for share, size in zip(shares, sizes, strict=True))
    assert all(share > 0 for share, size in zip(shares, sizes, strict=True) if size)
