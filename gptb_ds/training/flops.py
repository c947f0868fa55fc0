"""How much arithmetic a token of training takes, and how much a device can do: what MFU is a share of.

Axes: S slots, E embedding, V vocabulary.
"""

from __future__ import annotations

import time

import torch
from torch import nn
from transformers import PreTrainedModel

# Dense matmul rates of GPUs in FLOP/s by a part of their name: in bf16 and fp16, and in TF32. From NVIDIA's and AMD's
# data sheets, without sparsity, at the rate that adds up in float32.
_RATES = {
    "B200": (2250e12, 1125e12),
    "H200": (989e12, 495e12),
    "H100 PCIe": (756e12, 378e12),
    "H100 NVL": (835e12, 418e12),
    "H100": (989e12, 495e12),
    "H20": (148e12, 74e12),
    "A100": (312e12, 156e12),
    "A800": (312e12, 156e12),
    "A40": (150e12, 75e12),
    "A30": (165e12, 82e12),
    "A10": (125e12, 62e12),
    "L40S": (362e12, 183e12),
    "L40": (181e12, 90e12),
    "L4": (121e12, 60e12),
    "RTX A6000": (155e12, 77e12),
    "RTX 4090": (165e12, 83e12),
    "RTX 3090": (71e12, 36e12),
    "MI300X": (1307e12, 654e12),
    "MI250": (362e12, 91e12),
}
# A step of the matmul that is measured: more rows don't make it faster, fewer make it slower.
_ROWS, _REPEATS = 4096, 6


def flops_per_token(model: PreTrainedModel) -> float:
    """Forward and backward of one token: a multiplication and an addition are two.

    Each matrix of the blocks meets S rows a token, the head one; backward takes twice the products of forward.
    Attention's two products (S, S) x E a block are counted, what is recomputed to save memory is not: that is "model
    FLOPs" as Chowdhery et al. 2022 (PaLM, 2204.02311, appendix B) define them. Of GPT-2 they take one row and a whole
    context, of an LSTM there is none. `model` must be whole (not yet under ZeRO-3).
    """
    config = model.config
    slots, width = int(getattr(config, "num_slots", 1)), int(config.hidden_size)
    blocks = head = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.RNNBase):
            blocks += sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)
        if isinstance(module, nn.Embedding) or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            continue
        if name.endswith("lm_head"):
            head += weight.numel()
        else:
            blocks += weight.numel()
    seen = int(getattr(config, "num_slots", getattr(config, "n_positions", 0)))  # by each row's attention
    attention = 2 * int(getattr(config, "num_hidden_layers", 0)) * slots * seen * width
    return 6.0 * (blocks * slots + attention + head)


def peak_flops(device: torch.device, precision: str, rows: int, width: int) -> tuple[float, str]:
    """FLOP/s that MFU is a share of, and where they are from: a GPU's data sheet, or a product measured here.

    What is measured is a block's widest product, (rows, width) x (width, 4 width), with the threads that train.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((rates for part, rates in _RATES.items() if part in name), None)
        if known is not None:
            rate = known[1 if precision == "fp32" else 0]
            return rate, f"{rate / 1e12:.0f} TFLOP/s of {name}"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    seconds = matmul_seconds(device, dtype, min(rows, _ROWS), width)
    rate = 8.0 * min(rows, _ROWS) * width * width / seconds
    return rate, f"{rate / 1e9:.0f} GFLOP/s of a product measured here"


def matmul_seconds(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> float:
    """Of one product (rows, width) x (width, 4 width): the best of a few, after one that loads libraries."""
    x = torch.ones(rows, width, dtype=dtype, device=device)
    weight = torch.ones(width, 4 * width, dtype=dtype, device=device)
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        x @ weight
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
