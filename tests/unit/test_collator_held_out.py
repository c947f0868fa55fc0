"""Shows that evaluation reads every document once, on any number of ranks, or up to a cut that is equal for all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptb_ds.data.held_out import held_out_windows
from gptb_ds.data.lanes import Pieces
from gptb_ds.data.window import Window
from tests.data_stores import EOT, make_corpus, numbered_documents, together


def columns_of(windows: list[Window]) -> np.ndarray:
    """Inputs, targets, resets, weights (4, T, B)."""
    parts = [[w.input_ids, w.targets, w.reset, w.loss_weights] for w in windows]
    return np.stack([np.concatenate([np.asarray(p[field], dtype=np.int64) for p in parts]) for field in range(4)])


@settings(max_examples=40, deadline=None)
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
    options = {"lanes": lanes, "window": window, "max_document_tokens": limit}
    whole = columns_of(list(held_out_windows(corpus, **options)))
    for lane in range(lanes):
        inputs, targets, resets, weights = whole[:, :, lane]
        stream = [[EOT, *piece] for piece in pieces[lane::lanes]]
        flat = [token for part in stream for token in part]
        assert inputs[: len(flat)].tolist() == flat
        assert targets[: len(flat)].tolist() == [t for part in stream for t in [*part[1:], EOT]]
        assert weights.tolist() == [1] * len(flat) + [0] * (len(weights) - len(flat))
        assert resets[: len(flat)].tolist() == [int(n == 0) for part in stream for n in range(len(part))]
        assert (inputs[len(flat) :] == EOT).all() and (targets[len(flat) :] == EOT).all()
    assert whole[3].sum() == sum(len(piece) + 1 for piece in pieces)
    for world in (2, 4, 8):
        if lanes % world == 0:
            ranks = [
                columns_of(list(held_out_windows(corpus, rank=r, world_size=world, **options))) for r in range(world)
            ]
            assert np.array_equal(np.concatenate(ranks, axis=-1), whole)


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
    assert totals[0] > min(limit, 112) - 4  # cut to whole columns of at most four lanes


def test_loss_weights_of_the_store_count(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[5, 6], [7]], counted=[[0, 1, 1], [1, 0]])
    whole = columns_of(list(held_out_windows(corpus, lanes=2, window=4)))
    assert whole[1][:, 0].tolist() == [5, 6, EOT, EOT] and whole[3][:, 0].tolist() == [0, 1, 1, 0]
    assert whole[1][:, 1].tolist() == [7, EOT, EOT, EOT] and whole[3][:, 1].tolist() == [1, 0, 0, 0]


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
