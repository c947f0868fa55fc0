"""What a run makes of its hardware: the share of the matmul rate that it reaches (MFU), and memory."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from gptb_ds.distributed.world import World
from gptb_ds.training.flops import flops_per_token, peak_flops
from gptb_ds.training.metrics import Metrics
from gptb_ds.training.sizes import WindowMemory

# More rows make no product faster on a CPU, where the rate is measured while the run starts.
_MEASURED_ROWS = 1024


@dataclass(frozen=True)
class Usage:
    """How much arithmetic a token takes and how much all ranks' devices can do (FLOP/s); `said`: where that is from.

    `token_flops` 0: nobody has counted them for this kind of model, and MFU is left out. `window`: what one keeps for
    its backward pass.
    """

    device: torch.device
    token_flops: float
    peak: float
    said: str
    window: WindowMemory | None = None

    def metrics(self, tokens_per_second: float) -> Metrics:
        """`mfu`, model FLOPs utilisation as a share, and `memory_gib`: the most that this rank has taken so far.

        On a GPU that is what tensors took there, on a CPU what the process had resident.
        """
        found: Metrics = {"memory_gib": round(_peak_memory(self.device) / 2**30, 3)}
        if self.token_flops:
            found["mfu"] = self.token_flops * tokens_per_second / self.peak
        return found


def usage_of(model: PreTrainedModel, world: World, precision: str, lanes: int) -> Usage:
    """Of a run whose ranks take so many lanes at once. `model` must be whole. Every rank must ask, rank 0 measures."""
    if getattr(model.config, "num_slots", None) is None:
        return Usage(world.device, 0.0, 1.0, "")
    rows = min(lanes * int(model.config.num_slots), _MEASURED_ROWS if world.device.type == "cpu" else 1 << 30)
    rate, said = world.on_rank0(peak_flops, world.device, precision, max(rows, 1), int(model.config.hidden_size))
    return Usage(world.device, flops_per_token(model), rate * world.size, said)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
