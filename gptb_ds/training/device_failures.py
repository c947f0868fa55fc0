"""What a run says when its device fails it: memory that does not suffice, with what would, and errors of CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt

import torch
import torch.distributed as dist

from gptb_ds.config import divisors
from gptb_ds.training.sizes import WindowMemory, free_memory
from gptb_ds.training.train_state import RunFacts

# Of the free memory: allocators lose some of it between blocks.
_USABLE = 0.9
# Of what a column keeps, with `train.recompute_cheap`.
_CHEAP_KEEPS = 2 / 3
# Errors that mean memory, though no allocator of torch's raised them.
_NO_MEMORY = (
    *("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed"),
    "defaultcpuallocator: can't allocate memory",
)
_OF_DEVICE = ("cuda error", "cuda driver error", "cudnn error", "cublas_status", "cudnn_status", "hip error")


class DeviceFailureError(RuntimeError):
    """Its device has failed this rank; the message is one line. The other ranks lose contact."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of a rank's GPU: all of it, what is left for windows beside weights and optimizer, what they need."""

    total: float
    free: float
    window: WindowMemory


def gpu_memory(window: WindowMemory, device: torch.device, later: int) -> GpuMemory:
    """As it is before a window; `later`: bytes of gradients and moments, which are not there yet."""
    total = torch.cuda.mem_get_info(device)[1]
    return GpuMemory(total, max(0.0, free_memory(device, 1) - later), window)


@contextmanager
def named_failures(facts: RunFacts, ranks: int, memory: GpuMemory | None = None) -> Iterator[None]:
    """Raises DeviceFailureError for an error of the device inside; others go on as they are."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or any(word in said for word in _NO_MEMORY):
            raise DeviceFailureError(out_of_memory(error, facts, ranks, memory)) from error
        # An error of NCCL may quote one of CUDA: it mostly comes of another rank's end, and is told as that.
        if any(word in said for word in _OF_DEVICE) and not isinstance(error, dist.DistError):
            raise DeviceFailureError(device_error(error, facts, ranks)) from error
        raise


def out_of_memory(error: BaseException, facts: RunFacts, ranks: int, memory: GpuMemory | None = None) -> str:
    """One line: torch's own words, lanes, window, recomputation and lane groups, and settings that would need less.

    With `memory` only settings that would fit, and what they would take.
    """
    lanes, groups, every = facts.lanes // ranks, facts.train.most_groups, facts.train.recompute_every
    held = every or facts.window
    needs = f": {_gib(_need(facts, lanes // groups, every, memory))} of {_room(memory)}" if memory else ""
    remedies = _fitting(facts, lanes, memory)
    remedies.append("a policy of a higher ZeRO stage, or with offload, takes optimizer state off the device")
    return (
        f"{_first_line(error)}. A backward pass holds {held} of the window's {facts.window} columns for"
        f" {lanes // groups} lanes ({_settings(facts, ranks)}){needs}. With less: {'; '.join(remedies)}"
    )


def device_error(error: BaseException, facts: RunFacts, ranks: int) -> str:
    """One line: CUDA's own words, what ran, and how to find out more."""
    return (
        f"{_first_line(error)} ({_settings(facts, ranks)}). Kernels run later than they are called: where it happened"
        " is known with CUDA_LAUNCH_BLOCKING=1 and --train.graph off. A device-side assert mostly is a token outside of"
        " the vocabulary; anything else may be the GPU or its driver: `dmesg` (Xid) and `nvidia-smi -q` tell"
    )


def _fitting(facts: RunFacts, lanes: int, memory: GpuMemory | None) -> list[str]:
    """Settings that need less; with `memory`, those that fit."""
    groups, every, cheap = facts.train.most_groups, facts.train.recompute_every, facts.train.recompute_cheap
    root = max(1, isqrt(facts.window)) if facts.can_recompute else 0
    columns = [c for c in (root, root // 2, root // 4, min(root, 1)) if 0 < c < (every or facts.window)]
    instead = "--train.recompute_cheap false " if cheap else ""  # it is one or the other
    more = [n for n in divisors(lanes) if n > groups and n % groups == 0]

    def fits(n: int, c: int) -> bool:
        return memory is None or _need(facts, lanes // n, c, memory) <= _USABLE * memory.free

    def takes(n: int, c: int) -> str:
        return f" ({_gib(_need(facts, lanes // n, c, memory))})" if memory else ""

    found = []
    if facts.can_recompute and not (every or cheap or facts.train.compile == "on"):
        kept = _CHEAP_KEEPS * _need(facts, lanes // groups, 0, memory)
        if memory is None or kept <= _USABLE * memory.free:
            takes_cheap = f" ({_gib(kept)})" if memory else ""
            found.append(f"--train.recompute_cheap true keeps about two thirds of each column{takes_cheap}")
    shorter = next((c for c in columns if fits(groups, c)), None)
    if shorter is not None:
        keeps = f"{instead}--train.recompute_every {shorter} keeps {shorter} columns and computes a third more"
        found.append(keeps + takes(groups, shorter))
    several = next((n for n in more if fits(n, every)), None)
    if several is not None:
        found.append(
            f"--train.lane_groups {several} keeps {groups}/{several} of the lanes at once{takes(several, every)}"
        )
    if not found:
        both = next(((n, c) for n in more for c in columns if fits(n, c)), None)
        if both is not None:
            found.append(f"{instead}--train.lane_groups {both[0]} with --train.recompute_every {both[1]}{takes(*both)}")
    return found


def _need(facts: RunFacts, lanes: int, every: int, memory: GpuMemory | None) -> float:
    if memory is None:
        return 0.0
    # Of a run with `recompute_cheap` the columns are measured with it, which `recompute_every` does without.
    whole = 1 / _CHEAP_KEEPS if every and facts.train.recompute_cheap else 1
    return whole * memory.window.kept(lanes, facts.window, every)


def _room(memory: GpuMemory) -> str:
    return f"the {_gib(memory.free)} that weights and optimizer leave of the GPU's {_gib(memory.total)}"


def _settings(facts: RunFacts, ranks: int) -> str:
    return (
        f"data.lanes {facts.lanes} on {ranks} rank(s), data.window {facts.window}, train.lane_groups"
        f" {facts.train.most_groups}, train.recompute_every {facts.train.recompute_every}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["out of memory"])[0].rstrip(".")


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
