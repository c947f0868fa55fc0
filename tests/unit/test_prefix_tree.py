"""Many sequences scored through a prefix tree: as each alone, and no shared beginning is read twice.

Axes: T tokens.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptb_ds import prefix_tree
from gptb_ds.prefix_tree import PrefixReader
from tests.harness.models import V, random_ids, small_gptb

MODEL = small_gptb(torch.float64)
SEQUENCES = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=9).flatmap(
        lambda tokens: st.tuples(st.just(tokens), st.integers(1, len(tokens)))
    ),
    min_size=1,
    max_size=12,
)


@torch.no_grad()
def alone(sequence: list[int], first: int) -> tuple[float, bool]:
    log_probs_TV = MODEL(torch.tensor([sequence])).logits[0].log_softmax(-1)
    scored = [
        (float(log_probs_TV[t - 1, sequence[t]]), int(log_probs_TV[t - 1].argmax()))
        for t in range(first, len(sequence))
    ]
    likeliest = all(best == token for (_, best), token in zip(scored, sequence[first:], strict=True))
    return sum(gain for gain, _ in scored), likeliest


@given(given=SEQUENCES, lanes=st.integers(1, 5), window=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_score_is_that_of_the_sequence_alone(given: list[tuple[list[int], int]], lanes: int, window: int) -> None:
    sequences, firsts = [tokens for tokens, _ in given], [first for _, first in given]
    reader = PrefixReader(MODEL, lanes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "WINDOW", window)
        scores = reader.score(sequences, firsts)
        states = PrefixReader(MODEL, lanes).states([*sequences, []])
    for (total, likeliest), sequence, first in zip(scores, sequences, firsts, strict=True):
        expected, expected_likeliest = alone(sequence, first)
        assert total == pytest.approx(expected) and likeliest == expected_likeliest
    for state, sequence in zip(states, sequences, strict=False):
        torch.testing.assert_close(state, MODEL(torch.tensor([sequence])).past_hidden_states[0])
    torch.testing.assert_close(states[-1], MODEL.transformer.initial_embeds.detach())
    # Every token that another one follows is read once for each different beginning.
    assert reader.tokens_read == len({tuple(s[:t]) for s in sequences for t in range(1, len(s))})


def test_hundreds_of_questions_with_the_same_examples_read_them_once() -> None:
    examples = random_ids(1, 300)[0].tolist()
    questions = [[*examples, number % V, number // V] for number in range(200)]
    reader = PrefixReader(MODEL, 32)
    scores = reader.score([[*question, answer] for question in questions for answer in (3, 4, 5)], [302] * 600)
    assert reader.tokens_read <= 300 + 2 * 200
    assert scores[7][0] == pytest.approx(alone([*questions[2], 4], 302)[0])


def test_a_long_chain_of_beginnings_is_no_deep_recursion() -> None:
    row = random_ids(1, 1100)[0].tolist()
    reader = PrefixReader(small_gptb(n_layer=1), 4)
    scores = reader.score([row[:end] for end in range(2, 1101)], [1] * 1099)
    assert reader.tokens_read == 1099 and scores[0][0] > scores[-1][0]
