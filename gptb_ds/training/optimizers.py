"""The construction of optimizers: parameter groups, and the AdamW that refuses an update that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn

from gptb_ds.config import OptimConfig

BETAS = (0.9, 0.95)


def parameter_groups(parameters: dict[str, nn.Parameter], optim: OptimConfig) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices decay; vectors, embeddings of position and the initial state don't."""
    matrices = {n: p for n, p in parameters.items() if p.ndim >= 2 and not n.endswith(("initial_embeds", "wpe.weight"))}
    others = [p for name, p in parameters.items() if name not in matrices]
    return [
        {"params": list(matrices.values()), "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def build_optimizer(
    parameters: dict[str, nn.Parameter],
    optim: OptimConfig,
    *,
    device: torch.device,
    guarded: bool = False,
    offloaded: type[torch.optim.Optimizer] | None = None,
) -> torch.optim.Optimizer:
    """AdamW over the parameters by name. `guarded`: it clips and refuses on its own; `offloaded`: the class to use.

    The rate is set before each update. Until then it is 0: some of DeepSpeed's wrappers step once while they are built.
    """
    groups = parameter_groups(parameters, optim)
    if offloaded is not None:
        return offloaded(groups, lr=0.0, betas=BETAS)  # type: ignore[call-arg]
    if guarded:
        return GuardedAdamW(groups, clip=optim.clip, lr=0.0, betas=BETAS, fused=device.type == "cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=device.type == "cuda")


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips the global gradient norm, and leaves everything as it was when that norm is not finite.

    For DeepSpeed's stage 0 in fp32, the one case in which it puts no wrapper of its own around the optimizer: there
    nothing would hold back an update with a NaN, and its clipping reports no norm. After a step DeepSpeed reads
    `overflow` (was the step refused) and `_global_grad_norm` (before clipping) from whatever optimizer it has stepped
    (`DeepSpeedEngine._take_model_step`, runtime/engine.py:3518 and 3536 in 0.19.8). This class sets both, so that
    `was_step_applied` and `get_global_grad_norm` answer as they do at the other stages.
    """

    def __init__(self, groups: list[dict[str, Any]], *, clip: float, **options: Any) -> None:
        """`clip` is the largest global norm; 0: no clipping. `options` are AdamW's."""
        super().__init__(groups, **options)
        self._clip = clip
        self.overflow = False
        self._global_grad_norm = math.nan

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step, or none. Ranks with equal gradients (DeepSpeed has averaged them) decide alike."""
        assert closure is None, "the norm is that of the gradients that are there"
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return None
        if self._clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
        super().step()
        return None
