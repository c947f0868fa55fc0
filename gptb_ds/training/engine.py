"""DeepSpeed around a window objective: one update, and evaluation in between.

Axes: B lanes of this rank, K steps, S slots, E embedding.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import nn

from gptb_ds.config import ConfigError, OptimConfig
from gptb_ds.data.window import Window
from gptb_ds.distributed.watchdog import long_work
from gptb_ds.distributed.world import World
from gptb_ds.extension_builds import CPU_ADAM, built
from gptb_ds.model.objective import WindowObjective
from gptb_ds.model.window_model import WindowModel
from gptb_ds.phases import phase
from gptb_ds.training.deepspeed_policy import Policy, offload_devices, zero_stage
from gptb_ds.training.noise_scale import GradientNorms
from gptb_ds.training.optimizers import build_optimizer, trained_parameters
from gptb_ds.training.window_graphs import WindowGraphs, refusal

# DeepSpeed looks for its accelerator while it is imported, and says so on standard output.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
import deepspeed  # noqa: E402
from deepspeed.ops.adam import DeepSpeedCPUAdam  # noqa: E402
from deepspeed.ops.op_builder import CPUAdamBuilder  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402
from deepspeed.utils import logger  # noqa: E402

from gptb_ds.training.fp32_state import Fp32State, leave_out_inference_kernel  # noqa: E402

logger.setLevel(logging.WARNING)
# Our Muon is none of the optimizers that DeepSpeed knows; tests/distributed/test_muon.py is the test that it asks for.
logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
# DeepSpeed calls these under their old names; nothing that a user could do about it.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
leave_out_inference_kernel()


@dataclass(frozen=True)
class UpdateResult:
    """What one update did. `applied` is off when it was skipped, or when nothing counted in it.

    `loss` is nats per counted target over all ranks; None: nothing was counted. `part_norm`, where noise is measured,
    is the mean squared norm of the gradients of the update's `parts`: what each rank took in one backward pass. `flags`
    are those that were raised on any rank. `accuracy`, where the objective counts right answers, is their share of the
    counted targets.
    """

    loss: float | None
    grad_norm: float
    applied: bool
    flags: tuple[bool, ...] = ()
    part_norm: float | None = None
    parts: int = 1
    accuracy: float | None = None

    @property
    def skipped(self) -> bool:
        """Whether its loss or gradient was not finite."""
        return not self.applied and self.loss is not None


def check_policy(policy: Policy) -> None:
    """Raises ConfigError, a line for each mistake, when DeepSpeed refuses the policy's ZeRO part."""
    try:
        DeepSpeedZeroConfig(**policy.get("zero_optimization", {}))
    except ValidationError as error:
        lines = [f"zero_optimization.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join(f"--deepspeed_config: {line}" for line in lines)) from None


class Engine:
    """A window objective under DeepSpeed, on this rank. `fp32_state` has its weights and moments by name."""

    def __init__(
        self,
        objective: WindowObjective,
        world: World,
        *,
        lanes: int,
        lane_groups: int,
        precision: str,
        optim: OptimConfig,
        policy: Policy,
        measure_noise: bool = False,
        graph: str = "auto",
        say: Callable[[str], None] = print,
    ) -> None:
        """`lanes` counts this rank's own. `graph`: windows are captured as CUDA graphs, where that is possible ("auto",
        "on"; "off"); `say` takes the line when it is not. Raises DeepSpeedChangedError, see `Fp32State`.
        """
        assert lanes % lane_groups == 0
        self.world, self._groups = world, lane_groups
        self.stage = zero_stage(policy)
        # The one case without a wrapper of DeepSpeed's around the optimizer: ours guards itself, and clips.
        guarded = self.stage == 0 and precision == "fp32"
        parameters = trained_parameters(objective.model)
        offload = offload_devices(policy)["offload_optimizer"] != "none" and world.device.type != "cpu"
        if offload and optim.name == "adamw":
            with long_work(f"building DeepSpeed's {CPU_ADAM}"):
                world.on_all_ranks(built, CPU_ADAM, CPUAdamBuilder().load, say)
        self._base = build_optimizer(
            objective.model,
            optim,
            device=world.device,
            guarded=guarded,
            offloaded=DeepSpeedCPUAdam if offload else None,
        )
        settings = policy | {
            "train_micro_batch_size_per_gpu": lanes // lane_groups,
            "gradient_accumulation_steps": lane_groups,
            "gradient_clipping": 0.0 if guarded else optim.clip,
            "bf16": {"enabled": precision == "bf16", "check_grad_overflow": precision == "bf16"},
            "fp16": {"enabled": precision == "fp16"},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,  # Muon: tested here against one process
            "steps_per_print": None,
        }
        self._norms = GradientNorms(parameters.values(), world.device) if measure_noise else None
        self._counter = objective
        self.graphs = None
        refused = refusal(objective.model, world.device, self.stage)
        if refused is None and graph != "off":
            self.graphs = WindowGraphs(objective, say, bounded=graph == "auto")
        elif refused is not None and (graph == "on" or (graph == "auto" and world.device.type != "cpu")):
            say(f"train.graph {graph}: windows are not captured as CUDA graphs: {refused}")
        self._deepspeed, *_ = deepspeed.initialize(
            model=objective,
            optimizer=self._base,
            config=settings,
            dist_init_required=False if deepspeed.comm.is_initialized() else None,
        )
        self.fp32_state = Fp32State(
            self._deepspeed, parameters, self._base, stage=self.stage, precision=precision, device=world.device
        )
        if self.graphs is not None:
            self.graphs.follow_the_weights()
            objective.replacement = self.graphs
        self.dtype = next(objective.parameters()).dtype

    @property
    def objective(self) -> nn.Module:
        """The objective with DeepSpeed's hooks: call it for evaluation, inside `evaluating()`."""
        wrapped: nn.Module = self._deepspeed
        return wrapped

    @property
    def model(self) -> WindowModel:
        """The model inside, with DeepSpeed's hooks on its modules."""
        model: WindowModel = self._deepspeed.module.model
        return model

    def close(self) -> None:
        """Lets go of graphs, and at stages 0 to 2 of all else, for a process that drops this engine and goes on.

        Dropping it is not enough. DeepSpeed's ZeRO optimizer (stages 1 and 2, 0.19.8) hangs hooks on the nodes that
        gather gradients, which Python's collector can't see into: they hold the engine until `destroy` removes them. At
        stage 3 others remain.
        """
        if self.graphs is not None:
            self.graphs.release()
        self._deepspeed.destroy()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout and no gradients inside; afterwards training goes on, after an error too.

        A step that was compiled for training runs uncompiled meanwhile: it would be compiled once more for evaluation,
        which takes longer than the evaluation.
        """
        self._deepspeed.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._deepspeed.train()

    def update(
        self,
        groups: list[tuple[Window, torch.Tensor]],
        lr: float,
        counted: float,
        betas: tuple[float, float] | None = None,
        flags: Callable[[], tuple[bool, ...]] = tuple,
    ) -> tuple[UpdateResult, list[torch.Tensor]]:
        """One optimizer update over these lane groups of this rank: [(window, state (B, S-1, E))], in order.

        `counted` is the (weighted) number of counted targets over all ranks; `betas` are Adam's, from now on. Returns
        the result and the new states. A loss or gradient that is not finite anywhere leaves weights and moments as they
        were, on all ranks, and so does an update in which nothing is counted. All ranks must bring as many groups; the
        number may change from one window to the next.

        `flags`, asked for at the end, are what this rank has to tell the others. They ride in the message that adds up
        the loss: between a thousand ranks each message of its own would cost as much as a small update.
        """
        if not counted:
            return self._pass_over(groups, flags)
        self._accumulate(len(groups), groups[0][0].lanes)
        # DeepSpeed averages over ranks and divides by the number of groups: this makes a global mean of the sums.
        scale = self.world.size * len(groups) / counted
        for group in self._base.param_groups:
            group["lr"] = lr
            group["betas"] = betas or group["betas"]
        # The loss, a squared norm, right answers, the flags.
        shared = torch.zeros(3 + len(flags()), dtype=torch.float64, device=self.world.device)
        states = []
        for window, state in groups:
            with phase("forward"):
                loss, new_state = self._deepspeed(
                    window.input_ids, window.targets, window.reset, state, window.loss_weights
                )
            with phase("backward"):
                # A loss that is not finite makes its gradients so (0 x inf and 0 x nan are nan): then every rank learns
                # of it, and skips. Not `torch.where` with two numbers: it copies each to the device, and waits for it.
                self._deepspeed.backward(loss * (loss.detach() * 0.0 + scale))
            shared[0] += loss.detach().double()
            if self._counter.right is not None:
                shared[2] += self._counter.right
            states.append(new_state)
            with phase("optimizer"):
                self._deepspeed.step()
        if self._norms is not None:
            shared[1] = self._norms.take()
        for number, raised in enumerate(flags(), start=3):
            if raised:
                shared[number].fill_(1.0)  # a constant of the kernel: nothing is copied to the device
        norm, (loss_sum, squared_norms, right, *raised_by) = _read(
            self._deepspeed.get_global_grad_norm(), self.world.sum(shared)
        )
        result = UpdateResult(
            loss=loss_sum / counted,
            grad_norm=norm,
            applied=bool(self._deepspeed.was_step_applied()),
            # What arrived at the hooks was a part's sum divided by counted / ranks. Its mean is `groups` times that.
            part_norm=None if self._norms is None else squared_norms * len(groups) / self.world.size,
            parts=self.world.size * len(groups),
            flags=tuple(ranks > 0 for ranks in raised_by),
            accuracy=right / counted if self._counter.right is not None else None,
        )
        return result, states

    def _pass_over(
        self, groups: list[tuple[Window, torch.Tensor]], flags: Callable[[], tuple[bool, ...]]
    ) -> tuple[UpdateResult, list[torch.Tensor]]:
        """An update in which nothing counts: the states go on, as in an evaluation, and the optimizer does not step.

        A step with gradients of zero is none that changes nothing. Adam's follows what is left of its mean gradient;
        Muon's has its full length in that direction, however little is left, update after update.
        """
        with phase("forward"), self.evaluating():
            states = [self._deepspeed(w.input_ids, w.targets, w.reset, state, w.loss_weights)[1] for w, state in groups]
        raised = torch.tensor(flags(), dtype=torch.float64, device=self.world.device)
        raised_by = self.world.sum(raised).tolist()
        return UpdateResult(None, 0.0, applied=False, flags=tuple(ranks > 0 for ranks in raised_by)), states

    def _accumulate(self, groups: int, lanes: int) -> None:
        """Tells DeepSpeed how many backward passes make an update.

        It decides by the count of all passes so far, modulo this number: change it at a window's edge only, where the
        count is a multiple of every number that is in use.
        """
        if groups != self._groups:
            self._deepspeed.set_train_micro_batch_size(lanes)
            self._deepspeed.set_train_batch_size(lanes * self.world.size * groups)
            self._groups = groups


def _read(norm: torch.Tensor | float | None, numbers: torch.Tensor) -> tuple[float, list[float]]:
    """DeepSpeed's gradient norm (nan when it has none) and these numbers, on the host: one wait for the device."""
    if isinstance(norm, torch.Tensor) and norm.device == numbers.device:
        norm, *values = torch.cat((norm.to(numbers.dtype).reshape(1), numbers)).tolist()
    else:
        values = numbers.tolist()
    return math.nan if norm is None else float(norm), values
