"""A window's forward and backward pass as CUDA graphs: one launch each, instead of hundreds a column.

With few lanes a GPU waits for the host, which launches its kernels one by one. A graph records the launches of a whole
window once; later windows only copy their columns and state into the recorded places and replay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from gptb_ds.distributed.watchdog import progress_made
from gptb_ds.model.gradient_sums import Context
from gptb_ds.model.modeling import RecurrentLM
from gptb_ds.model.objective import WindowObjective
from gptb_ds.model.window_model import WindowModel

# Eager windows before a capture: libraries choose their kernels and take their workspaces in them.
WARM_UPS = 2
# Windows of different shapes (updates a window, with loss weights or without) that are kept as graphs.
MOST_SHAPES = 8
# Columns times blocks up to which "auto" captures: each is 50 to 100 launches, a million take gigabytes.
MOST_BLOCKS = 4096


@dataclass
class _Captured:
    """A window of one shape: where its inputs go, its two graphs, and where their results lie after a replay."""

    inputs: list[torch.Tensor]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    loss: torch.Tensor
    state_BSE: torch.Tensor
    loss_gradient: torch.Tensor
    gradients: list[torch.Tensor | None]


class _Replay(torch.autograd.Function):
    """A captured window, to autograd one operation on the parameters: their hooks run as behind any other."""

    @staticmethod
    def forward(ctx: Context, captured: _Captured, *parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.captured = captured
        captured.forward.replay()
        # Copies: the next replay writes over the recorded ones.
        loss, state_BSE = captured.loss.clone(), captured.state_BSE.clone()
        ctx.mark_non_differentiable(state_BSE)
        return loss, state_BSE

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, loss_gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        captured: _Captured = ctx.captured
        captured.loss_gradient.copy_(loss_gradient)
        captured.backward.replay()
        given = [gradient for gradient in captured.gradients if gradient is not None]
        # Copies again: autograd makes what it gets here a parameter's `grad` as it is, and adds the next lane group's
        # to it. `_foreach_mul` is a few launches for all of them, and a product with 1 changes no bit.
        copies = iter(torch._foreach_mul(given, 1.0))
        return None, *(None if gradient is None else next(copies) for gradient in captured.gradients)


class WindowGraphs:
    """Calls a window objective through CUDA graphs, one pair for each shape of window.

    A twin of the objective is captured, whose parameters share the memory of the real ones but are tensors of their
    own: DeepSpeed's and other hooks on the real ones, which exchange and count gradients, must not run while launches
    are only recorded, and must run after each replay.
    """

    def __init__(self, objective: WindowObjective, say: Callable[[str], None], *, bounded: bool = True) -> None:
        """Before DeepSpeed puts its hooks on `objective`. Afterwards set `objective.replacement` to this object.

        `say` takes a line for a person, when a window cannot be captured; `bounded`: one of too many launches is not.
        `replays` counts the windows that were replayed.
        """
        self._say, self._bounded = say, bounded
        self._objective = objective
        twins = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in objective.parameters()}
        self._twin = copy.deepcopy(objective, dict(twins))
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._pool: Any = None
        self._given_up = False
        self.replays = 0

    def __call__(
        self,
        input_ids_KB: torch.Tensor,
        targets_KB: torch.Tensor,
        reset_KB: torch.Tensor,
        state_BSE: torch.Tensor,
        weights_KB: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As `WindowObjective.forward`; None when it must be called itself, because the window can't be captured."""
        if self._given_up:
            return None
        self.follow_the_weights()
        given = [input_ids_KB, targets_KB, reset_KB, state_BSE]
        given += [] if weights_KB is None else [weights_KB]
        shape = tuple((tuple(tensor.shape), tensor.dtype) for tensor in given)
        if shape not in self._captured and not self._capture(shape, given):
            return None
        captured = self._captured[shape]
        self.replays += 1
        for place, tensor in zip(captured.inputs, given, strict=True):
            place.copy_(tensor, non_blocking=True)
        loss, new_state_BSE = _Replay.apply(captured, *_trained(self._objective))  # type: ignore[no-untyped-call]
        return loss, new_state_BSE

    def follow_the_weights(self) -> None:
        """The twin's tensors are where the real ones are. When those have moved, what was captured is void."""
        pairs = [*zip(self._objective.parameters(), self._twin.parameters(), strict=True)]
        pairs += zip(self._objective.buffers(), self._twin.buffers(), strict=True)  # type: ignore[arg-type]
        moved = [(real, twin) for real, twin in pairs if real.data_ptr() != twin.data_ptr() or real.dtype != twin.dtype]
        if moved:
            self.release()
            for real, twin in moved:
                twin.data = real.data

    def release(self) -> None:
        """Gives the graphs' memory back, however long this object lives: DeepSpeed's engine keeps what it wraps."""
        self._captured.clear()
        self._pool = None

    def _capture(self, shape: tuple[object, ...], given: list[torch.Tensor]) -> bool:
        if len(self._captured) == MOST_SHAPES:
            return self._give_up(f"these are windows of more than {MOST_SHAPES} shapes")
        blocks = len(given[0]) * self._twin.model.config.num_hidden_layers
        if self._bounded and blocks > MOST_BLOCKS:
            return self._give_up(
                f"one runs {blocks:,} blocks, more than {MOST_BLOCKS:,} (train.graph on: nevertheless)"
            )
        progress_made("capturing a window as CUDA graphs")
        try:
            self._captured[shape] = self._capture_window(
                [tensor.clone(memory_format=torch.contiguous_format) for tensor in given]
            )
        except RuntimeError as error:
            self._captured.clear()
            return self._give_up((str(error).strip().splitlines() or [type(error).__name__])[0])
        progress_made("a window was captured as CUDA graphs")
        return True

    def _give_up(self, reason: str) -> bool:
        self._say(f"windows are not captured as CUDA graphs, training goes on without: {reason}")
        self._given_up = True
        return False

    def _capture_window(self, inputs: list[torch.Tensor]) -> _Captured:
        device = inputs[0].device
        parameters = _trained(self._twin)
        loss_gradient = torch.ones((), device=device)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.enable_grad(), torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                loss, _ = self._twin(*inputs)
                torch.autograd.grad(loss, parameters, loss_gradient, allow_unused=True)
                # Its nodes would remember the stream of the warm-up: a capture refuses them.
                del loss
        torch.cuda.current_stream(device).wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # In the mode that leaves other threads alone: one of ours takes pinned memory for windows meanwhile.
        with torch.enable_grad(), torch.cuda.graph(forward, pool=self._pool, capture_error_mode="thread_local"):
            loss, state_BSE = self._twin(*inputs)
        with torch.cuda.graph(backward, pool=self._pool, capture_error_mode="thread_local"):
            gradients = torch.autograd.grad(loss, parameters, loss_gradient, allow_unused=True)
        return _Captured(inputs, forward, backward, loss.detach(), state_BSE, loss_gradient, [*gradients])


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def refusal(model: WindowModel, device: torch.device, stage: int) -> str | None:
    """Why windows of this model can't be captured, or None."""
    if device.type != "cuda":
        return f"on {device.type} there are none"
    if stage > 2:
        return f"at ZeRO stage {stage} weights are gathered inside a window"
    if not isinstance(model, RecurrentLM):
        return f"a {type(model).__name__} is a baseline, to be compared by its losses"
    if model.transformer.has_dropout:
        return "with dropout each window draws other numbers"
    return None
