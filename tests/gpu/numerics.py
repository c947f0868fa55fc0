"""Parts of the GPU report: agreement with the CPU, gradients of long windows, equality of repeats, kinds of attention.

Axes: B lanes, K steps, S slots, E embedding, H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptb_ds.model.objective import WindowObjective
from tests.gpu.common import DTYPES, GPT2_SMALL, GPU, VOCAB, seconds, small_model, window


def gradients(device: torch.device, dtype: torch.dtype, steps: int, **options: Any) -> dict[str, torch.Tensor]:
    model = small_model().to(device, dtype)
    loss, _ = WindowObjective(model, **options)(*window(steps, 16, VOCAB, device), model.empty_state(16))
    (loss / (steps * 16)).backward()
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach().double().cpu() / (steps * 16)}


def error(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    names = [name for name in want if name != "loss"]
    apart = sum(float((found[n] - want[n]).square().sum()) for n in names)
    return (apart / sum(float(want[n].square().sum()) for n in names)) ** 0.5


def agreement() -> dict[str, Any]:
    """Loss and gradient of a window of 16 columns against the CPU in float64."""
    want = gradients(torch.device("cpu"), torch.float64, 16)
    rows = {}
    for name, limit in (("fp32", 1e-3), ("bf16", 3e-2), ("fp16", 1e-2)):
        found = gradients(GPU, DTYPES[name], 16)
        rows[name] = {"gradient": error(found, want), "loss": abs(float(found["loss"] - want["loss"]))}
        assert rows[name]["gradient"] < limit, f"{name}: gradients are {rows[name]['gradient']:.2e} from the CPU's"
    return rows


def long_windows() -> dict[str, Any]:
    """Relative error of bf16 gradients by K: summed by autograd, and in float32."""
    rows = {}
    for steps in (16, 128, 512, 1024):
        want = gradients(GPU, torch.float32, steps)
        plain = error(gradients(GPU, torch.bfloat16, steps, fp32_sums=False), want)
        rows[f"K={steps}"] = {"autograd": plain, "fp32 sums": error(gradients(GPU, torch.bfloat16, steps), want)}
    assert rows["K=1024"]["fp32 sums"] < 0.05, rows
    return rows


def repeats() -> dict[str, Any]:
    """How many of a window's gradients differ in any bit when it is computed again, and which."""
    rows: dict[str, Any] = {}
    for name in ("fp32", "bf16"):
        for lanes, steps in ((64, 32), (1024, 16)):
            model = small_model(n_embd=256, n_head=4).to(GPU, DTYPES[name])
            inputs, state = window(steps, lanes, VOCAB, GPU), model.empty_state(lanes)
            found = []
            for _ in range(5):
                model.zero_grad(set_to_none=True)
                WindowObjective(model)(*inputs, state)[0].backward()
                found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            apart = sorted({n for other in found[1:] for n in other if not torch.equal(other[n], found[0][n])})
            rows[f"{name}, {lanes} lanes x {steps}"] = {"differ": len(apart), "which": ", ".join(apart)}
    return rows | {f"table, {kind}": row for kind, row in _tables().items()}


def _tables() -> dict[str, dict[str, Any]]:
    """Ways to add up the gradients of a table's rows: seconds, and whether ten repeats are equal."""
    rows = {}
    for vocab in (VOCAB, 50257):
        ids = torch.randint(vocab, (16 * 1024,), device=GPU)
        grads = torch.randn(len(ids), 768, device=GPU)

        def added(ids=ids, grads=grads, vocab=vocab) -> torch.Tensor:
            return grads.new_zeros(vocab, 768).index_add_(0, ids, grads)

        def dense(ids=ids, grads=grads, vocab=vocab) -> torch.Tensor:
            return torch.ops.aten.embedding_dense_backward(grads, ids, vocab, -1, False)

        def put(ids=ids, grads=grads, vocab=vocab) -> torch.Tensor:
            return grads.new_zeros(vocab, 768).index_put_((ids,), grads, accumulate=True)

        for kind, function in (("index_add_", added), ("embedding_dense_backward", dense), ("index_put_", put)):
            first = function()
            equal = all(torch.equal(first, function()) for _ in range(10))
            torch.cuda.set_sync_debug_mode("error")
            try:
                function()
                waits = "no wait"
            except RuntimeError:
                waits = "waits"
            finally:
                torch.cuda.set_sync_debug_mode("default")
            rows[f"{kind}, {vocab} rows"] = {"ms": seconds(function) * 1e3, "repeats": str(equal), "": waits}
    return rows


_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention() -> dict[str, Any]:
    """Kinds of attention between 20 slots, bf16, GPT-2's heads, forward and backward: milliseconds, error to float64.

    `products` is what runs on CPUs, `sdpa` what runs on GPUs: torch's choice among the kernels below it.
    """
    heads = GPT2_SMALL["n_head"]
    rows: dict[str, Any] = {}
    for lanes in (64, 1024):
        shape = (lanes, heads, GPT2_SMALL["num_slots"], GPT2_SMALL["n_embd"] // heads)
        torch.manual_seed(0)
        q, k, v = (torch.randn(shape, device=GPU, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        want = _products(q.double(), k.double(), v.double()).detach()
        for kind in ("products", "sdpa", *_KERNELS):
            attend = _products if kind == "products" else F.scaled_dot_product_attention
            allowed = [_KERNELS[kind]] if kind in _KERNELS else list(_KERNELS.values())
            try:
                with sdpa_kernel(allowed):
                    apart = float((attend(q, k, v).detach().double() - want).norm() / want.norm())
                    taken = seconds(lambda q=q, k=k, v=v, attend=attend: attend(q, k, v).sum().backward())
            except RuntimeError as refused:
                rows[f"{kind}, {lanes} lanes"] = {"refused": str(refused).splitlines()[0][:60]}
                continue
            rows[f"{kind}, {lanes} lanes"] = {"ms": taken * 1e3, "error": apart}
            assert apart < 0.02, (kind, apart)
    return rows


def _products(q_BHSD: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor) -> torch.Tensor:
    scores_BHSS = q_BHSD @ k_BHSD.transpose(-1, -2) / q_BHSD.shape[-1] ** 0.5
    return scores_BHSS.softmax(-1) @ v_BHSD
