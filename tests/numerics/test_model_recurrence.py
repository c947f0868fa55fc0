"""The proof of the recurrence's promises: unrolling is stepping, resets cut, recomputation changes nothing.

Axes: B lanes, T steps, S slots, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import NewGELUActivation

from gptb_ds import GPTBConfig, GPTBLMHeadModel, GPTBModel

B, T, S, E, V = 3, 8, 5, 16, 23


def make(dtype: torch.dtype = torch.float64, **changes: Any) -> GPTBLMHeadModel:
    torch.manual_seed(0)
    values = {"vocab_size": V, "n_positions": 7, "n_embd": E, "n_layer": 2, "n_head": 4, "num_slots": S, "dropout": 0.0}
    model = GPTBLMHeadModel(GPTBConfig(**(values | changes)))
    with torch.no_grad():  # GPT-2's initialisation hardly uses the state; larger weights make it matter
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(10)
            block.attn.c_proj.weight.mul_(10)
    return model.to(dtype)


def make_window(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(V, (B, T), generator=generator) for _ in range(2))
    reset = torch.rand((B, T), generator=generator) < 0.3
    reset[0, 3] = True
    reset[1] = False
    return ids, labels, reset


def make_state(seed: int = 2) -> torch.Tensor:
    return torch.randn((B, S - 1, E), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert left.keys() == right.keys() and left
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_unroll_is_stepping_with_resets() -> None:
    model, state = make(), make_state()
    ids, labels, reset = make_window()
    window = model(ids, past_hidden_states=state, reset=reset)
    steps, losses = [], []
    for t in range(T):
        column = slice(t, t + 1)
        logits, state, _ = model(ids[:, column], state, reset[:, column])
        steps.append(logits)
        losses.append(F.cross_entropy(logits[:, 0], labels[:, t]))
    torch.testing.assert_close(torch.cat(steps, dim=1), window.logits)
    torch.testing.assert_close(state, window.past_hidden_states)
    whole = F.cross_entropy(window.logits.flatten(0, 1), labels.flatten())
    assert_same(gradients(model, torch.stack(losses).mean()), gradients(model, whole))


@pytest.mark.parametrize("edge", range(1, T))
def test_windows_split_anywhere_give_the_same_forward(edge: int) -> None:
    model = make()
    ids, _, reset = make_window()
    whole = model(ids, reset=reset)
    first = model(ids[:, :edge], reset=reset[:, :edge])
    second = model(ids[:, edge:], first.past_hidden_states.detach(), reset[:, edge:])
    torch.testing.assert_close(torch.cat((first.logits, second.logits), dim=1), whole.logits)
    torch.testing.assert_close(second.past_hidden_states, whole.past_hidden_states)


def test_lanes_do_not_touch_each_other() -> None:
    model, state = make(), make_state()
    ids, _, reset = make_window()
    together = model(ids, state, reset)
    for b in range(B):
        lane = slice(b, b + 1)
        alone = model(ids[lane], state[lane], reset[lane])
        torch.testing.assert_close(alone.logits, together.logits[lane])
        torch.testing.assert_close(alone.past_hidden_states, together.past_hidden_states[lane])


def test_reset_is_the_learned_initial_state() -> None:
    model = make()
    ids, _, _ = make_window()
    reset = torch.zeros((B, T), dtype=torch.bool)
    reset[:, 0] = True
    fresh, told = model(ids), model(ids, make_state(), reset)
    assert torch.equal(fresh.logits, told.logits)
    explicit = model(ids, model.transformer.initial_embeds.expand(B, -1, -1))
    assert torch.equal(fresh.logits, explicit.logits)


def test_gradient_is_exactly_zero_across_a_reset_and_not_inside() -> None:
    model = make()
    ids, _, _ = make_window()
    reset = torch.zeros((B, T), dtype=torch.bool)
    reset[0, 3] = True
    embeddings: list[torch.Tensor] = []
    model.transformer.wte.register_forward_hook(lambda _module, _inputs, output: embeddings.append(output))
    state = make_state().requires_grad_()
    hidden_BTE, _ = model.transformer(ids, state, reset)
    embeddings[0].retain_grad()
    hidden_BTE[:, -1].pow(3).sum().backward()  # a plain sum is constant after a layer norm
    by_token_TB = embeddings[0].grad.abs().sum(-1)
    assert (by_token_TB[:3, 0] == 0).all() and (state.grad[0] == 0).all()
    assert (by_token_TB[3:, 0] > 1e-9).all() and (by_token_TB[:, 1:] > 1e-9).all() and (state.grad[1:] != 0).any()
    assert model.transformer.initial_embeds.grad.abs().sum() > 0


def test_initial_state_gets_a_gradient_even_when_nothing_is_reset() -> None:
    """Ranks must reduce the same parameters in every window, whatever their lanes read."""
    model = make()
    ids, labels, _ = make_window()
    model(ids, make_state(), torch.zeros((B, T), dtype=torch.bool), labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert (model.transformer.initial_embeds.grad == 0).all()


@pytest.mark.parametrize("every", [1, 3, 8, 20])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_the_same_gradients(every: int, dropout: float) -> None:
    model = make(dropout=dropout).train()
    ids, labels, reset = make_window()

    def run(recompute_every: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        state = make_state().requires_grad_()
        loss = model(ids, state, reset, labels, recompute_every).loss
        return gradients(model, loss) | {"state": state.grad, "loss": loss.detach()}

    assert_same(run(every), run(0), rtol=0, atol=1e-12)


def test_recomputation_keeps_less() -> None:
    """What autograd holds between forward and backward, in bytes, counted where it is packed."""
    model = make()
    ids, labels, reset = make_window()

    def kept(recompute_every: int) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids, make_state(), reset, labels, recompute_every).loss
        size = sum(storages.values())
        loss.backward()
        return size

    assert kept(2) < kept(0) / 2


def test_causal_attention_is_memoryless_and_rebias_is_not() -> None:
    ids, other = make_window()[0], make_window(seed=9)[0]
    other[:, -1] = ids[:, -1]

    def last_logits(model: GPTBLMHeadModel) -> tuple[torch.Tensor, torch.Tensor]:
        return model(ids).logits[:, -1], model(other).logits[:, -1]

    left, right = last_logits(make(rebias=False))
    assert torch.equal(left, right)
    left, right = last_logits(make(rebias=True))
    assert (left - right).abs().max() > 1e-3


def test_callers_tensors_stay_as_they_were() -> None:
    model, state = make(), make_state()
    ids, labels, reset = make_window()
    tensors = [ids, state, reset, labels]
    copies = [tensor.clone() for tensor in tensors]
    model(*tensors).loss.backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type_and_comes_close(dtype: torch.dtype) -> None:
    ids, labels, reset = make_window()
    exact = make(torch.float64)(ids, make_state(), reset, labels)
    half = make(dtype)(ids, make_state(), reset, labels)
    assert half.past_hidden_states.dtype == half.logits.dtype == dtype and half.loss.dtype == torch.float32
    assert abs(half.loss.item() - exact.loss.item()) < 0.02
    error = (half.past_hidden_states.double() - exact.past_hidden_states).norm() / exact.past_hidden_states.norm()
    assert error < 0.1


def test_the_single_kernel_activation_is_gpt2s() -> None:
    ids, labels, _ = make_window()
    ours, reference = make(), make()
    for block in reference.transformer.h:
        block.mlp.act = NewGELUActivation()
    torch.testing.assert_close(ours(ids, labels=labels).loss, reference(ids, labels=labels).loss, rtol=0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("recompute_every", [0, 4])
def test_compiled_step_is_close_and_compiles_once(recompute_every: int) -> None:
    model = make(torch.float32)
    ids, labels, reset = make_window()
    state = make_state().float()
    plain = model(ids, state, reset, labels, recompute_every)
    plain_gradients = gradients(model, plain.loss)
    graphs: list[int] = []
    model.compile_step(backend=_counting_inductor(graphs))
    for _ in range(2):
        compiled = model(ids, state, reset, labels, recompute_every)
        torch.testing.assert_close(compiled.logits, plain.logits, rtol=1e-4, atol=1e-5)
        assert_same(gradients(model, compiled.loss), plain_gradients, rtol=1e-3, atol=1e-5)
    # The first step's state comes without a gradient, the later ones' with one.
    assert len(graphs) <= 2


def _counting_inductor(graphs: list[int]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(len(inputs))
        return compile_fx(graph, inputs)

    return backend


def test_the_recurrence_runs_another_backbone() -> None:
    """The mix-in asks a backbone for two functions and nothing of GPT-2."""
    from transformers import LlamaConfig, LlamaModel

    from gptb_ds.model import SlotRecurrence

    class RecurrentLlama(SlotRecurrence, LlamaModel):
        def slot_context(self, like_E: torch.Tensor) -> tuple[Any, ...]:
            positions_1S = torch.arange(self.config.num_slots)[None]
            return self.rotary_emb(like_E, positions_1S), positions_1S

        def run_slots(self, x_BSE: torch.Tensor, context: tuple[Any, ...], layers: Any = None) -> torch.Tensor:
            rotation, positions_1S = context
            for layer in self.layers:
                x_BSE = layer(x_BSE, position_embeddings=rotation, position_ids=positions_1S)
            return self.norm(x_BSE)

    config = LlamaConfig(
        vocab_size=V, hidden_size=E, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    config.num_slots, config.rebias = S, True
    torch.manual_seed(0)
    model = RecurrentLlama(config)
    assert 0.5 < model.initial_embeds.std() < 2
    ids, _, reset = make_window()
    hidden, state = model(ids, reset=reset)
    first, middle = model(ids[:, :3], reset=reset[:, :3])
    second, last = model(ids[:, 3:], middle, reset[:, 3:])
    torch.testing.assert_close(torch.cat((first, second), dim=1), hidden)
    torch.testing.assert_close(last, state)


def test_model_without_head_unpacks_as_outputs_and_state() -> None:
    model = GPTBModel(make().config)
    ids = make_window()[0]
    hidden, state = model(ids)
    assert hidden.shape == (B, T, E) and state.shape == (B, S - 1, E)
    plain = model(ids, return_dict=False, use_cache=False)
    assert type(plain) is tuple and torch.equal(plain[0], hidden) and torch.equal(plain[1], state)


def test_time_first_is_lanes_first_turned() -> None:
    model, state = make(), make_state()
    ids, _, reset = make_window()
    hidden_BTE, new_state = model.transformer(ids, state, reset)
    hidden_KBE, other_state = model.transformer.unroll(ids.t(), state, reset.t(), recompute_every=3)
    assert torch.equal(hidden_KBE.transpose(0, 1), hidden_BTE) and torch.equal(other_state, new_state)


def test_an_empty_state_fits_and_a_reset_replaces_it() -> None:
    model = make(torch.bfloat16)
    empty = model.empty_state(B)
    assert empty.shape == (B, S - 1, E) and empty.dtype == torch.bfloat16 and empty.device == model.device
    ids, reset = make_window()[0], torch.zeros((B, T), dtype=torch.bool)
    reset[:, 0] = True
    assert torch.equal(model(ids, empty, reset).logits, model(ids).logits)
