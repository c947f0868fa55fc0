"""Documents that begin short and grow, and resets that are left out: functions of the content, the seed and L."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from gptb_ds.cli import main
from gptb_ds.data.collator import LaneCollator
from gptb_ds.data.corpus import Corpus, open_corpus
from gptb_ds.data.curriculum import Curriculum
from gptb_ds.data.tasks import parse_task
from gptb_ds.data.window import Window
from gptb_ds.training.length_curriculum import follow_accuracy, is_due, note_growth
from gptb_ds.training.train_state import TrainState
from tests.harness.training import train

LANES, WINDOW = 12, 5
GROWS_AFTER = (7, 8, 20)  # windows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    out = tmp_path_factory.mktemp("s3") / "store"
    assert main(["prepare", "--source", "task:s3?length=40&count=300", "--out", str(out)]) == 0
    return open_corpus([out])


def collator(corpus: Corpus, rank: int = 0, ranks: int = 1, ahead: int = 0, keep: float = 0.0) -> LaneCollator:
    curriculum = None if keep else Curriculum(4, 40)
    return LaneCollator(
        corpus, lanes=LANES, window=WINDOW, seed=3, rank=rank, world_size=ranks, ahead=ahead,
        curriculum=curriculum, keep_state_probability=keep,
    )  # fmt: skip


def read(windows: LaneCollator, first: int, end: int) -> list[Window]:
    """Windows number `first` to `end`, growing as the run of these tests does."""
    found = []
    for number in range(first, end):
        found.append(windows.next_window())
        if windows.curriculum is not None and number + 1 in GROWS_AFTER:
            windows.grow()
    return found


def columns(windows: list[Window]) -> tuple[torch.Tensor, ...]:
    """Inputs, targets and resets of windows one after another, each (T, lanes)."""
    return tuple(torch.cat([getattr(w, name) for w in windows]) for name in ("input_ids", "targets", "reset"))


def documents(windows: list[Window]) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """First column, inputs and targets of each document that is whole."""
    ids, targets, reset = columns(windows)
    found = []
    for lane in range(ids.shape[1]):
        starts = [*torch.nonzero(reset[:, lane]).flatten().tolist()]
        found += [(a, ids[a:b, lane], targets[a:b, lane]) for a, b in itertools.pairwise(starts)]
    return found


def test_documents_are_beginnings_that_grow_at_recorded_columns(corpus: Corpus):
    table, inputs = parse_task("task:s3").table, 6
    windows = collator(corpus)
    limits = [4, 8, 16, 32]
    edges = [0, *(WINDOW * n for n in GROWS_AFTER)]
    longest = dict.fromkeys(limits, 0)
    for column, ids, targets in documents(read(windows, 0, 60)):
        limit = limits[np.searchsorted(edges, column, side="right") - 1]
        assert 1 <= len(ids) - 1 <= limit
        longest[limit] = max(longest[limit], len(ids) - 1)
        state, answers = 0, [0]
        for x in (ids[1:] - 1).tolist():
            state = int(table[state, x])
            answers.append(state)
        assert targets.tolist() == [1 + inputs + answer for answer in answers]
    assert windows.curriculum is not None
    assert windows.curriculum.grown == tuple(edges[1:])
    assert longest[4] == 4
    assert longest[32] > 25


def test_lengths_stay_uniform(corpus: Corpus):
    lengths = np.arange(1, 41)
    for grown, limit in enumerate((4, 8, 16, 32, 40)):
        found = Curriculum(4, 40, (0,) * grown).cut(lengths + 1, np.zeros_like(lengths)) - 1
        counts = np.bincount(found)[1:]
        assert len(counts) == limit
        assert counts.max() - counts.min() <= 1
    assert Curriculum(4, 40, (0,) * 4).is_full
    assert Curriculum(4, 40, (0,) * 200).limit == 40


@pytest.mark.parametrize("keep", [0.0, 0.4])
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_reads_its_share_of_the_same_columns(corpus: Corpus, ranks: int, keep: float):
    whole = columns(read(collator(corpus, keep=keep), 0, 40))
    parts = [columns(read(collator(corpus, rank, ranks, ahead=rank, keep=keep), 0, 40)) for rank in range(ranks)]
    for one, *others in zip(whole, *parts, strict=True):
        assert torch.equal(one, torch.cat(others, dim=1))


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_a_restore_at_any_edge_goes_on_as_if_nothing_had_been(corpus: Corpus, ahead: int, keep: float):
    straight = collator(corpus, ahead=ahead, keep=keep)
    windows, saved = [], []
    for number in range(40):
        grown = () if straight.curriculum is None else straight.curriculum.grown
        saved.append((straight.state_dict(), straight.column, grown))
        windows += read(straight, number, number + 1)
    straight.close()
    for number, (position, column, grown) in enumerate(saved):
        again = collator(corpus, ahead=ahead, keep=keep)
        read(again, 0, 2)
        again.load_state_dict(position, column=column, grown=grown)
        assert again.column == column == number * WINDOW
        following = read(again, number, min(number + 15, 40))
        for one, other in zip(columns(following), columns(windows[number : number + 15]), strict=True):
            assert torch.equal(one, other)
        again.close()


def test_resets_are_left_out_as_often_as_asked_and_never_in_the_first_column(corpus: Corpus):
    ids, targets, reset = columns(read(collator(corpus, keep=0.4), 0, 400))
    with_resets = LaneCollator(corpus, lanes=LANES, window=WINDOW, seed=3)
    plain_ids, plain_targets, plain_reset = columns(read(with_resets, 0, 400))
    assert torch.equal(ids, plain_ids)
    assert torch.equal(targets, plain_targets)
    assert bool(reset[0].all())
    assert not bool((reset & ~plain_reset).any())
    left_out = 1 - reset.sum().item() / plain_reset.sum().item()
    assert left_out == pytest.approx(0.4, abs=0.05)


def test_documents_grow_at_the_running_accuracy_and_not_twice_at_once():
    state = TrainState()
    while not is_due(state, 0.95):
        follow_accuracy(state, 1.0)
    assert state.updates_since_growth == 29  # 1 - 0.9 ** 29 is the first above 0.95
    note_growth(state, 512, 0.95)
    assert (state.accuracy, state.grown) == (pytest.approx(0.90), [512])
    for _ in range(9):
        follow_accuracy(state, 1.0)
        assert not is_due(state, 0.95)
    follow_accuracy(state, 1.0)
    assert is_due(state, 0.95)
    assert TrainState.restored(TrainState(grown=[512], accuracy=0.5).saved()).grown == [512]


def test_text_is_never_cut_by_the_curriculum(store: Path, tmp_path: Path):
    train(tmp_path / "run", store, train__updates=4, task__curriculum="auto")
    assert "document_tokens" not in (tmp_path / "run" / "metrics.jsonl").read_text()
