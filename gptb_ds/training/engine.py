"""DeepSpeed: the only module that imports it. One update, and the fp32 weights and moments by name.

Axes: B lanes of this rank, K steps, S slots, E embedding.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import nn

from gptb_ds.config import ConfigError, OptimConfig
from gptb_ds.distributed.world import World
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.deepspeed_policy import zero_stage

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
import deepspeed.runtime.zero.config  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

logger.setLevel(logging.WARNING)
# DeepSpeed calls these under their old names; nothing that a user could do about it.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
# DeepSpeed would compile a shared-memory all-reduce that serves only inference each time a CPU job starts.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class UpdateResult:
    """What one update did. `loss` is nats per counted target over all ranks; `applied` is off when it was skipped."""

    loss: float
    grad_norm: float
    applied: bool


def check_policy(policy: dict[str, Any]) -> None:
    """Raises ConfigError, a line for each mistake, when DeepSpeed refuses the policy's ZeRO part."""
    try:
        deepspeed.runtime.zero.config.DeepSpeedZeroConfig(**policy.get("zero_optimization", {}))
    except ValidationError as error:
        lines = [f"zero_optimization.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join(f"--deepspeed_config: {line}" for line in lines)) from None


class Engine:
    """A window objective under DeepSpeed, on this rank.

    Weights and moments cross this boundary as full float32 tensors by parameter name (the canonical form), so that any
    ZeRO stage, precision and number of ranks can read what another has written.
    """

    def __init__(
        self,
        objective: WindowObjective,
        world: World,
        *,
        lanes: int,
        lane_groups: int,
        precision: str,
        optim: OptimConfig,
        policy: dict[str, Any],
        monitor: dict[str, Any] | None = None,
    ) -> None:
        """`lanes` counts this rank's own; `monitor` is DeepSpeed's configuration of metric sinks."""
        assert lanes % lane_groups == 0
        self.world, self.lane_groups = world, lane_groups
        self.stage = zero_stage(policy)
        self._own_guard = self.stage == 0 and precision == "fp32"
        self._names = {name: p for name, p in objective.model.named_parameters() if p.requires_grad}
        self._base = _optimizer(self._names, optim, policy, world.device, self._own_guard)
        settings = policy | {
            "train_micro_batch_size_per_gpu": lanes // lane_groups,
            "gradient_accumulation_steps": lane_groups,
            "gradient_clipping": 0.0 if self._own_guard else optim.clip,
            "bf16": {"enabled": precision == "bf16", "check_grad_overflow": precision == "bf16"},
            "fp16": {"enabled": precision == "fp16"},
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }
        self._clip = optim.clip
        self._deepspeed, *_ = deepspeed.initialize(
            model=objective,
            optimizer=self._base,
            config=settings | (monitor or {}),
            dist_init_required=False if deepspeed.comm.is_initialized() else None,
        )
        # Some wrappers step their optimizer once while they are built: its state starts from nothing all the same.
        if self.stage == 0 and precision != "fp32":
            self._base.state.clear()
        self.dtype = next(objective.parameters()).dtype
        self.monitor = self._deepspeed.monitor

    @property
    def objective(self) -> nn.Module:
        """The objective with DeepSpeed's hooks: call it for evaluation; train() and eval() switch dropout."""
        return self._deepspeed

    @property
    def model(self) -> GPTBLMHeadModel:
        """The model inside, with DeepSpeed's hooks on its modules."""
        return self._deepspeed.module.model

    def update(
        self, groups: list[tuple[Any, torch.Tensor]], lr: float, counted: float
    ) -> tuple[UpdateResult, list[torch.Tensor]]:
        """One optimizer step over this rank's lane groups: [(window, state (B, S-1, E))], in order.

        `counted` is the (weighted) number of counted targets over all ranks. Returns the result and the new states. A
        loss or gradient that is not finite anywhere leaves weights and moments as they were, on all ranks.
        """
        assert len(groups) == self.lane_groups
        # DeepSpeed averages over ranks and divides by the number of groups: this makes a global mean of the sums.
        scale = self.world.size * self.lane_groups / max(counted, 1.0)
        for group in self._base.param_groups:
            group["lr"] = lr
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        states = []
        for window, state in groups:
            loss, new_state = self._deepspeed(
                window.input_ids, window.targets, window.reset, state, window.loss_weights
            )
            # A loss that is not finite makes its gradients so: then every rank learns of it, and skips.
            self._deepspeed.backward(loss * torch.where(loss.detach().isfinite(), scale, math.nan))
            total += loss.detach().double()
            states.append(new_state)
            if self._own_guard and len(states) == len(groups):
                self._guard()
            self._deepspeed.step()
        self.world.sum(total)
        norm = self._norm if self._own_guard else self._deepspeed.get_global_grad_norm()
        norm = float(norm) if norm is not None else math.nan
        applied = math.isfinite(norm) if self._own_guard else bool(self._deepspeed.was_step_applied())
        return UpdateResult(total.item() / max(counted, 1.0), norm, applied), states

    @property
    def _held(self) -> _HeldAdamW:
        assert isinstance(self._base, _HeldAdamW)
        return self._base

    def _guard(self) -> None:
        """Stage 0 in fp32 has no wrapper of DeepSpeed's: clips, reports the norm, and holds a bad update back."""
        grads = [p.grad for p in self._names.values() if p.grad is not None]
        self._norm = float(nn.utils.get_total_norm(grads))
        self._held.hold = not math.isfinite(self._norm)
        if self._clip > 0 and not self._held.hold:
            nn.utils.clip_grads_with_norm_(self._names.values(), self._clip, torch.tensor(self._norm))

    # The canonical form

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every trained parameter, in an order that all ranks share."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._names.items()}

    def export(self, keep: Callable[[str], bool]) -> dict[str, dict[str, torch.Tensor]]:
        """{"weight" | "exp_avg" | "exp_avg_sq": {name: float32 CPU tensor}} of the parameters that `keep` wants here.

        Every rank must call it: the pieces of a parameter lie on several.
        """
        self._ensure_moments()
        out: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in ("weight", *MOMENTS)}
        for name, master in self._masters():
            for kind in out:
                tensor = master.get(kind)
                if keep(name):
                    out[kind][name] = tensor.detach().to("cpu", torch.float32, copy=True)
        return out

    def load(self, fetch: Callable[[str, str], torch.Tensor], step: int) -> None:
        """Writes weights and moments from `fetch(kind, name)` (full float32 CPU tensors) and Adam's step count.

        Every rank must call it, with the same values.
        """
        self._ensure_moments()
        for name, master in self._masters():
            for kind in ("weight", *MOMENTS):
                master.set(kind, fetch(kind, name).to(self.world.device))
        for state in self._base.state.values():
            if torch.is_tensor(state["step"]):
                state["step"].fill_(float(step))
            else:
                state["step"] = step

    def scaler_state(self) -> dict[str, float]:
        """fp16's dynamic loss scale as plain numbers ({} in other precisions)."""
        return {k: v for k, v in vars(self._scaler()).items() if type(v) in (int, float)} if self._scaler() else {}

    def load_scaler_state(self, values: dict[str, float]) -> None:
        """Restores `scaler_state`; ignored in other precisions."""
        for key, value in values.items():
            if self._scaler() and type(getattr(self._scaler(), key, None)) in (int, float):
                setattr(self._scaler(), key, value)

    def _scaler(self) -> Any:
        if not self._deepspeed.fp16_enabled():
            return None
        return getattr(self._deepspeed.optimizer, "loss_scaler", None) or None

    def _masters(self) -> Iterator[tuple[str, _Master]]:
        optimizer = self._deepspeed.optimizer
        copies: dict[int, torch.Tensor] = {}
        if self.stage == 0:
            for low, high in zip(
                getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True
            ):
                copies |= {id(p): master for p, master in zip(low, high, strict=True)}
        for name, parameter in self._names.items():
            if self.stage == 0:
                yield name, ReplicatedMaster(parameter, copies.get(id(parameter), parameter), self._base)
            else:
                yield name, PartitionedMaster(parameter, self.stage)

    def _ensure_moments(self) -> None:
        """Adam makes its moments at the first step; a checkpoint needs them before."""
        optimizer = self._deepspeed.optimizer
        flat = getattr(optimizer, "fp32_partitioned_groups_flat", None) or getattr(
            optimizer, "single_partition_of_fp32_groups", None
        )
        if flat is None:
            flat = [p for group in self._base.param_groups for p in group["params"]]
        for tensor in flat:
            state = self._base.state[tensor]
            if not state:
                whole = isinstance(self._base, deepspeed.ops.adam.DeepSpeedCPUAdam)
                device = tensor.device if self._base.defaults.get("fused") else "cpu"
                state["step"] = 0 if whole else torch.zeros((), dtype=torch.float32, device=device)
                state |= {moment: torch.zeros_like(tensor) for moment in MOMENTS}
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            # DeepSpeed links after its first group's first step, when the other groups have no moments yet.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()


class _Master:
    """One parameter's fp32 weight and moments as full tensors."""

    def get(self, kind: str) -> torch.Tensor:
        raise NotImplementedError

    def set(self, kind: str, value: torch.Tensor) -> None:
        raise NotImplementedError


class ReplicatedMaster(_Master):
    """Stage 0: every rank has all of it; in bf16 and fp16 the master is a copy beside the working weight."""

    def __init__(self, parameter: nn.Parameter, master: torch.Tensor, base: torch.optim.Optimizer) -> None:
        self.parameter, self.master, self.base = parameter, master, base

    def get(self, kind: str) -> torch.Tensor:
        return self.master if kind == "weight" else self.base.state[self.master][kind]

    def set(self, kind: str, value: torch.Tensor) -> None:
        self.get(kind).data.copy_(value)
        if kind == "weight":
            self.parameter.data.copy_(value)


class PartitionedMaster(_Master):
    """Stages 1 to 3: the pieces lie on the ranks; DeepSpeed's fragment functions gather and scatter them."""

    def __init__(self, parameter: nn.Parameter, stage: int) -> None:
        self.parameter, self.stage = parameter, stage

    def get(self, kind: str) -> torch.Tensor:
        if kind == "weight":
            return safe_get_full_fp32_param(self.parameter)
        return safe_get_full_optimizer_state(self.parameter, kind)

    def set(self, kind: str, value: torch.Tensor) -> None:
        if self.stage == 3:
            piece = self._own_piece(value)
            if kind == "weight":
                safe_set_local_fp32_param(self.parameter, piece)
            else:
                safe_set_local_optimizer_state(self.parameter, piece, kind)
        elif kind == "weight":
            safe_set_full_fp32_param(self.parameter, value)
        else:
            safe_set_full_optimizer_state(self.parameter, value, kind)
        if kind == "weight":
            # The working copy too, or the first forward would still use the old weights.
            with deepspeed.zero.GatheredParameters([self.parameter], modifier_rank=0, enabled=self.stage == 3):
                self.parameter.data.copy_(value)

    def _own_piece(self, value: torch.Tensor) -> torch.Tensor:
        """This rank's share at stage 3: equal pieces of the flat tensor, the last one padded with zeros."""
        size = cast(Any, self.parameter).ds_tensor.numel()
        flat = nn.functional.pad(value.flatten(), (0, size * deepspeed.comm.get_world_size() - value.numel()))
        return flat.narrow(0, size * deepspeed.comm.get_rank(), size)


def _optimizer(
    names: dict[str, nn.Parameter], optim: OptimConfig, policy: dict[str, Any], device: torch.device, held: bool
) -> torch.optim.Optimizer:
    """AdamW over two groups: matrices decay; vectors, embeddings of position and the initial state don't."""
    matrices = [p for n, p in names.items() if p.ndim >= 2 and not n.endswith(("initial_embeds", "wpe.weight"))]
    chosen = {id(p) for p in matrices}
    others = [p for p in names.values() if id(p) not in chosen]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    offload = policy.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    # The rate is set before each update; until then it is 0, because some wrappers step once while they are built.
    if offload and device.type != "cpu":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=0.0, betas=(0.9, 0.95))
    kind = _HeldAdamW if held else torch.optim.AdamW
    return kind(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda")


class _HeldAdamW(torch.optim.AdamW):
    """AdamW whose next step can be held back."""

    hold = False

    def step(self, closure: Any = None) -> Any:
        if not self.hold:
            return super().step(closure)
        return None
