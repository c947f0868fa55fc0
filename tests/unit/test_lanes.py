"""Shows that the order of documents is a fresh permutation each epoch, in proportion, and cut where asked."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptb_ds.data.document_order import MIX_BLOCK, NOTHING, FixedOrder, Pieces, ShuffledOrder, permute
from gptb_ds.data.lanes import Cursor, rank_lanes, runs


def pieces_of(lengths: list[int], limit: int | None = None) -> Pieces:
    """Documents of so many tokens, laid out as a store does."""
    return Pieces(np.cumsum([0] + [n + 1 for n in lengths]), limit)


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    index = np.arange(size)
    out = permute(index, size, np.full(size, key, dtype=np.uint64))
    assert np.array_equal(np.sort(out), index)
    one = permute(index[size // 2 :][:1], size, np.array([key], dtype=np.uint64))
    assert one[0] == out[size // 2]  # each index alone, whatever is asked with it


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
def test_permute_reaches_every_order_about_equally(size: int) -> None:
    draws = 40_000
    keys = np.repeat(np.arange(draws, dtype=np.uint64) * np.uint64(0x2545F4914F6CDD1D), size)
    out = permute(np.tile(np.arange(size), draws), size, keys).reshape(draws, size)
    at_place = np.stack([np.bincount(out[:, place], minlength=size) for place in range(size)]) / draws
    assert np.abs(at_place * size - 1).max() < 0.05
    orders = np.unique(out[:, :3], axis=0, return_counts=True)[1] / draws
    assert np.abs(orders * len(orders) - 1).max() < 0.25
    assert len(orders) == size * (size - 1) * max(1, size - 2)


def test_permute_of_a_large_range() -> None:
    size = 10_000_000
    index = np.arange(0, size, 97)
    out = permute(index, size, np.full(len(index), 5, dtype=np.uint64))
    assert len(np.unique(out)) == len(index)
    assert out.min() >= 0 and out.max() < size
    assert abs(np.corrcoef(index, out)[0, 1]) < 0.01


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.one_of(st.none(), st.integers(1, 30)))
def test_pieces_are_the_documents_cut(lengths: list[int], limit: int | None) -> None:
    pieces = pieces_of(lengths, limit)
    expected, start = [], 0
    for n in lengths:
        step = limit or max(n, 1)
        expected += [(start + skip, min(n - skip, step) + 1) for skip in range(0, max(n, 1), step)]
        start += n + 1
    assert pieces.count == len(expected)
    assert pieces.inputs == sum(length for _, length in expected)
    found = pieces.locate(np.arange(pieces.count))
    assert list(zip(*(x.tolist() for x in found), strict=True)) == expected


def test_every_epoch_is_another_order_of_all_documents() -> None:
    order = ShuffledOrder([pieces_of([3, 0, 5, 1, 9, 2])], seed=7)
    epochs = [order(np.arange(e * 6, e * 6 + 6))[1].tolist() for e in range(50)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 35
    other = ShuffledOrder([pieces_of([3, 0, 5, 1, 9, 2])], seed=8)
    assert other(np.arange(300))[1].tolist() != [start for epoch in epochs for start in epoch]


def test_mixture_without_weights_is_one_large_store() -> None:
    order = ShuffledOrder([pieces_of([1] * 7), pieces_of([2] * 5)], seed=0)
    for epoch in range(3):
        source, start, _ = order(np.arange(12 * epoch, 12 * epoch + 12))
        assert Counter(zip(source.tolist(), start.tolist(), strict=True)) == Counter(
            [(0, 2 * i) for i in range(7)] + [(1, 3 * i) for i in range(5)]
        )


def test_weighted_mixture_gives_shares_of_inputs_and_epochs_to_each_store() -> None:
    sources = [pieces_of([9] * 100), pieces_of([99] * 40), pieces_of([0] * 3)]
    weights = (0.5, 0.3, 0.2)
    order = ShuffledOrder(sources, seed=3, shares=weights)
    source, start, length = order(np.arange(2 * MIX_BLOCK))
    shares = np.bincount(source, weights=length) / length.sum()
    assert np.allclose(shares, weights, atol=2e-3)
    first = np.bincount(source[:MIX_BLOCK])
    assert np.array_equal(first, np.bincount(source[MIX_BLOCK:]))
    # The picks of one store, in the order of its own numbering, are whole epochs: every document equally often.
    for s, pieces in enumerate(sources):
        counts = np.unique(start[source == s], return_counts=True)[1]
        assert len(counts) == pieces.count
        assert counts.max() - counts.min() <= 2
    early = np.bincount(source[:2000], minlength=3) / 2000
    assert np.allclose(early, first / MIX_BLOCK, atol=0.04)  # mixed from the start on


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_every_store_of_a_weighted_mixture_has_its_own_epochs(sizes: list[int], seed: int, data: st.DataObject) -> None:
    """Read in order, the picks of a store are its documents, each once, and again, in another order each time."""
    shares = data.draw(st.lists(st.floats(0.05, 1), min_size=len(sizes), max_size=len(sizes)))
    sources = [pieces_of([1 + n % 7 for n in range(size)]) for size in sizes]
    order = ShuffledOrder(sources, seed, shares)
    first = data.draw(st.sampled_from([0, MIX_BLOCK - 700]))
    ordinals = np.arange(0, 2 * MIX_BLOCK)
    source, start, _ = order(ordinals)
    for s, size in enumerate(sizes):
        picks = start[source == s]
        whole = len(picks) // size
        epochs = picks[: whole * size].reshape(whole, size)
        assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.sort(epochs[0]), (whole, 1)))
        assert len(np.unique(epochs[0])) == size
        if size > 20 and whole > 1:
            assert (epochs[0] != epochs[1]).any()
    some = np.arange(first, first + 1400)
    assert all(np.array_equal(a, b[some]) for a, b in zip(order(some), order(ordinals), strict=True))


def test_a_lane_of_a_weighted_mixture_meets_every_store() -> None:
    """As many lanes as the pattern is long: if every block began it at one place, a lane would stay with a store."""
    order = ShuffledOrder([pieces_of([1] * 9), pieces_of([1] * 5)], seed=1, shares=(0.5, 0.5))
    for lane in (0, 77, MIX_BLOCK - 1):
        sources = order(lane + MIX_BLOCK * np.arange(64))[0]
        assert 15 < np.count_nonzero(sources == 0) < 49


def test_a_tiny_weight_still_gets_a_pick() -> None:
    order = ShuffledOrder([pieces_of([1]), pieces_of([1])], seed=0, shares=(1e-9, 1.0))
    assert np.bincount(order(np.arange(MIX_BLOCK))[0]).tolist() == [1, MIX_BLOCK - 1]


def test_fixed_order_ends() -> None:
    source, start, length = FixedOrder([pieces_of([1, 2]), pieces_of([3])])(np.array([0, 1, 2, 3, 99]))
    assert source.tolist() == [0, 0, 1, -1, -1]
    assert start.tolist() == [0, 2, 0, 0, 0]
    assert length.tolist() == [2, 3, 4, NOTHING, NOTHING]


def test_rank_lanes_partition_and_errors() -> None:
    for world in (w for w in range(1, 65) if 960 % w == 0):
        assert [lane for rank in range(world) for lane in rank_lanes(960, rank, world)] == list(range(960))
    with pytest.raises(ValueError, match=r"data.lanes 10 cannot be shared by 4 ranks.*8 or 12 lanes.*\[1, 2, 5, 10\]"):
        rank_lanes(10, 0, 4)
    with pytest.raises(ValueError, match=r"choose 4 lanes"):
        rank_lanes(3, 0, 4)


def test_a_rank_pays_for_its_own_lanes_only() -> None:
    """1,000,000 lanes on 1024 ranks (rounded to what 1024 divides): nothing of a rank has the size of L or N."""
    lanes, ranks = 1_000_448, 1024
    order = ShuffledOrder([pieces_of([5] * 1000)], seed=0)
    own = rank_lanes(lanes, 1000, ranks)
    ordinal = np.arange(own.start, own.stop)
    cursor = Cursor(order, ordinal, np.zeros_like(ordinal), lanes)
    for _ in range(3):
        plan = cursor.advance(16)
        assert len(plan.first.lane) == 977
        assert plan.first.count.sum() + plan.later.count.sum() == 977 * 16
    assert np.array_equal(cursor.ordinal % lanes, ordinal)
    sizes = [v.size for v in vars(cursor).values() if isinstance(v, np.ndarray)]
    assert max(sizes) == 977


def test_runs() -> None:
    assert runs(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert runs(np.array([], dtype=np.int64), np.array([], dtype=np.int64)).tolist() == []
