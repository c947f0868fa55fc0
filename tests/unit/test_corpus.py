"""Shows that a corpus of several stores adds them up and takes only stores that fit together."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from gptb_ds.data.collator import LaneCollator
from gptb_ds.data.corpus import open_corpus
from gptb_ds.data.document_order import MIX_BLOCK, ShuffledOrder
from gptb_ds.data.documents import open_store
from tests.harness.stores import make_corpus, numbered_documents, together, write_store


def test_one_path_is_a_store_and_several_are_a_mixture(tmp_path: Path) -> None:
    one, two = write_store(tmp_path, numbered_documents([3, 4])), write_store(tmp_path, numbered_documents([9]))
    assert open_corpus([one]).fingerprint == open_store(one).fingerprint
    mixture = open_corpus([str(one), two], [3.0, 1.0])
    assert len(mixture.stores) == 2
    assert (mixture.num_documents, mixture.num_tokens, mixture.num_bytes) == (3, 16, 16)
    assert together([mixture], None).bytes_per_target() == 16 / 19
    assert (mixture.vocab_size, mixture.eot_id, mixture.tokenizer, mixture.stores[1].split) == (
        300,
        1,
        "numbers",
        "train",
    )
    assert mixture.shares == (0.75, 0.25)
    prints = {open_corpus([one, two], w).fingerprint for w in (None, [1, 1], [1, 2])}
    assert len(prints) == 3
    assert open_corpus([one, two], [2, 4]).fingerprint in prints  # shares, whatever their scale


def test_shares_of_the_columns_are_the_weights(tmp_path: Path) -> None:
    few = write_store(tmp_path, [[2 + i % 100] * 9 for i in range(50)])
    many = write_store(tmp_path, [[200 + i % 50] * 99 for i in range(50)])
    collator = LaneCollator(open_corpus([few, many], [0.7, 0.3]), lanes=64, window=512, seed=0)
    ids = np.concatenate([collator.next_window().input_ids.numpy().ravel() for _ in range(12)])
    low, high = (
        np.count_nonzero((ids > 1) & (ids < 200)) / 9 * 10,
        np.count_nonzero(ids >= 200) / 99 * 100,
    )  # EOTs count
    assert abs(low / (low + high) - 0.7) < 0.02


def test_stores_with_and_without_loss_weights_mix(tmp_path: Path) -> None:
    plain = write_store(tmp_path, [[5] * 4])
    masked = write_store(tmp_path, [[7] * 4], counted=[[0, 0, 1, 1, 0]])
    window = LaneCollator(open_corpus([plain, masked]), lanes=4, window=50, seed=0).next_window()
    assert window.loss_weights is not None
    counted = window.loss_weights.numpy().astype(bool)
    is_seven = window.input_ids.numpy() == 7
    assert counted[window.targets.numpy() == 5].all()
    assert 0 < np.count_nonzero(counted & is_seven) < np.count_nonzero(is_seven)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], []])
def test_weights_that_do_not_fit(tmp_path: Path, weights: list[float]) -> None:
    paths = [write_store(tmp_path, [[5]]), write_store(tmp_path, [[6]])]
    with pytest.raises(ValueError, match="give one number above 0 for each of 2 stores"):
        open_corpus(paths, weights)


def test_unequal_tokenizers_and_no_path(tmp_path: Path) -> None:
    paths = [write_store(tmp_path, [[5]]), write_store(tmp_path, [[6]], tokenizer="letters")]
    with pytest.raises(ValueError, match=r"has the tokenizer letters, .* has numbers; a mixture needs equal"):
        open_corpus(paths)
    with pytest.raises(ValueError, match=r"data.path is empty"):
        open_corpus([])


def test_bytes_per_target_counts_pieces_and_shares(tmp_path: Path) -> None:
    """The tests' stores have a byte a token: n tokens have n+1 targets, and one more for each further piece."""
    one = open_corpus([write_store(tmp_path, numbered_documents([6, 1]))])
    two = open_corpus([write_store(tmp_path, numbered_documents([3]))])
    assert one.bytes_per_target() == 7 / 9
    assert one.bytes_per_target(2) == 7 / 11
    assert together([one, two], None).bytes_per_target(2) == 10 / 16
    shares = together([one, two], (0.25, 0.75)).bytes_per_target()
    assert shares == pytest.approx(0.25 * 7 / 9 + 0.75 * 3 / 4)


@pytest.mark.parametrize("weight", [math.nan, math.inf, 0.0, -1.0])
def test_weights_are_positive_numbers(tmp_path: Path, weight: float) -> None:
    path = write_store(tmp_path, numbered_documents([3]))
    with pytest.raises(ValueError, match="give one number above 0 for each"):
        open_corpus([path, path], [weight, 1.0])


def test_the_eot_of_a_cut_piece_counts_as_its_last_token(tmp_path: Path) -> None:
    """Prompt 11 12 13 14, answer 21 22; cut after every two tokens: the pieces of the prompt train no EOT."""
    corpus = open_corpus([write_store(tmp_path, [[11, 12, 13, 14, 21, 22]], counted=[[0, 0, 0, 0, 1, 1, 1]])])
    window = LaneCollator(corpus, lanes=1, window=27, seed=0, max_document_tokens=2).next_window()
    assert window.loss_weights is not None
    weight_of = {
        (inputs, target): weight
        for inputs, target, weight in zip(
            window.input_ids[:, 0].tolist(),
            window.targets[:, 0].tolist(),
            window.loss_weights[:, 0].tolist(),
            strict=True,
        )
    }
    assert weight_of == {
        **{(1, 11): 0, (11, 12): 0, (12, 1): 0},
        **{(1, 13): 0, (13, 14): 0, (14, 1): 0},
        **{(1, 21): 1, (21, 22): 1, (22, 1): 1},
    }


def test_shares_that_documents_cannot_meet_are_said(tmp_path: Path) -> None:
    """A store of one huge document is picked once in 65,536 times, and is most of what is read all the same."""
    corpora = [make_corpus(tmp_path / "book", [[1] * 1_000_000]), make_corpus(tmp_path / "notes", [[2] * 9] * 50)]
    whole = together(corpora, [0.5, 0.5])
    book, notes = whole.missed_shares(None)
    assert (
        f"{corpora[0].stores[0].path} will be 60.4% of what is read, not 50.0%" in book
    )  # 1,000,001 / (... + 65,535 * 10)
    assert f"{corpora[1].stores[0].path} will be 39.6%" in notes
    assert whole.missed_shares(1000) == []
    assert together(corpora, None).missed_shares(None) == []


def test_weights_of_any_size_are_shares(tmp_path: Path) -> None:
    corpora = [make_corpus(tmp_path / name, [[1] * 9] * 5) for name in ("a", "b")]
    assert together(corpora, [1e308, 1e308]).shares == (0.5, 0.5)
    assert together(corpora, [5e-324, 5e-324]).shares == (0.5, 0.5)
    order = ShuffledOrder(together(corpora, [1e308, 1e308]).pieces(None), 1, together(corpora, [1e308, 1e308]).shares)
    assert np.bincount(order(np.arange(MIX_BLOCK))[0]).tolist() == [MIX_BLOCK // 2] * 2
