"""Parts of the GPU report: what each way to compute a part of a window is worth, all contenders in turn in one run.

Axes: B lanes, K steps, S slots, R rows, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

from gptb_ds.model import aligned, gradient_sums
from gptb_ds.model.objective import WindowObjective
from tests.gpu.common import GPT2_SMALL, GPT2_VOCAB, GPU, rates, seconds, seconds_left, show, small_model, window

Way = Callable[[], AbstractContextManager[object]]
LANES, STEPS = 1024, 2


def summed_by_product(rows_RO: torch.Tensor) -> torch.Tensor:
    """The sum of the rows as a product with ones, on the units that multiply matrices."""
    ones = rows_RO.new_ones(8, len(rows_RO))
    return torch.mm(ones, rows_RO, out_dtype=torch.float32)[0]


@contextmanager
def _ways(*entered: AbstractContextManager[object]):
    with ExitStack() as stack:
        for one in entered:
            stack.enter_context(one)
        yield


def _product_sums() -> AbstractContextManager[object]:
    return patch.object(gradient_sums, "_row_sum", summed_by_product)


WAYS: dict[str, Way] = {
    "as it is": lambda: _ways(),
    "head not padded": lambda: patch.object(aligned, "DEVICES", ()),
    "attention: flash": lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION]),
    "attention: efficient": lambda: sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]),
    "attention: cudnn": lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION]),
    "bias sums by product": _product_sums,
    "flash, bias sums by product": lambda: _ways(sdpa_kernel([SDPBackend.FLASH_ATTENTION]), _product_sums()),
}


def choices() -> dict[str, Any]:
    """A window of 2 columns, 1,024 lanes, 124M, bf16, with the head, plain launches: ms of each way, and its share.

    "GPT-2" is transformers' GPT-2 with its head on as many rows (S=20 positions, logits of the last one) at once.
    """
    model = small_model(GPT2_VOCAB, **GPT2_SMALL).to(GPU, torch.bfloat16)
    objective, state, inputs = WindowObjective(model), model.empty_state(LANES), window(STEPS, LANES, GPT2_VOCAB, GPU)

    def ours() -> None:
        model.zero_grad(set_to_none=True)
        objective(*inputs, state)[0].backward()

    contenders: dict[str, tuple[Way, Callable[[], None]]] = {name: (way, ours) for name, way in WAYS.items()}
    contenders["GPT-2"] = (WAYS["as it is"], _gpt2(inputs[1]))
    best: dict[str, float] = {}
    refused: dict[str, Any] = {}
    for _ in range(3):
        for name, (way, run) in contenders.items():
            if name in refused or seconds_left() < 20:
                continue
            try:
                with way():
                    best[name] = min(best.get(name, float("inf")), seconds(run, 2))
            except RuntimeError as error:
                refused[name] = {"refused": str(error).splitlines()[0][:80]}
    rows = {name: _row(model, taken, best["as it is"]) for name, taken in best.items()}
    if "GPT-2" in rows:
        rows["as it is"]["of GPT-2's MFU"] = best["GPT-2"] / best["as it is"]
    return rows | refused


def _row(model: Any, taken: float, as_it_is: float) -> dict[str, float]:
    found = rates(model, LANES * STEPS, taken)
    return {"ms": taken * 1e3, "times as it is": taken / as_it_is, "MFU": found["MFU"], "tokens/s": found["tokens/s"]}


def _gpt2(targets_KB: torch.Tensor) -> Callable[[], None]:
    """GPT-2 in the way that suits it: all rows in one pass, torch's attention, a head on the last position."""
    shape = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 20}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=GPT2_VOCAB, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **shape))
    gpt2 = gpt2.to(GPU, torch.bfloat16).train()
    targets_R = targets_KB.flatten()
    x_RSE = torch.randn(len(targets_R), 20, 768, device=GPU, dtype=torch.bfloat16)

    def run() -> None:
        gpt2.zero_grad(set_to_none=True)
        hidden = gpt2.transformer(inputs_embeds=x_RSE, use_cache=False).last_hidden_state[:, -1]
        F.cross_entropy(gpt2.lm_head(hidden).float(), targets_R, reduction="sum").backward()

    return run


def row_sums() -> dict[str, Any]:
    """The sum of 20,480 rows, bf16 in and float32 out, as a reduction and as a product; and a norm's gradients."""
    rows: dict[str, Any] = {}
    for outputs in (768, 2304, 3072):
        values_RO = torch.randn(20480, outputs, device=GPU, dtype=torch.bfloat16)
        want = values_RO.double().sum(0)
        for name, way in (("reduction", gradient_sums._row_sum), ("product", summed_by_product)):
            apart = float((way(values_RO).double() - want).norm() / want.norm())
            rows[f"{name}, {outputs}"] = {"us": _each(lambda way=way, v=values_RO: way(v)) * 1e6, "error": apart}
    x, weight = (torch.randn(*shape, device=GPU, dtype=torch.bfloat16) for shape in ((20480, 768), (768,)))
    _, mean, rstd = torch.native_layer_norm(x, [768], weight, weight, 1e-5)
    for name, mask in (("norm, rows", [True, False, False]), ("norm, gain and shift", [False, True, True])):
        taken = _each(
            lambda mask=mask: torch.ops.aten.native_layer_norm_backward(x, x, [768], mean, rstd, weight, weight, mask)
        )
        rows[name] = {"us": taken * 1e6}
    show("so far", rows)
    return rows


def _each(function: Callable[[], Any]) -> float:
    return seconds(lambda: [function() for _ in range(50)], 3) / 50
