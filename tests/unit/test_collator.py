"""Shows that windows are exact (against a brute-force reference), elastic, resumable at every edge, and prefetched.

Axes: B lanes, K steps, T columns of a lane.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptb_ds.data.collator import LaneCollator
from gptb_ds.data.corpus import Corpus
from gptb_ds.data.document_order import Pieces, ShuffledOrder
from gptb_ds.data.window import Window
from tests.harness.stores import EOT, make_corpus, numbered_documents, together


@pytest.fixture(scope="module", autouse=True)
def short_blocks() -> Iterator[None]:
    """Three windows are made at a time, so that every test crosses the edges of blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptb_ds.data.collator._BLOCK_WINDOWS", 3)
        yield


def reference_lane(corpus: Corpus, lane: int, lanes: int, seed: int, columns: int, limit: int | None) -> np.ndarray:
    """Inputs, targets, resets, weights and ordinal (5, T) of one lane, token by token."""
    order = ShuffledOrder([Pieces(s.offsets, limit) for s in corpus.stores], seed, corpus.shares)
    stream: list[tuple[int, int, int, int, int]] = []
    ordinals = np.arange(lane, lane + columns * lanes, lanes)  # a document has at least one column
    for j, source, start, length in zip(ordinals, *order(ordinals), strict=True):
        store = corpus.stores[source]
        tokens = [int(t) for t in store.tokens[start + 1 : start + length]]
        flags = [1] * length if store.counted is None else store.counted[start + 1 : start + length + 1].tolist()
        if store.counted is not None and store.tokens[start + length] != EOT:  # cut: as its last token
            flags[-1] = int(store.counted[start + length - 1])
        resets = [1] + [0] * len(tokens)
        stream += zip([EOT, *tokens], [*tokens, EOT], resets, flags, [j] * length, strict=True)
        if len(stream) >= columns:
            break
    return np.array(stream[:columns]).T


def joined(windows: list[Window]) -> np.ndarray:
    """Inputs, targets, resets, weights (4, T, B) of windows one after another."""
    ones = [torch.ones_like(w.input_ids) if w.loss_weights is None else w.loss_weights for w in windows]
    fields = [
        torch.cat([w.input_ids for w in windows]),
        torch.cat([w.targets for w in windows]),
        torch.cat([w.reset for w in windows]),
        torch.cat(ones),
    ]
    return np.stack([f.numpy().astype(np.int64) for f in fields])


def take(collator: LaneCollator, count: int) -> np.ndarray:
    """The next `count` windows, joined."""
    return joined([collator.next_window() for _ in range(count)])


def lengths_around(window: int, longest: int) -> st.SearchStrategy[list[int]]:
    edges = [0, 1, 2, window - 1, window, window + 1, 2 * window, 3 * window + 1]
    return st.lists(st.one_of(st.sampled_from(edges), st.integers(0, longest)), min_size=1, max_size=25)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    window = draw(st.integers(1, 9))
    return {
        "window": window,
        "lengths": [draw(lengths_around(window, 40)) for _ in range(draw(st.sampled_from([1, 1, 2, 3])))],
        "lanes": draw(st.integers(1, 12)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "limit": draw(st.one_of(st.none(), st.integers(1, 12))),
        "weighted": draw(st.booleans()),
        "masked": draw(st.booleans()),
    }


def corpus_of(case: dict, folder: Path) -> Corpus:
    rng = np.random.default_rng(case["seed"])
    stores = []
    for lengths in case["lengths"]:
        masks = [rng.integers(0, 2, n + 1).tolist() for n in lengths] if case["masked"] else None
        stores.append(make_corpus(folder, numbered_documents(lengths), counted=masks))
    return together(stores, [s + 1.0 for s in range(len(stores))] if case.get("weighted") else None)


def check_exact(case: dict, corpus: Corpus, windows: int) -> np.ndarray:
    lanes, window, seed, limit = case["lanes"], case["window"], case["seed"], case["limit"]
    collator = LaneCollator(corpus, lanes=lanes, window=window, seed=seed, max_document_tokens=limit)
    got = take(collator, windows)
    expected = [reference_lane(corpus, lane, lanes, seed, windows * window + 1, limit) for lane in range(lanes)]
    assert np.array_equal(got, np.stack([lane[:4, :-1] for lane in expected], axis=-1))
    assert collator.state_dict()["ordinal"].tolist() == [lane[4, -1] for lane in expected]
    return got


def check_case(case: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        got = check_exact(case, corpus_of(case, Path(folder)), 2 + 60 // (case["window"] * case["lanes"]))
        inputs, targets, resets = got[0], got[1], got[2]
        inside = resets[1:] == 0
        assert np.array_equal(targets[:-1][inside], inputs[1:][inside])
        assert (inputs[resets == 1] == EOT).all() and (targets[:-1][~inside] == EOT).all()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_windows_equal_the_brute_force_reference(case: dict) -> None:
    check_case(case)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_windows_equal_the_brute_force_reference_in_many_cases(case: dict) -> None:
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "window"), [(1, 64), (2, 1000), (3, 7)])
def test_windows_with_very_long_documents(tmp_path: Path, lanes: int, window: int) -> None:
    lengths = [0, 1, 2, window - 1, window, window + 1, 100_000, 5, 0, 20_000]
    case = {"lengths": [lengths], "lanes": lanes, "window": window, "seed": 9, "limit": None, "masked": False}
    check_exact(case, corpus_of(case, tmp_path), 1 + 130_000 // window)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_every_document_comes_once_an_epoch_in_one_lane(case: dict) -> None:
    """Read back from the columns alone: cut at the resets, the documents of each epoch are the corpus."""
    lengths = case["lengths"][0]
    documents = [tuple(d) for d in numbered_documents(lengths)]
    lanes, count = case["lanes"], len(lengths)
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder), documents)
        collator = LaneCollator(corpus, lanes=lanes, window=case["window"], seed=case["seed"])
        # Enough for every lane to end its share of two epochs.
        columns = (2 * count // lanes + 2) * (max(lengths) + 1) + case["window"]
        inputs, targets, resets, _ = take(collator, -(-columns // case["window"]))
    sequence: dict[int, tuple[int, ...]] = {}
    for lane in range(lanes):
        starts = np.flatnonzero(resets[:, lane]).tolist()
        for nth, (start, end) in enumerate(pairwise(starts)):
            assert [*inputs[start + 1 : end, lane], EOT] == targets[start:end, lane].tolist()
            sequence[lane + nth * lanes] = tuple(inputs[start + 1 : end, lane].tolist())
    for epoch in range(2):
        assert Counter(sequence[j] for j in range(epoch * count, (epoch + 1) * count)) == Counter(documents)


@pytest.mark.parametrize(
    "world_sizes",
    [pytest.param((1, 2, 3, 7, 64), id="some"), pytest.param(range(1, 65), id="all", marks=pytest.mark.slow)],
)
def test_same_columns_on_every_world_size(tmp_path: Path, world_sizes: Sequence[int]) -> None:
    corpus = make_corpus(tmp_path, numbered_documents([0, 1, 2, 6, 7, 8, 100, 13, 13, 0, 5]))
    for world in world_sizes:
        lanes, limit = world * 3, 6 if world % 2 else None
        whole = LaneCollator(corpus, lanes=lanes, window=7, seed=11, max_document_tokens=limit)
        parts = [
            LaneCollator(corpus, lanes=lanes, window=7, seed=11, rank=r, world_size=world, max_document_tokens=limit)
            for r in range(world)
        ]
        for _ in range(4):
            assert np.array_equal(take(whole, 1), np.concatenate([take(part, 1) for part in parts], axis=-1))


@pytest.mark.parametrize("worlds", [(1, 4), pytest.param((1, 2, 3, 6, 12), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("limit", "weights", "masked"), [(None, None, False), (5, None, True), (None, (3.0, 1.0), True)]
)
def test_restored_at_every_edge_on_other_world_sizes(
    tmp_path: Path, limit: int | None, weights: tuple[float, ...] | None, masked: bool, worlds: tuple[int, ...]
) -> None:
    """Past two epochs' ends; each position restored twice in a row, and saved again right away."""
    lengths = [0, 1, 2, 3, 4, 5, 40, 9, 9, 0, 5]
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 2, n + 1).tolist() for n in lengths] if masked else None
    corpus: Corpus = make_corpus(tmp_path, numbered_documents(lengths), counted=masks)
    if weights:
        corpus = together([corpus, make_corpus(tmp_path, numbered_documents([3, 0, 8]))], weights)
    lanes, window, total = 12, 4, 11  # 528 inputs: five epochs of 89

    def collators(world: int) -> list[LaneCollator]:
        options = {"lanes": lanes, "window": window, "seed": 5, "max_document_tokens": limit}
        return [LaneCollator(corpus, rank=r, world_size=world, **options) for r in range(world)]  # type: ignore[arg-type]

    straight = collators(1)[0]
    positions, windows = [straight.state_dict()], []
    for _ in range(total):
        windows.append(take(straight, 1))
        positions.append(straight.state_dict())
    everything = np.concatenate(windows, axis=1)
    for edge in range(total):
        for world in worlds:
            share = lanes // world
            for rank, collator in enumerate(collators(world)):
                own = slice(rank * share, (rank + 1) * share)
                state = {name: tensor[own] for name, tensor in positions[edge].items()}
                rest = everything[:, edge * window : (edge + 2) * window, own]
                for _ in range(2):
                    collator.load_state_dict(state)
                    assert all(torch.equal(collator.state_dict()[name], state[name]) for name in state)
                    assert np.array_equal(take(collator, len(rest[0]) // window), rest)
    for edge in range(total):  # and the whole remainder
        straight.load_state_dict(positions[edge])
        assert np.array_equal(take(straight, total - edge), everything[:, edge * window :])


def test_a_position_of_something_else_is_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, numbered_documents([3, 4, 5]))
    collator = LaneCollator(corpus, lanes=4, window=2, seed=0, rank=1, world_size=2)
    good = collator.state_dict()
    for wrong, message in [
        ({**good, "ordinal": good["ordinal"] - 2}, "not one of lanes 2 to 3"),
        ({**good, "ordinal": good["ordinal"] - 4}, "not one of lanes 2 to 3"),
        ({**good, "offset": good["offset"] + 99}, "beyond a document's end"),
        ({**good, "offset": good["offset"] - 1}, "beyond a document's end"),
        ({name: tensor[:1] for name, tensor in good.items()}, "1 lanes, but this rank has 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            collator.load_state_dict(wrong)
    assert all(torch.equal(collator.state_dict()[name], good[name]) for name in good)
    with pytest.raises(ValueError, match="cannot be shared by 3 ranks"):
        LaneCollator(corpus, lanes=4, window=2, seed=0, rank=0, world_size=3)


def test_window_types_and_fingerprint(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, numbered_documents([3, 4, 5]))
    window = LaneCollator(corpus, lanes=4, window=2, seed=0).next_window()
    assert window.input_ids.shape == window.targets.shape == window.reset.shape == (2, 4)
    assert window.input_ids.dtype == window.targets.dtype == torch.int64
    assert window.reset.dtype == torch.bool and window.loss_weights is None
    assert window.input_ids.is_contiguous() and window.targets.is_contiguous() and window.reset.is_contiguous()
    other = make_corpus(tmp_path, numbered_documents([3, 4, 6]))

    def fingerprint(corpus: Corpus, **options: int) -> str:
        return LaneCollator(corpus, **{"lanes": 4, "window": 2, "seed": 0, **options}).fingerprint

    prints = [
        fingerprint(c) for c in (corpus, other, together([corpus, other], None), together([corpus, other], [1, 2]))
    ]
    prints.append(fingerprint(corpus, max_document_tokens=3))
    assert len(set(prints)) == 5
    again = make_corpus(tmp_path, numbered_documents([3, 4, 5]))  # equal content at another place
    assert fingerprint(again, seed=3, window=9) == prints[0]


def test_reading_ahead_gives_the_same_windows_and_positions(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, numbered_documents([0, 1, 2, 30, 7]))

    plain = LaneCollator(corpus, lanes=6, window=5, seed=2)
    ahead = LaneCollator(corpus, lanes=6, window=5, seed=2, ahead=3)
    for _ in range(12):
        assert np.array_equal(take(plain, 1), take(ahead, 1))
        for name, tensor in plain.state_dict().items():
            assert torch.equal(tensor, ahead.state_dict()[name])
    saved, rest = plain.state_dict(), take(plain, 3)
    ahead.load_state_dict(saved)
    ahead.load_state_dict(saved)
    assert np.array_equal(take(ahead, 3), rest)
    ahead.load_state_dict(saved)
    ahead.close()  # windows made ahead are dropped, the position is not
    ahead.close()
    assert np.array_equal(take(ahead, 3), rest)
    assert ahead.wait_seconds >= 0
    ahead.close()
    assert not any(thread.name == "windows" for thread in threading.enumerate())


def test_reading_ahead_raises_what_went_wrong_in_its_thread(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, numbered_documents([30, 7]))
    ahead = LaneCollator(corpus, lanes=2, window=5, seed=2, ahead=2)
    ahead.next_window()
    ahead.close()
    (store,) = corpus.stores
    assert len(store.tokens) == 40
    store.tokens = store.tokens[:10]  # as if the file had shrunk under us
    with pytest.raises(IndexError):
        for _ in range(20):
            ahead.next_window()
    assert not any(thread.name == "windows" for thread in threading.enumerate())


def test_reading_ahead_ends_while_it_waits_for_room(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, numbered_documents([30, 7]))
    ahead = LaneCollator(corpus, lanes=2, window=5, seed=2, ahead=1)
    ahead.next_window()
    began = time.monotonic()
    ahead.close()  # while the thread waits for room
    assert time.monotonic() - began < 30
