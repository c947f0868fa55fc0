"""The baselines read a window as their plain libraries read each document in it, and carry what they should."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config

from gptb_ds.baselines import GPT2Baseline, LSTMBaseline, LSTMConfig, _from_digits, _to_digits

# Where lanes 0, 1 and 2 start a document in a window of ten columns.
STARTS = {0: [0], 1: [0, 4], 2: [0, 7, 8]}


@pytest.fixture(scope="module")
def window() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    reset_KB = torch.zeros(10, 3, dtype=torch.bool)
    for lane, columns in STARTS.items():
        reset_KB[columns, lane] = True
    return torch.randint(0, 50, (10, 3)), reset_KB


def documents() -> list[tuple[int, int, int]]:
    """Lane, first column and end of each document of the window."""
    return [(lane, a, b) for lane, starts in STARTS.items() for a, b in zip(starts, [*starts[1:], 10], strict=True)]


def test_gpt2_reads_each_document_of_a_window_alone(window):
    ids_KB, reset_KB = window
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2Baseline(config).eval().double()
    hidden_KBE, state = model.unroll(ids_KB, model.empty_state(3), reset_KB)
    assert state.shape == (3, 0, 32)
    for lane, first, end in documents():
        alone_TE = model.transformer(ids_KB[first:end, lane][None]).last_hidden_state[0]
        torch.testing.assert_close(hidden_KBE[first:end, lane], alone_TE, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="20 columns is beyond n_positions 16"):
        model.unroll(ids_KB.repeat(2, 1), state, reset_KB.repeat(2, 1))


def test_the_lstm_carries_its_state_and_drops_it_at_a_reset(window):
    ids_KB, reset_KB = window
    model = LSTMBaseline(LSTMConfig(vocab_size=50, n_embd=32, n_layer=2)).eval().double()
    hidden_KBE, state = model.unroll(ids_KB, model.empty_state(3), reset_KB)
    for lane, first, end in documents():
        alone_T1E, _ = model.lstm(model.wte(ids_KB[first:end, lane : lane + 1]))
        torch.testing.assert_close(hidden_KBE[first:end, lane : lane + 1], alone_T1E, rtol=1e-12, atol=1e-12)
    half_KBE, half = model.unroll(ids_KB[:5], model.empty_state(3), reset_KB[:5])
    rest_KBE, whole = model.unroll(ids_KB[5:], half, reset_KB[5:])
    torch.testing.assert_close(torch.cat((half_KBE, rest_KBE)), hidden_KBE, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole, state, rtol=1e-12, atol=1e-12)


def test_a_layer_of_the_lstm_is_as_large_as_a_block_of_gpt2():
    for width in (32, 96, 128):
        gpt2 = GPT2Baseline(GPT2Config(vocab_size=50, n_embd=width, n_layer=3, n_head=2, n_positions=8))
        lstm = LSTMBaseline(LSTMConfig(vocab_size=50, n_embd=width, n_layer=3))
        sizes = [sum(p.numel() for p in m.parameters()) for m in (gpt2.transformer.h, lstm.lstm)]
        assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
        assert lstm.lm_head.weight is lstm.wte.weight


def test_gpt2_slides_its_context_over_windows_of_any_length(window):
    ids_KB, reset_KB = window
    config = GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0,
        carried_tokens=4, evaluation_stride=2,
    )  # fmt: skip
    model = GPT2Baseline(config).eval().double()
    assert model.empty_state(3).shape == (3, 6, 4)
    assert GPT2Baseline(config).train().empty_state(3).shape == (3, 4, 4)
    whole_KBE, state = model.unroll(ids_KB, model.empty_state(3), reset_KB)
    first_KBE, between = model.unroll(ids_KB[:4], model.empty_state(3), reset_KB[:4])
    rest_KBE, after = model.unroll(ids_KB[4:], between, reset_KB[4:])
    torch.testing.assert_close(torch.cat((first_KBE, rest_KBE)), whole_KBE, rtol=1e-12, atol=1e-12)
    assert torch.equal(state, after)
    for lane, first, end in documents():
        for column in range(first, end):
            # A chunk of two columns sees the six before it, as far as they are of the document.
            start = max(first, column // 2 * 2 - 6)
            alone_TE = model.transformer(ids_KB[start : column + 1, lane][None]).last_hidden_state[0]
            torch.testing.assert_close(whole_KBE[column, lane], alone_TE[-1], rtol=1e-12, atol=1e-12)


def test_carried_tokens_are_exact_in_every_type():
    ids_CB = torch.tensor([[0, 255, 256, 65535, 65536, 151_935]])
    reset_CB = ids_CB % 2 == 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ids, reset = _from_digits(_to_digits(ids_CB, reset_CB).to(dtype))
        assert torch.equal(ids, ids_CB)
        assert torch.equal(reset, reset_CB)


def test_gpt2s_residual_projections_start_as_small_as_in_transformers():
    config = GPT2Config(vocab_size=50, n_embd=64, n_layer=8, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    weight = GPT2Baseline(config).transformer.h[0].attn.c_proj.weight
    assert weight.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.1)
