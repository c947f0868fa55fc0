"""The construction of optimizers: parameter groups, and the guard that refuses an update that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, overload

import torch
from torch import nn

from gptb_ds.config import OptimConfig
from gptb_ds.training.muon import MuonWithAdamW, matrices_of


def parameter_groups(
    parameters: dict[str, nn.Parameter], optim: OptimConfig, matrices: Collection[str] = ()
) -> list[dict[str, object]]:
    """Groups for AdamW: matrices decay; vectors, embeddings of position and the initial state don't.

    `matrices` are the names that Muon takes: a group of their own, with `muon` on.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    taken: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        plain = parameter.ndim >= 2 and not name.endswith(("initial_embeds", "wpe.weight"))
        (taken if name in matrices else decayed if plain else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay, "muon": False},
        {"params": others, "weight_decay": 0.0, "muon": False},
        {"params": taken, "weight_decay": optim.weight_decay, "muon": True},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module,
    optim: OptimConfig,
    *,
    device: torch.device,
    guarded: bool = False,
    offloaded: type[torch.optim.Optimizer] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of the model's trained parameters. `guarded`: it clips and refuses on its own.

    `offloaded` is the class that steps AdamW's moments on the CPU. The rate is set before each update. Until then it is
    0: some of DeepSpeed's wrappers step once while they are built.
    """
    parameters = trained_parameters(model)
    options: dict[str, Any] = {"lr": 0.0, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if optim.name == "muon":
        matrices = {name: matrix for name, matrix in matrices_of(model).items() if name in parameters}
        options |= {"matrices": matrices, "momentum": optim.momentum, "device": device}
        groups = parameter_groups(parameters, optim, matrices)
        return GuardedMuon(groups, clip=optim.clip, **options) if guarded else MuonWithAdamW(groups, **options)
    groups = parameter_groups(parameters, optim)
    if offloaded is not None:
        return offloaded(groups, **options)
    options["fused"] = device.type == "cuda"
    return GuardedAdamW(groups, clip=optim.clip, **options) if guarded else torch.optim.AdamW(groups, **options)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name, in an order that all ranks share."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Guarded(torch.optim.Optimizer):
    """Clips the global gradient norm, and leaves everything as it was when that norm is not finite.

    For DeepSpeed's stage 0 in fp32, the one case in which it puts no wrapper of its own around the optimizer: there
    nothing would hold back an update with a NaN, and its clipping reports no norm. After a step DeepSpeed reads
    `overflow` (was the step refused) and `_global_grad_norm` (before clipping) from whatever optimizer it has stepped
    (`DeepSpeedEngine._take_model_step`, runtime/engine.py:3518 and 3536 in 0.19.8). This class sets both, so that
    `was_step_applied` and `get_global_grad_norm` answer as they do at the other stages.
    """

    def __init__(self, groups: list[dict[str, object]], *, clip: float, **options: Any) -> None:
        """`clip` is the largest global norm; 0: no clipping. `options` are those of the class that is guarded."""
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


class GuardedAdamW(Guarded, torch.optim.AdamW):
    """AdamW, guarded."""


class GuardedMuon(Guarded, MuonWithAdamW):
    """Muon and AdamW, guarded."""
