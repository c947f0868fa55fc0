"""The compiled step: one compilation serves all columns of all windows, with the gradients of the plain path.

Axes: B lanes, K steps, S slots, E embedding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.compilation import compile_step
from tests.numerics.test_gradient_sums import WITHOUT_GRADIENT, error
from tests.numerics.test_gradient_sums import gradients as plain_gradients

V, S, E, B, K = 37, 6, 32, 8, 9
# Every way in which a state is handed on.
CARRIES = [{}, {"recent_tokens": 2}, {"carry": "shift"}, {"rebias": False}]


def train(dtype: torch.dtype, recompute: int, compilations: list[int] | None, windows: int = 3, **config: Any) -> tuple:
    """Losses of a few windows, the state going on, and the gradients of all of them together."""
    torch.manual_seed(0)
    shape = {"n_positions": S, "num_slots": S, "n_layer": 2, "n_head": 2, "n_embd": E}
    model = GPTBLMHeadModel(GPTBConfig(vocab_size=V, dropout=0.0, **shape, **config)).to(dtype).train()
    if compilations is not None:

        def counted(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            compilations.append(len(inputs))
            return aot_eager(graph, inputs)

        model.compile_step(backend=counted)
    objective, state_BSE, losses = WindowObjective(model, recompute), model.empty_state(B), []
    for number in range(windows):
        generator = torch.Generator().manual_seed(number)
        ids, targets = torch.randint(V, (2, K, B), generator=generator)
        reset = torch.rand((K, B), generator=generator) < 0.1
        loss, state_BSE = objective(ids, targets, reset, state_BSE)
        (loss / (K * B)).backward()
        losses.append(loss.item())
    return losses, {name: p.grad.double() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [0, 4])
@pytest.mark.parametrize("config", CARRIES)
def test_one_compilation_serves_all_columns(config, recompute, dtype):
    torch._dynamo.reset()
    compilations: list[int] = []
    found, gradients = train(dtype, recompute, compilations, **config)
    plain, want = train(dtype, recompute, None, **config)
    assert len(compilations) == 1
    # Plain recomputed columns add up the loss of each piece, and compiled ones that of the whole window.
    assert found == (plain if recompute == 0 else pytest.approx(plain, rel=1e-6))
    for name, gradient in want.items():
        if dtype == torch.float32:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)
        elif not name.endswith(WITHOUT_GRADIENT):  # products rounded to bf16 once a column instead of once a chunk
            assert (gradients[name] - gradient).norm() < 0.02 * gradient.norm()


def test_bf16_gradients_of_a_long_window_are_right_when_compiled():
    torch._dynamo.reset()
    want = plain_gradients(torch.float64, 512, fp32_sums=False)
    found = plain_gradients(torch.bfloat16, 512, fp32_sums=None, compiled=True)
    assert error(found, want) < 0.02


def test_a_step_that_cannot_be_compiled_runs_as_it_is(monkeypatch):
    """With a line that says so, and the losses of the plain path."""

    def fails(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise RuntimeError("no compiler to be found\nat all")

    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fails)
    lines: list[str] = []
    torch.manual_seed(0)
    shape = {"n_positions": S, "num_slots": S, "n_layer": 1, "n_head": 2, "n_embd": E}
    model = GPTBLMHeadModel(GPTBConfig(vocab_size=V, dropout=0.0, **shape)).train()
    ids, targets = torch.randint(V, (2, K, B))
    window = ids, targets, torch.zeros((K, B), dtype=torch.bool), model.empty_state(B)
    plain, _ = WindowObjective(model)(*window)
    compile_step(model, lines.append)
    loss, _ = WindowObjective(model)(*window)
    assert loss.item() == pytest.approx(plain.item())
    loss.backward()
    assert lines[-1] == "the step can't be compiled, training goes on without: no compiler to be found"
