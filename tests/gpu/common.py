"""What the parts of the GPU report share: models, windows, and how long something takes.

Axes: B lanes, K steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.training.flops import flops_per_token, peak_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GPU = torch.device("cuda", 0)
# The whole report is to take less than ten minutes; parts that could take longer look at `seconds_left`.
BUDGET_SECONDS = 540.0
GPT2_SMALL = {"num_slots": 20, "n_layer": 12, "n_head": 12, "n_embd": 768}
VOCAB, GPT2_VOCAB = 61, 50257
STARTED = time.monotonic()


def seconds_left() -> float:
    return BUDGET_SECONDS - (time.monotonic() - STARTED)


def small_model(vocab: int = VOCAB, **shape: int) -> GPTBLMHeadModel:
    """A model on the CPU whose weights bf16 can hold, without dropout, in training mode."""
    torch.manual_seed(0)
    values = {"n_positions": 8, "num_slots": 8, "n_layer": 2, "n_head": 2, "n_embd": 64} | shape
    values["n_positions"] = values["num_slots"]
    return GPTBLMHeadModel(GPTBConfig(vocab_size=vocab, dropout=0.0, **values)).bfloat16().float().train()


def window(steps: int, lanes: int, vocab: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, targets and resets, (K, B) each."""
    generator = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(vocab, (2, steps, lanes), generator=generator)
    reset = torch.rand((steps, lanes), generator=generator) < 0.05
    return ids.to(device), targets.to(device), reset.to(device)


def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Of one call, the best of a few, after one to warm up."""
    best = float("inf")
    for number in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - start)
    return best


def rates(model: GPTBLMHeadModel, tokens: int, taken: float) -> dict[str, float]:
    """tokens/s, TFLOP/s and MFU of a model in bf16 that took so long for so many tokens."""
    peak, _ = peak_flops(GPU, "bf16", 4096, 1024)
    done = flops_per_token(model) * tokens / taken
    return {"tokens/s": tokens / taken, "TFLOP/s": done / 1e12, "MFU": done / peak}


def show(section: str, found: dict[str, Any]) -> None:
    """Prints the rows of a part of the report."""
    for row, values in found.items():
        cells = values.items() if isinstance(values, dict) else [("", values)]
        text = "  ".join(f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}".strip() for name, v in cells)
        print(f"{section:<13} {row:<34} {text}", flush=True)
