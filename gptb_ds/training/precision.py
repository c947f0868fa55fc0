"""Which precision `train.precision auto` stands for: decided before the run, once, and written into its config.yaml."""

from __future__ import annotations

import torch

from gptb_ds.config import Config
from gptb_ds.training.flops import matmul_seconds
from gptb_ds.training.kept_choice import kept_choice

# bf16 must be this much faster on a CPU: below, its missing bits are not worth it.
_WORTH = 1.1
# Where the number of lanes is itself measured, which takes a precision.
_TYPICAL_LANES = 64


def with_precision(config: Config, device: torch.device) -> Config:
    """`config` with a precision in the place of "auto".

    A run that has one keeps it: a resume in another would be another run. Otherwise bf16 on a GPU that computes in it,
    and on a CPU whichever multiplies faster at the run's shapes.
    """
    if config.train.precision != "auto":
        return config
    chosen = kept_choice(config, "train.precision", ("fp32", "bf16", "fp16"))
    if chosen is None and device.type == "cuda":
        chosen = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if chosen is None:
        lanes = config.data.lanes or _TYPICAL_LANES
        rows = max(1, lanes // config.train.lane_groups) * config.model.num_slots
        chosen = faster_on_this_cpu(rows, config.model.n_embd)
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": chosen})})


def faster_on_this_cpu(rows: int, width: int) -> str:
    """The name of the precision in which a block's widest product, (rows, width) x (width, 4 width), is faster.

    Processors differ: one with AVX-512 BF16 units can be twice as fast in bf16 as in fp32, another half as fast.
    """
    rows, cpu = min(rows, 4096), torch.device("cpu")
    taken = {
        name: matmul_seconds(cpu, dtype, rows, width)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    return "bf16" if taken["bf16"] * _WORTH < taken["fp32"] else "fp32"


def allow_tf32(device: torch.device, precision: str) -> bool:
    """Lets a GPU multiply float32 matrices in TF32, several times as fast; whether it does."""
    if device.type != "cuda" or precision != "fp32":
        return False
    torch.set_float32_matmul_precision("high")
    return True
