"""Shows that evaluation reads every document once, on any number of ranks, or up to a cut that is equal for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptb_ds.data.corpus import Corpus
from gptb_ds.data.document_order import Pieces
from gptb_ds.data.held_out import Choice, held_out_windows, share_out
from gptb_ds.data.window import Window
from tests.harness.stores import EOT, make_corpus, numbered_documents, together


def documents_read(windows: list[Window]) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Inputs, targets and weights of every document, from reset to reset, lane by lane; what has weight 0 as well."""
    lanes = windows[0].lanes
    streams: list[list[tuple[int, int, int, int]]] = [[] for _ in range(lanes)]
    for w in windows:
        assert w.loss_weights is not None
        assert w.lanes <= lanes  # it never grows again
        lanes = w.lanes
        fields = [f.numpy().astype(int).T.tolist() for f in (w.input_ids, w.targets, w.reset, w.loss_weights)]
        for lane in range(lanes):
            streams[lane] += zip(*(f[lane] for f in fields), strict=True)
    found = []
    for stream in streams:
        starts = [n for n, entry in enumerate(stream) if entry[2]]
        for start, end in zip(starts, [*starts[1:], len(stream)], strict=True):
            inputs, targets, _, weights = zip(*stream[start:end], strict=True)
            found.append((inputs, targets, weights))
    return found


def read_by(corpus: Corpus, world: int, **options: Any) -> list[Any]:
    """What all ranks read, sorted, without what only fills up lanes that have run out."""
    ranks = [list(held_out_windows(corpus, rank=r, world_size=world, **options)) for r in range(world)]
    assert len({len(windows) for windows in ranks}) == 1
    return sorted(d for windows in ranks for d in documents_read(windows) if any(d[2]))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    lanes=st.sampled_from([1, 2, 4, 8]),
    window=st.integers(1, 12),
    limit=st.one_of(st.none(), st.integers(1, 20)),
    mixed=st.booleans(),
)
def test_every_document_once(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    lanes: int,
    window: int,
    limit: int | None,
    mixed: bool,
) -> None:
    folder = tmp_path_factory.mktemp("held-out")
    documents = numbered_documents(lengths)
    corpus = make_corpus(folder, documents)
    if mixed:
        extra = numbered_documents([4, 9])
        corpus = together([corpus, make_corpus(folder, extra)], (1.0, 2.0))
        documents = documents + extra
    pieces = [d[i : i + (limit or 99)] for d in documents for i in range(0, max(1, len(d)), limit or 99)]
    expected = sorted(((EOT, *p), (*p, EOT), (1,) * (len(p) + 1)) for p in pieces)
    for world in (1, 2, 4, 8):
        if lanes % world == 0:
            found = read_by(corpus, world, lanes=lanes, window=window, max_document_tokens=limit)
            # A document that is its lane's last one is followed by EOTs with weight 0, to the window's end.
            ends = [sum(d[2]) for d in found]
            assert [tuple(f[:end] for f in d) for d, end in zip(found, ends, strict=True)] == expected
            for d, end in zip(found, ends, strict=True):
                assert set(d[0][end:]) | set(d[1][end:]) <= {EOT} and not any(d[2][end:])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    budget=st.integers(1, 200),
    limit=st.one_of(st.none(), st.integers(1, 20)),
    shapes=st.lists(st.tuples(st.sampled_from([1, 2, 4, 8, 64]), st.integers(1, 12)), min_size=2, max_size=4),
)
def test_what_is_read_does_not_depend_on_lanes_ranks_and_window(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    budget: int,
    limit: int | None,
    shapes: list[tuple[int, int]],
) -> None:
    corpus = make_corpus(tmp_path_factory.mktemp("held-out"), numbered_documents(lengths))

    def targets_read(lanes: int, window: int, world: int) -> list[Any]:
        """Of each document the inputs and targets that count."""
        options = {"lanes": lanes, "window": window, "max_tokens": budget, "max_document_tokens": limit}
        found = read_by(corpus, world, **options)
        return sorted((i[: sum(w)], t[: sum(w)]) for i, t, w in found)

    (lanes, window), *others = shapes
    expected = targets_read(lanes, window, 1)
    assert sum(len(targets) for _, targets in expected) == min(budget, Pieces(corpus.stores[0].offsets, limit).inputs)
    for lanes, window in others:
        assert targets_read(lanes, window, lanes // 2 or 1) == expected


def test_lanes_that_have_run_out_are_not_computed(tmp_path: Path) -> None:
    """One document of 1,000 tokens beside 63 of 10: after those have ended, only its lane goes on."""
    corpus = make_corpus(tmp_path, numbered_documents([10] * 63 + [1000]))
    windows = list(held_out_windows(corpus, lanes=64, window=20))
    assert [w.lanes for w in windows] == [64] + [1] * (len(windows) - 1)
    computed = sum(w.input_ids.numel() for w in windows)
    assert computed <= 2 * sum(w.counted for w in windows)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    lanes=st.integers(1, 12),
)
def test_the_longest_lane_is_near_the_shortest_possible(lengths: list[int], lanes: int) -> None:
    choice = Choice(np.arange(len(lengths)), np.array(lengths))
    reading = share_out(choice, lanes)
    assert sorted(reading.piece.tolist()) == list(range(len(lengths)))
    for lane in range(lanes):
        own = reading.piece[reading.first[lane] : reading.first[lane + 1]]
        assert choice.length[own].sum() == reading.columns[lane]
    assert (np.diff(reading.columns) <= 0).all()
    least = max(max(lengths), -(-sum(lengths) // lanes))
    assert reading.columns[0] <= least + max(lengths) * (lanes - 1) / lanes


@pytest.mark.parametrize("limit", [1, 7, 8, 50, 51, 111, 112, 10**9])
def test_max_tokens_is_a_global_count(tmp_path: Path, limit: int) -> None:
    lengths = [30, 5, 0, 20, 9, 12, 13, 15]
    corpus = make_corpus(tmp_path, numbered_documents(lengths))
    totals = []
    for world in (1, 2, 4):
        ranks = [
            list(held_out_windows(corpus, lanes=4, window=3, rank=r, world_size=world, max_tokens=limit))
            for r in range(world)
        ]
        assert len({len(windows) for windows in ranks}) == 1
        totals.append(int(sum(float(w.loss_weights.sum()) for windows in ranks for w in windows)))  # type: ignore[union-attr]
    assert len(set(totals)) == 1
    assert Pieces(corpus.stores[0].offsets).inputs == 112
    assert totals[0] <= max(limit, 4)
    assert totals[0] == min(limit, 112)


def test_loss_weights_of_the_store_count(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[5, 6], [7]], counted=[[0, 1, 1], [1, 0]])
    (window,) = held_out_windows(corpus, lanes=2, window=4)
    assert window.loss_weights is not None
    assert window.targets.T.tolist() == [[5, 6, EOT, EOT], [7, EOT, EOT, EOT]]
    assert window.loss_weights.T.tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]


def test_ranks_that_do_not_divide_the_lanes(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[5, 6]])
    with pytest.raises(ValueError, match="cannot be shared by 3 ranks"):
        next(held_out_windows(corpus, lanes=4, window=4, world_size=3))


def test_a_part_is_drawn_from_all_over_the_corpus(tmp_path: Path) -> None:
    stores = [make_corpus(tmp_path, [[number] * 9] * 50) for number in (11, 12)]
    windows = list(held_out_windows(together(stores, None), lanes=4, window=5, max_tokens=200))
    read = np.concatenate([w.input_ids.flatten() for w in windows])
    assert (read == 11).sum() > 40 and (read == 12).sum() > 40
    again = list(held_out_windows(together(stores, None), lanes=4, window=5, max_tokens=200))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(windows, again, strict=True))
