"""Parts of the GPU report: tokens/s and MFU over lanes and window, memory, generation, a window as a CUDA graph.

Axes: B lanes, K steps, S slots, E embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2Model

from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.flops import flops_per_token
from tests.gpu.common import GPT2_SMALL, GPT2_VOCAB, GPU, VOCAB, rates, seconds, seconds_left, small_model, window

# (lanes, K, recompute_every): over lanes at K=16, over K at 256 lanes, and with recomputation.
SHAPES = [
    *((lanes, 16, 0) for lanes in (16, 64, 256, 512, 1024)),
    *((256, steps, 0) for steps in (4, 64)),
    (1024, 16, 4),
    (1024, 64, 8),
]


def speed() -> dict[str, Any]:
    """124M, S=20, bf16, forward and backward with the head: tokens/s, MFU, peak memory; GPT-2's blocks beside.

    GPT-2's blocks run on the same rows, all columns at once would be another model: one column, K times.
    """
    model = small_model(GPT2_VOCAB, **GPT2_SMALL).to(GPU, torch.bfloat16)
    plain = GPT2Model(GPT2Config(n_positions=20, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    plain = plain.to(GPU, torch.bfloat16).train()
    head_flops = 6 * GPT2_SMALL["n_embd"] * GPT2_VOCAB
    share = (flops_per_token(model) - head_flops) / flops_per_token(model)
    rows: dict[str, Any] = {}
    for lanes, steps, recompute in SHAPES:
        if seconds_left() < 150:
            rows[f"{lanes} lanes x {steps}"] = {"left out": "no time"}
            continue
        taken, memory = _window_cost(model, lanes, steps, recompute)
        x = torch.randn(lanes, 20, 768, device=GPU, dtype=torch.bfloat16)
        taken_plain = seconds(lambda x=x: plain(inputs_embeds=x).last_hidden_state.sum().backward()) * steps
        row = rates(model, lanes * steps, taken) | {"peak GiB": memory}
        of_blocks = rates(model, lanes * steps, taken_plain)
        row |= {"GPT-2 blocks' MFU": of_blocks["MFU"] * share, "tax": taken / taken_plain}
        rows[f"{lanes} lanes x {steps}, recompute {recompute}"] = row
    return rows


def _window_cost(model: GPTBLMHeadModel, lanes: int, steps: int, recompute: int) -> tuple[float, float]:
    """Seconds and peak GiB of forward and backward."""
    objective = WindowObjective(model, recompute)
    inputs, state = window(steps, lanes, model.config.vocab_size, GPU), model.empty_state(lanes)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        objective(*inputs, state)[0].backward()

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    taken = seconds(train, 2)
    model.zero_grad(set_to_none=True)
    return taken, torch.cuda.max_memory_allocated() / 2**30


def memory() -> dict[str, Any]:
    """Peak memory of a window against what autograd says that it keeps, by lanes and K; without the head's share."""
    model = small_model(**GPT2_SMALL).to(GPU, torch.bfloat16)
    few, more = (_kept_bytes(model, 64, steps) for steps in (4, 8))
    a_lane_step = (more - few) / (64 * 4)
    rows: dict[str, Any] = {"kept for backward": {"bytes a lane-step": a_lane_step}}
    for lanes, steps in ((64, 16), (256, 16), (256, 32), (512, 16)):
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        _, peak = _window_cost(model, lanes, steps, 0)
        predicted = before + 3 * sum(p.numel() for p in model.parameters()) * 2 + a_lane_step * lanes * steps
        ratio = peak * 2**30 / predicted
        rows[f"{lanes} lanes x {steps}"] = {"peak GiB": peak, "predicted GiB": predicted / 2**30, "ratio": ratio}
        assert 0.7 < ratio < 1.3, rows
    return rows


def _kept_bytes(model: GPTBLMHeadModel, lanes: int, steps: int) -> int:
    """Bytes of the storages that the graph of a window holds, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = WindowObjective(model)(*window(steps, lanes, VOCAB, GPU), model.empty_state(lanes))
    del loss
    return sum(kept.values())


def generation() -> dict[str, Any]:
    """Tokens/s of `generate`, 124M in bf16, over lanes; the likeliest token, and drawn."""
    model = small_model(GPT2_VOCAB, **GPT2_SMALL).to(GPU, torch.bfloat16).eval()
    rows = {}
    for lanes in (1, 64, 512):
        for drawn in (False, True):
            ids = torch.randint(1, GPT2_VOCAB, (lanes, 4), device=GPU)
            options = {"max_new_tokens": 64, "do_sample": drawn, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}
            taken = seconds(lambda ids=ids, options=options: model.generate(ids, **options), 1)
            rows[f"{lanes} lanes, {'drawn' if drawn else 'likeliest'}"] = {
                "tokens/s": lanes * 64 / taken,
                "ms a step": taken / 64 * 1e3,
            }
    return rows


def graph() -> dict[str, Any]:
    """A whole window, forward and backward, as one CUDA graph: equal to the plain path, and its speed."""
    model = small_model(**GPT2_SMALL).to(GPU, torch.bfloat16)
    objective, inputs, state = WindowObjective(model), window(16, 64, VOCAB, GPU), model.empty_state(64)
    parameters = list(model.parameters())

    def step() -> torch.Tensor:
        loss, _ = objective(*inputs, state)
        loss.backward()
        # Without its graph, which would keep nodes of the stream that it was made on: a capture refuses them.
        return loss.detach()

    plain_seconds = seconds(lambda: (model.zero_grad(), step()))
    model.zero_grad(set_to_none=True)
    plain_loss = step()
    plain = [p.grad.clone() for p in parameters]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        loss = step()
    captured.replay()
    torch.cuda.synchronize()
    apart = max(float((p.grad - g).abs().max()) for p, g in zip(parameters, plain, strict=True))
    assert torch.equal(loss, plain_loss), "the graph's loss differs"
    tokens = 16 * 64
    return {
        "largest difference of a gradient": apart,
        "plain tokens/s": tokens / plain_seconds,
        "graph tokens/s": tokens / seconds(captured.replay),
    }
