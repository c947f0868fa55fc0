"""Weights and moments in their canonical form, and every private internal of DeepSpeed that this needs.

The canonical form is a full float32 tensor for each parameter's name, for its weight and for each of its moments. A
run at another ZeRO stage, in another precision, on other ranks can read it.

DeepSpeed keeps these tensors in places that differ by stage, and has no public way to all of them. Everything of its
inside that we touch is named in this file and checked when the engine is built (`_INTERNALS`): DeepSpeed may rename it
in any release, and a checkpoint without moments would be noticed only by the run that resumes from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import deepspeed
import deepspeed.ops
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from gptb_ds.config import ConfigError
from gptb_ds.distributed.watchdog import progress_made
from gptb_ds.training.muon import MOMENTUM, MuonWithAdamW, Piece

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
# A tensor that the base optimizer steps on this rank ("weight") and what the optimizer knows of it, on the CPU.
OwnPart = dict[str, torch.Tensor | int]


class DeepSpeedChangedError(ConfigError):
    """The installed DeepSpeed lacks an internal that is needed here; the message says which, and for what."""

    shared = True  # every rank finds it, and rank 0 speaks for all


@dataclass(frozen=True)
class Internal:
    """A private name of DeepSpeed's: where 0.19.8 has it, and what goes wrong when it is gone."""

    name: str
    where: str
    without_it: str


_MASTERS = "the fp32 weights cannot be saved"
_NO_WAY_BACK = "training cannot go back to a snapshot"
# By ZeRO stage: what is read from the wrapper around the optimizer. Stage 0 has one in bf16 and fp16.
_INTERNALS: dict[int, tuple[Internal, ...]] = {
    0: (
        Internal("fp16_groups", "FP16_UnfusedOptimizer, runtime/fp16/unfused_optimizer.py:67", _MASTERS),
        Internal("fp32_groups", "FP16_UnfusedOptimizer, runtime/fp16/unfused_optimizer.py:68", _MASTERS),
        Internal(
            "overflow_checker",
            "FP16_UnfusedOptimizer, runtime/fp16/unfused_optimizer.py:106",
            "an update waits for the GPU once a parameter",
        ),
    ),
    1: (
        Internal(
            "single_partition_of_fp32_groups",
            "DeepSpeedZeroOptimizer, runtime/zero/stage_1_and_2.py:364",
            "the moments cannot be made before the first update",
        ),
        Internal(
            "_hp_optimizer_states_linked",
            "DeepSpeedZeroOptimizer, runtime/zero/stage_1_and_2.py:744",
            "moments made before the first update are not saved",
        ),
        Internal(
            "_lazy_init_hp_params_optimizer_state",
            "DeepSpeedZeroOptimizer, runtime/zero/stage_1_and_2.py:852",
            "moments made before the first update are not saved",
        ),
        Internal(
            "bit16_groups",
            "DeepSpeedZeroOptimizer, runtime/zero/stage_1_and_2.py:370",
            "it is not known where a parameter lies in the flat pieces",
        ),
        Internal(
            "update_lp_params",
            "DeepSpeedZeroOptimizer, runtime/zero/stage_1_and_2.py:3172",
            _NO_WAY_BACK,
        ),
    ),
    3: (
        *(
            Internal(name, f"DeepSpeedZeroOptimizer_Stage3, runtime/zero/stage3.py:{line}", _NO_WAY_BACK)
            for name, line in (
                ("checkpoint_event_prologue", 3844),
                ("checkpoint_event_epilogue", 3847),
                ("_reassign_or_swap_out_partitioned_parameters", 2854),
            )
        ),
        Internal(
            "fp32_partitioned_groups_flat",
            "DeepSpeedZeroOptimizer_Stage3, runtime/zero/stage3.py:416",
            "the moments cannot be made before the first update",
        ),
        Internal(
            "fp16_groups",
            "DeepSpeedZeroOptimizer_Stage3, runtime/zero/stage3.py:404",
            "it is not known where a parameter lies in the flat pieces",
        ),
        Internal(
            "grad_position",
            "DeepSpeedZeroOptimizer_Stage3, runtime/zero/stage3.py:500",
            "it is not known where a parameter lies in the flat pieces",
        ),
    ),
}
_INTERNALS[2] = _INTERNALS[1]
_SCALER_LOST = "fp16's loss scale cannot be saved"
_SCALERS = {
    0: Internal("loss_scale_config", "FP16_UnfusedOptimizer, runtime/fp16/unfused_optimizer.py:60", _SCALER_LOST),
    1: Internal("loss_scaler", "DeepSpeedZeroOptimizer, runtime/zero/stage_1_and_2.py:722", _SCALER_LOST),
    2: Internal("loss_scaler", "DeepSpeedZeroOptimizer, runtime/zero/stage_1_and_2.py:722", _SCALER_LOST),
    3: Internal("loss_scaler", "DeepSpeedZeroOptimizer_Stage3, runtime/zero/stage3.py:524", _SCALER_LOST),
}
# What stage 3 puts on each parameter.
_ON_A_PARAMETER = (
    Internal("ds_shape", "runtime/zero/partition_parameters.py:1279", "a parameter's full shape is unknown"),
    Internal("ds_tensor", "runtime/zero/partition_parameters.py:1846", "a checkpoint cannot be loaded"),
)
# What DeepSpeed reads from our own optimizer, see GuardedAdamW.
_READ_FROM_OURS = (
    Internal(
        "_global_grad_norm", "DeepSpeedEngine._take_model_step, runtime/engine.py:3518", "no gradient norm is reported"
    ),
    Internal(
        "overflow", "DeepSpeedEngine._take_model_step, runtime/engine.py:3536", "a skipped update counts as applied"
    ),
)


def leave_out_inference_kernel() -> None:
    """Keeps DeepSpeed from compiling a shared-memory all-reduce that serves only inference, each time a CPU job starts.

    `TorchBackend.__init__` (comm/torch.py:47) compiles it when this table calls it compatible. A machine without a
    compiler could not train, and others would wait for it. Without the table nothing breaks: it is compiled again.
    """
    if "deepspeed_shm_comm" in getattr(deepspeed.ops, "__compatible_ops__", {}):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class _Master(Protocol):
    """One parameter's fp32 weight ("weight") and moments as full tensors."""

    def get(self, kind: str) -> torch.Tensor: ...

    def set(self, kind: str, value: torch.Tensor) -> None: ...


class ReplicatedMaster:
    """Stage 0: every rank has all of it; in bf16 and fp16 the master is a copy beside the working weight."""

    def __init__(self, parameter: nn.Parameter, master: torch.Tensor, base: torch.optim.Optimizer) -> None:
        self.parameter, self.master, self.base = parameter, master, base

    def get(self, kind: str) -> torch.Tensor:
        found: torch.Tensor = self.master if kind == "weight" else self.base.state[self.master][kind]
        return found

    def set(self, kind: str, value: torch.Tensor) -> None:
        self.get(kind).data.copy_(value)
        if kind == "weight":
            self.parameter.data.copy_(value)


class PartitionedMaster:
    """Stages 1 to 3: the pieces lie on the ranks; DeepSpeed's fragment functions gather and scatter them."""

    def __init__(self, parameter: nn.Parameter, stage: int) -> None:
        self.parameter, self.stage = parameter, stage

    def get(self, kind: str) -> torch.Tensor:
        found: torch.Tensor = (
            safe_get_full_fp32_param(self.parameter)
            if kind == "weight"
            else safe_get_full_optimizer_state(self.parameter, kind)
        )
        return found

    def set(self, kind: str, value: torch.Tensor) -> None:
        """Writes the master, and for a weight the working copy too.

        At stage 3 through the functions for a rank's own piece: those for a full tensor (`safe_set_full_fp32_param`,
        which is `set_full_hp_param` in runtime/zero/stage3.py:3183) cut the ranks' pieces out of the value as it is.
        Unless the number of ranks divides its size, the last rank's piece ends beyond it, and they raise.

        DeepSpeed refreshes the working copy from the master only in a step. Without writing it here, the first forward
        pass after a resume would still use the weights that the model was built with.
        """
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
            with deepspeed.zero.GatheredParameters([self.parameter], modifier_rank=0, enabled=self.stage == 3):
                self.parameter.data.copy_(value)

    def _own_piece(self, value: torch.Tensor) -> torch.Tensor:
        """This rank's share at stage 3: equal pieces of the flat tensor, the last one padded with zeros."""
        size: int = self.parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = nn.functional.pad(value.flatten(), (0, size * deepspeed.comm.get_world_size() - value.numel()))
        return flat.narrow(0, size * deepspeed.comm.get_rank(), size)


class _NormDecides:
    """In the place of DeepSpeed's `CheckOverflow` at stage 0: never finds anything.

    That one asks each parameter's gradient for a NaN, and the host waits for the GPU each time. `step` then looks at
    the norm of all gradients, too, and skips the update when it is not finite (`is_invalid_grad_norm`,
    runtime/fp16/unfused_optimizer.py:227): a single NaN in any of them makes it so.
    """

    def check(self) -> bool:
        return False


class Fp32State:
    """The fp32 weights and moments of an engine, by parameter name, whatever its ZeRO stage and precision."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        parameters: dict[str, nn.Parameter],
        base: torch.optim.Optimizer,
        *,
        stage: int,
        precision: str,
        device: torch.device,
    ) -> None:
        """`base` is the optimizer that was given to DeepSpeed. Raises DeepSpeedChangedError, one line."""
        self._wrapper = engine.optimizer
        self._parameters, self._base, self._stage, self._device = parameters, base, stage, device
        self._wrapped = stage > 0 or precision != "fp32"
        self._scaler_name = _SCALERS[stage].name if precision == "fp16" else None
        self._check(precision)
        # The wrapper of stage 0 steps once in its constructor (`initialize_optimizer_states`, unfused_optimizer.py:412,
        # with gradients of zero, to have the moments in memory early). That leaves a count of 1 behind: the first
        # update would be taken for the second, and Adam's bias correction with it. Its state starts from nothing.
        self._copies: dict[int, torch.Tensor] = {}
        if stage == 0 and self._wrapped:
            base.state.clear()
            self._wrapper.overflow_checker = _NormDecides()
            for low, high in zip(self._wrapper.fp16_groups, self._wrapper.fp32_groups, strict=True):
                self._copies |= {id(p): master for p, master in zip(low, high, strict=True)}
        self._pieces = self._find_pieces()
        self._with_muon: Collection[str] = ()
        if isinstance(base, MuonWithAdamW):
            self._with_muon = base.matrices
            base.layout = lambda tensor: self._pieces[id(tensor)]

    def _check(self, precision: str) -> None:
        if self._wrapped:
            _must_have(self._wrapper, _INTERNALS[self._stage])
        if precision == "fp16":
            _must_have(self._wrapper, [_SCALERS[self._stage]])
        if self._stage == 3:
            _must_have(next(iter(self._parameters.values())), _ON_A_PARAMETER)
        if not self._wrapped:
            code = DeepSpeedEngine._take_model_step.__code__
            read = {*code.co_names, *code.co_consts}
            for internal in _READ_FROM_OURS:
                if internal.name not in read:
                    raise _changed(internal, f"no longer reads '{internal.name}' from the optimizer that it steps")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every trained parameter, in an order that all ranks share."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items()}

    def export(self, keep: Callable[[str], bool]) -> dict[str, dict[str, torch.Tensor]]:
        """{"weight" or a moment: {name: float32 CPU tensor}} of the parameters that `keep` wants here.

        Every rank must call it: the pieces of a parameter lie on several.
        """
        self._ensure_moments()
        out: dict[str, dict[str, torch.Tensor]] = {"weight": {}}
        for name, master in self._masters():
            for kind in ("weight", *self.moments(name)):
                tensor = master.get(kind)
                if keep(name):
                    out.setdefault(kind, {})[name] = tensor.detach().to("cpu", torch.float32, copy=True)
        return out

    def load(self, fetch: Callable[[str, str], torch.Tensor], adam_count: float, *, moments: bool = True) -> None:
        """Writes weights and moments from `fetch(kind, name)` (full float32 CPU tensors) and Adam's count of steps.

        Every rank must call it, with the same values. Without `moments` these stay zero.
        """
        self._ensure_moments()
        for name, master in self._masters():
            for kind in ("weight", *(self.moments(name) if moments else ())):
                master.set(kind, fetch(kind, name).to(self._device))
                progress_made(f"loading {kind} of {name}")
        self.set_adam_count(adam_count)

    def own_part(self) -> list[OwnPart]:
        """A copy of what lies on this rank, moments and count of steps included. No rank waits for another."""
        self._ensure_moments()
        return [
            {kind: _copied(value) for kind, value in ({"weight": tensor} | self._base.state[tensor]).items()}
            for tensor in self._stepped_tensors()
        ]

    @torch.no_grad()
    def set_own_part(self, parts: Sequence[OwnPart]) -> None:
        """Goes back to what `own_part` gave. Every rank must call it: the working weights are gathered anew."""
        for tensor, part in zip(self._stepped_tensors(), parts, strict=True):
            for kind, value in part.items():
                held = tensor if kind == "weight" else self._base.state[tensor][kind]
                if isinstance(held, torch.Tensor):
                    held.data.copy_(torch.as_tensor(value))
                else:
                    self._base.state[tensor][kind] = value
        self._refresh_working_weights()

    def set_adam_count(self, count: float) -> None:
        """The count of steps that Adam's bias correction stands at."""
        self._ensure_moments()
        for state in self._base.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(count)
            elif "step" in state:
                state["step"] = round(count)

    def moments(self, name: str) -> tuple[str, ...]:
        """The kinds of moments that a parameter has."""
        return (MOMENTUM,) if name in self._with_muon else ADAM_MOMENTS

    def scaler_state(self) -> dict[str, int | float]:
        """fp16's dynamic loss scale as plain numbers ({} in other precisions)."""
        if self._scaler_name is None:
            return {}
        return {k: v for k, v in vars(getattr(self._wrapper, self._scaler_name)).items() if type(v) in (int, float)}

    def load_scaler_state(self, values: dict[str, int | float]) -> None:
        """Restores `scaler_state`; ignored in other precisions."""
        for key in values.keys() & self.scaler_state().keys():
            setattr(getattr(self._wrapper, str(self._scaler_name)), key, values[key])

    def _masters(self) -> Iterator[tuple[str, _Master]]:
        for name, parameter in self._parameters.items():
            yield name, self._replicated(parameter) if self._stage == 0 else PartitionedMaster(parameter, self._stage)

    def _replicated(self, parameter: nn.Parameter) -> ReplicatedMaster:
        return ReplicatedMaster(parameter, self._copies.get(id(parameter), parameter), self._base)

    def _ensure_moments(self) -> None:
        """Makes the moments that are not there yet: zeros, as Adam's first step would make them.

        torch's Adam makes its moments in its first step, and no call makes them earlier. A checkpoint may be loaded or
        written before that (a resume, a run stopped before its first update), and `safe_set_full_optimizer_state` then
        raises a KeyError.

        At stages 1 and 2 the parameters must be linked to the moments, too. DeepSpeed does it once, in `step`, after
        the FIRST parameter group's step (`_lazy_init_hp_params_optimizer_state`, runtime/zero/stage_1_and_2.py:852): at
        that time the other groups have no moments, and theirs would never be found. So the links are made anew.
        """
        for tensor in self._stepped_tensors():
            state = self._base.state[tensor]
            if not state:
                kinds = self.moments(self._pieces[id(tensor)][0].name)
                if kinds == ADAM_MOMENTS:
                    counts_in_python = isinstance(self._base, DeepSpeedCPUAdam)
                    device = tensor.device if self._base.defaults.get("fused") else "cpu"
                    state["step"] = 0 if counts_in_python else torch.zeros((), dtype=torch.float32, device=device)
                state |= {kind: torch.zeros_like(tensor) for kind in kinds}
        if self._stage in (1, 2):
            self._wrapper._hp_optimizer_states_linked = False
            self._wrapper._lazy_init_hp_params_optimizer_state()

    def _refresh_working_weights(self) -> None:
        """The weights of the forward pass follow the fp32 ones, which DeepSpeed does only in a step.

        At stage 3 the pieces that lie on the ranks are written, and what DeepSpeed keeps gathered between steps (small
        parameters) would go on with the old values: it is given up before (`checkpoint_event_prologue`,
        runtime/zero/stage3.py:3844) and gathered again afterwards, as around a load of DeepSpeed's own checkpoints.
        """
        if self._stage == 3:
            self._wrapper.checkpoint_event_prologue()
            for number in range(len(self._wrapper.fp32_partitioned_groups_flat)):
                self._wrapper._reassign_or_swap_out_partitioned_parameters(number)
            self._wrapper.checkpoint_event_epilogue()
        elif self._stage > 0:
            self._wrapper.update_lp_params()
        else:
            for parameter in self._parameters.values():
                if id(parameter) in self._copies:
                    parameter.data.copy_(self._copies[id(parameter)])

    def _stepped_tensors(self) -> Sequence[torch.Tensor]:
        """The tensors that the base optimizer steps: this rank's flat pieces from stage 1 on."""
        if self._stage == 3:
            pieces: Sequence[torch.Tensor] = self._wrapper.fp32_partitioned_groups_flat
            return pieces
        if self._stage > 0:
            pieces = self._wrapper.single_partition_of_fp32_groups
            return pieces
        return [p for group in self._base.param_groups for p in group["params"]]

    def _find_pieces(self) -> dict[int, list[Piece]]:
        """Where the parameters lie in each tensor that the base optimizer steps, by the tensor's id."""
        shapes, names = self.shapes(), {id(p): name for name, p in self._parameters.items()}
        found: dict[int, list[Piece]] = {}
        if self._stage == 0:
            masters = {name: self._replicated(parameter).master for name, parameter in self._parameters.items()}
            return {id(master): [Piece(name, shapes[name], 0, 0, master.numel())] for name, master in masters.items()}
        groups = self._wrapper.fp16_groups if self._stage == 3 else self._wrapper.bit16_groups
        for tensor, group in zip(self._stepped_tensors(), groups, strict=True):
            found[id(tensor)] = [
                Piece(names[id(parameter)], shapes[names[id(parameter)]], *self._span(parameter)) for parameter in group
            ]
        return found

    def _span(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """(start in the parameter, offset in the flat tensor, size) of this rank's piece of a parameter."""
        if self._stage == 3:
            _, offset, size = self._wrapper.grad_position[self._wrapper.get_param_id(parameter)]
            start = size * deepspeed.comm.get_rank()
            # Equal pieces: the last ranks' are padded.
            total = parameter.ds_numel  # type: ignore[attr-defined]
            return start, offset, max(0, min(size, total - start))
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return 0, 0, 0
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return here.start, there.start, here.numel


def _copied(value: torch.Tensor | int) -> torch.Tensor | int:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _must_have(holder: object, internals: Sequence[Internal]) -> None:
    for internal in internals:
        if not hasattr(holder, internal.name):
            raise _changed(internal, f"{type(holder).__name__} has no '{internal.name}' any more")


def _changed(internal: Internal, what: str) -> DeepSpeedChangedError:
    return DeepSpeedChangedError(
        f"DeepSpeed {deepspeed.__version__}: {what} (in 0.19.8: {internal.where}), so that {internal.without_it};"
        " install deepspeed>=0.19.8,<0.20"
    )
