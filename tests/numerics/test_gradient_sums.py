"""Gradients through time are summed in float32, and equal to autograd's where that has the bits.

Axes: B lanes, K steps, S slots, E embedding.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from gptb_ds.model import gradient_sums
from gptb_ds.model import objective as objective_module
from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective

V, S, E, B = 37, 6, 32, 8
# The bias of the keys has no gradient: a softmax does not see what is added to all scores of a row.
WITHOUT_GRADIENT = "c_attn.bias"


def gradients(
    dtype: torch.dtype, steps: int, fp32_sums: bool | None, recompute: int = 0, compiled: bool = False, **config
) -> dict:
    """Of the mean loss over one window, by name; weights are numbers that bfloat16 has."""
    torch.manual_seed(0)
    model = GPTBLMHeadModel(
        GPTBConfig(vocab_size=V, n_positions=S, num_slots=S, n_layer=2, n_head=2, n_embd=E, dropout=0.0, **config)
    )
    model = model.bfloat16().to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(V, (2, steps, B), generator=generator)
    reset = torch.rand((steps, B), generator=generator) < 0.1
    if compiled:
        model.compile_step(backend="aot_eager")
    objective = WindowObjective(model, recompute, fp32_sums)
    loss, _ = objective(ids, targets, reset, torch.zeros((B, S - 1, E), dtype=dtype))
    (loss / (steps * B)).backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


def error(found: dict, want: dict) -> float:
    """Relative, of the whole gradient."""
    return (
        float(sum((found[n] - want[n]).square().sum() for n in want) / sum(w.square().sum() for w in want.values()))
        ** 0.5
    )


@pytest.mark.parametrize("recompute", [0, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pieces", [False, True])
def test_the_sums_equal_the_plain_path(recompute, tied, pieces, monkeypatch):
    if pieces:
        monkeypatch.setattr(objective_module, "HEAD_ELEMENTS", 20 * V)
    want = gradients(torch.float64, 11, fp32_sums=False, tie_word_embeddings=tied)
    found = gradients(torch.float64, 11, fp32_sums=True, recompute=recompute, tie_word_embeddings=tied)
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_a_decoder_with_a_gate_keeps_its_gradients():
    config = {"recent_tokens": 2, "preserve_decoder": True}
    want = gradients(torch.float64, 7, fp32_sums=False, **config)
    found = gradients(torch.float64, 7, fp32_sums=True, **config)
    assert want["transformer.state_gate"].abs().max() > 0
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_bf16_gradients_of_a_long_window_are_right():
    want = gradients(torch.float64, 512, fp32_sums=False)
    plain = gradients(torch.bfloat16, 512, fp32_sums=False)
    summed = gradients(torch.bfloat16, 512, fp32_sums=None)  # bf16 asks for it
    # What is left is the noise of bf16's activations, the same at any K.
    assert error(summed, want) < 0.02 < error(plain, want)
    for name, gradient in want.items():
        if not name.endswith(WITHOUT_GRADIENT):
            ratio = summed[name].norm() / gradient.norm()
            assert 0.97 < ratio < 1.03, f"{name}: the gradient's norm is {ratio:.3f} of the truth"


def test_each_parameter_gets_its_gradient_once():
    """DeepSpeed's hooks count on it."""
    torch.manual_seed(0)
    model = GPTBLMHeadModel(
        GPTBConfig(vocab_size=V, n_positions=S, num_slots=S, n_layer=1, n_head=2, n_embd=E)
    ).bfloat16()
    calls: dict[str, int] = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, n=name: calls.update({n: calls.get(n, 0) + 1}))
    ids = torch.randint(V, (9, B))
    loss, _ = WindowObjective(model, 4)(ids, ids, torch.zeros_like(ids, dtype=torch.bool), model.empty_state(B))
    loss.backward()
    assert calls == dict.fromkeys(dict(model.named_parameters()), 1)


def test_the_head_in_pieces_has_no_backward_that_fills_the_whole_window(monkeypatch):
    monkeypatch.setattr(objective_module, "HEAD_ELEMENTS", 20 * V)
    model = GPTBLMHeadModel(GPTBConfig(vocab_size=V, n_positions=S, num_slots=S, n_layer=1, n_head=2, n_embd=E))
    ids = torch.randint(V, (12, B))
    weights = torch.ones((12, B))
    loss, _ = WindowObjective(model)(ids, ids, torch.zeros_like(ids, dtype=torch.bool), model.empty_state(B), weights)
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert any("SplitBackward" in name for name in names)
    assert not any("SliceBackward" in name for name in names), names


@pytest.mark.parametrize("recompute", [0, 4])
def test_nothing_of_a_window_is_left_when_it_is_through(recompute, monkeypatch):
    """Without Python's garbage collector, which would find it late: on a GPU it holds memory, and a graph's stream."""
    made = []

    class Watched(gradient_sums._Sum):
        def __init__(self, parameter):
            super().__init__(parameter)
            made.append(weakref.ref(self))

    monkeypatch.setattr(gradient_sums, "_Sum", Watched)
    gc.disable()
    try:
        gradients(torch.bfloat16, 9, fp32_sums=True, recompute=recompute)
        assert made and not any(sum_() for sum_ in made)
    finally:
        gc.enable()
