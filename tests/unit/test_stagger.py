"""Shows that lanes out of step read every token once an epoch, on any ranks, from any position, and reset evenly.

Axes: B lanes, T columns of a lane.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gptb_ds.data.collator import LaneCollator
from gptb_ds.data.corpus import Corpus
from gptb_ds.data.document_order import ShuffledOrder
from gptb_ds.data.stagger import StaggeredOrder
from tests.harness.stores import EOT, make_corpus, numbered_documents, together


@pytest.fixture(scope="module", autouse=True)
def short_blocks() -> Iterator[None]:
    """Three windows are made at a time, so that every test crosses the edges of blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptb_ds.data.collator._BLOCK_WINDOWS", 3)
        yield


def reading_of(corpus: Corpus, lane: int, lanes: int, seed: int, limit: int | None, columns: int) -> list[tuple]:
    """What a lane reads, by its definition: (source, first token, number of tokens) of each piece, in order."""
    shuffled = ShuffledOrder(corpus.pieces(limit), seed, corpus.shares)
    staggered = StaggeredOrder(shuffled, lanes, seed)
    size, pieces, read, epoch = shuffled.count, [], 0, 0
    while read < columns:
        own = np.array([j for j in range(epoch * size, (epoch + 1) * size) if j % lanes == lane], dtype=np.int64)
        found = [list(map(int, piece)) for piece in zip(*shuffled(own), strict=True)]
        if found:
            source, start, length = found[0]
            tail = int(staggered(own[:1])[1][0])  # where the lane enters the first one
            assert start <= tail < start + length
            found[0] = [source, tail, start + length - tail]
            if tail > start:
                found.append([source, start, tail - start + 1])
        pieces += [(source, start + 1, length - 1) for source, start, length in found]
        read += sum(length for _, _, length in found)
        epoch += 1
    return pieces


def columns_of(corpus: Corpus, pieces: list[tuple]) -> np.ndarray:
    """Inputs, targets, resets and weights (4, T) of these pieces."""
    stream: list[tuple[int, int, int, int]] = []
    for source, first, count in pieces:
        store = corpus.stores[source]
        tokens = [int(t) for t in store.tokens[first : first + count]]
        if store.counted is None:
            flags = [1] * (count + 1)
        else:
            flags = [int(f) for f in store.counted[first : first + count + 1]]
            if store.tokens[first + count] != EOT:
                flags[-1] = flags[-2]
        stream += zip([EOT, *tokens], [*tokens, EOT], [1] + [0] * count, flags, strict=True)
    return np.array(stream).T


def take(collator: LaneCollator, windows: int) -> np.ndarray:
    """Inputs, targets, resets and weights (4, T, B)."""
    parts = [collator.next_window() for _ in range(windows)]
    ones = [torch.ones_like(w.input_ids) if w.loss_weights is None else w.loss_weights for w in parts]
    fields = [[w.input_ids for w in parts], [w.targets for w in parts], [w.reset for w in parts], ones]
    return np.stack([torch.cat(field).numpy().astype(np.int64) for field in fields])


@settings(max_examples=8, deadline=None, phases=[Phase.generate])
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=15),
    more=st.lists(st.integers(0, 30), max_size=5),
    lanes=st.integers(1, 9),
    window=st.integers(1, 8),
    limit=st.one_of(st.none(), st.integers(1, 12)),
    seed=st.integers(0, 2**63 - 1),
    masked=st.booleans(),
)
def test_windows_equal_the_definition(
    lengths: list[int], more: list[int], lanes: int, window: int, limit: int | None, seed: int, masked: bool
) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        corpora = [
            make_corpus(
                Path(folder),
                numbered_documents(ns),
                counted=[rng.integers(0, 2, n + 1).tolist() for n in ns] if masked else None,
            )
            for ns in (lengths, more)
            if ns
        ]
        corpus = together(corpora, None)
        options: dict[str, Any] = {"lanes": lanes, "window": window, "seed": seed, "max_document_tokens": limit}
        windows = 1 + 60 // window
        got = take(LaneCollator(corpus, stagger=True, **options), windows)
        for lane in range(lanes):
            pieces = reading_of(corpus, lane, lanes, seed, limit, windows * window)
            assert np.array_equal(got[:, :, lane], columns_of(corpus, pieces)[:, : windows * window])


@settings(max_examples=8, deadline=None, phases=[Phase.generate])
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=15),
    lanes=st.integers(1, 20),
    limit=st.one_of(st.none(), st.integers(1, 9)),
    seed=st.integers(0, 2**32),
)
def test_every_token_comes_once_an_epoch(lengths: list[int], lanes: int, limit: int | None, seed: int) -> None:
    """From the order alone: each lane is followed through three epochs, and what it read is counted."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder), numbered_documents(lengths))
        shuffled = ShuffledOrder(corpus.pieces(limit), seed)
        order = StaggeredOrder(shuffled, lanes, seed)
        read: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(4)}
        for lane in range(lanes):
            ordinal = np.array([lane])
            while (epoch := int(ordinal[0]) % (lanes << 40) // shuffled.count) < 3:
                assert ordinal[0] % lanes == lane
                _, start, length = order(ordinal)
                read[epoch].update(range(int(start[0]) + 1, int(start[0] + length[0])))
                ordinal = order.after(ordinal)
        places = [n for n, token in enumerate(corpus.stores[0].tokens) if token != EOT]
        for epoch in range(3):
            assert read[epoch] == Counter(places)


@pytest.mark.parametrize(("limit", "shares"), [(None, None), (5, None), (5, (3.0, 1.0))])
def test_restored_at_every_edge_on_other_world_sizes(tmp_path: Path, limit: int | None, shares: Any) -> None:
    corpus = together(
        [make_corpus(tmp_path, numbered_documents(ns)) for ns in ([0, 1, 2, 3, 40, 9, 9, 0, 5], [3, 0, 8])], shares
    )
    lanes, window, total = 12, 4, 8

    def collators(world: int) -> list[LaneCollator]:
        options: dict[str, Any] = {"lanes": lanes, "window": window, "seed": 5, "max_document_tokens": limit}
        return [LaneCollator(corpus, rank=r, world_size=world, stagger=True, **options) for r in range(world)]

    straight = collators(1)[0]
    positions, windows = [straight.state_dict()], []
    for _ in range(total):
        windows.append(take(straight, 1))
        positions.append(straight.state_dict())
    everything = np.concatenate(windows, axis=1)
    for edge in range(total):
        for world in (1, 3, 12):
            share = lanes // world
            for rank, collator in enumerate(collators(world)):
                own = slice(rank * share, (rank + 1) * share)
                state = {name: tensor[own] for name, tensor in positions[edge].items()}
                collator.load_state_dict(state)
                assert all(torch.equal(collator.state_dict()[name], state[name]) for name in state)
                rest = everything[:, edge * window : (edge + 2) * window, own]
                assert np.array_equal(take(collator, rest.shape[1] // window), rest)


def test_resets_spread_over_the_columns(tmp_path: Path) -> None:
    """512 lanes over pieces of 64: in step they all reset in one column of 65, out of step a few in every one."""
    corpus = make_corpus(tmp_path, numbered_documents([6400] * 60))
    options: dict[str, Any] = {"lanes": 512, "window": 1, "seed": 0, "max_document_tokens": 64}
    in_step, out_of_step = (
        take(LaneCollator(corpus, stagger=stagger, **options), 260)[2].sum(1) for stagger in (False, True)
    )
    assert in_step.max() == 512 and np.count_nonzero(in_step) == 4
    assert out_of_step[0] == 512  # every lane begins, but in the midst of a document
    assert out_of_step[1:].max() < 40 and np.count_nonzero(out_of_step) > 240


def test_a_run_in_step_and_one_out_of_step_are_not_the_same(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, numbered_documents([9, 9]))
    prints = {LaneCollator(corpus, lanes=2, window=2, seed=0, stagger=stagger).fingerprint for stagger in (False, True)}
    assert len(prints) == 2
