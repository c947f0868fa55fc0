"""One step of the recurrence, compiled once and called for every column.

`torch.compile` makes another version for every kind of argument that it meets. All columns of a window are of one kind
but the first, whose state comes from outside; `enter` makes it alike.

Axes: B lanes, S slots, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from .gradient_sums import Fp32GradientSums, GradientSums

Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]
# A name, or what makes a callable of a graph and its example inputs.
Backend = str | Callable[..., Callable[..., object]]


class CompiledStep:
    """A step as `torch.compile` makes it, and what it needs around it."""

    def __init__(self, step: Step, backend: Backend = "inductor") -> None:
        """`backend` is one of `torch.compile`'s. A new number of lanes is compiled anew, for its own shapes."""
        self._step: Step = torch.compile(step, dynamic=False, backend=backend)

    def enter(self, state_BSE: torch.Tensor, carries_view: bool) -> torch.Tensor:
        """The state that a window begins with, as a step hands it on: of the same strides, and with a gradient.

        `carries_view`: a step's new state is the first S-1 of the blocks' S outputs, where they lie.
        """
        if carries_view:
            room_B1E = state_BSE.new_zeros(len(state_BSE), 1, state_BSE.shape[2])
            state_BSE = torch.cat((state_BSE, room_B1E), dim=1)[:, :-1]
        else:
            state_BSE = state_BSE.contiguous()
        return state_BSE if state_BSE.requires_grad else state_BSE.detach().requires_grad_()

    def __call__(self, model: nn.Module, sums: GradientSums | None, *args: object) -> tuple[torch.Tensor, ...]:
        """`step(model, *args)`. With `sums` the gradients of this step's use of the weights are added there."""
        # Without torch's function modes, such as `sums`: its bookkeeping in backward can't be compiled.
        with torch._C.DisableTorchFunction():
            if not isinstance(sums, Fp32GradientSums):
                return self._step(model, *args)
            with _standing_in(model, sums):
                return self._step(model, *args)


@contextmanager
def _standing_in(model: nn.Module, sums: Fp32GradientSums) -> Iterator[None]:
    """The model's modules hold this step's uses of the parameters in the place of the parameters.

    The compiled backward pass gives each use its gradient, in the weights' type, and `sums` adds it up in float32.
    """
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    uses = sums.uses([parameter for _, _, parameter in places])
    try:
        for (held, name, _), use in zip(places, uses, strict=True):
            held[name] = cast(nn.Parameter, use)
        yield
    finally:
        for held, name, parameter in places:
            held[name] = parameter
