"""Columns of a window that keep only what goes into them, and are computed again in the backward pass.

`torch.utils.checkpoint` without reentry records the whole graph of the first pass and leaves out its numbers: nodes and
places for what is left out, about 350 KB a column of 12 blocks, however few lanes there are. With a few lanes that is
most of the memory of a long window, and recording takes time. Here the first pass records nothing.

Axes: B lanes, S slots, E embedding, c columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .gradient_sums import Context, GradientSums

Run: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]


class _Total:
    """The sum of one parameter's gradients, and the leaves that stand for the parameter, each with it as gradient."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.stand_ins: list[torch.Tensor] = []

    def stand_in(self, number: int) -> torch.Tensor:
        while len(self.stand_ins) <= number:
            leaf = self.parameter.detach().requires_grad_()
            leaf.grad = self.stand_ins[0].grad if self.stand_ins else torch.zeros_like(leaf)
            self.stand_ins.append(leaf)
        return self.stand_ins[number]

    def take(self) -> torch.Tensor | None:
        """The sum; None when nothing was added."""
        stand_ins, self.stand_ins = self.stand_ins, []
        total = stand_ins[0].grad if stand_ins else None
        return None if total is None or total._version == 0 else total


class _HandIn(torch.autograd.Function):
    """Behind all uses of the parameters: its backward hands each its whole sum."""

    @staticmethod
    def forward(ctx: Context, totals: Sequence[_Total], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.totals = totals
        return parameters[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, *(total.take() for total in ctx.totals)


class InPlaceSums:
    """Each column's gradient of a weight is added to one sum as soon as it is there, in the weight's own type.

    Autograd makes a sum of each graph's uses of a weight, hands it on when the last one is through, and adds it to what
    other graphs gave: two or three copies of all gradients at a time, and an addition of them all for each graph. So
    every column has leaves of its own in the place of the matrices, and the gradients of these leaves are one tensor,
    to which torch's AccumulateGrad adds in place. Vectors are small, and have one leaf for all columns of a graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self._totals: dict[int, _Total] = {}
        self._places = [
            (module._parameters, name, self._totals.setdefault(id(parameter), _Total(parameter)))
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        self._matrices = [place for place in self._places if place[2].parameter.dim() > 1]

    def tickets(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        totals = [self._totals[id(parameter)] for parameter in parameters]
        return [_HandIn.apply(totals, *parameters)]

    @contextmanager
    def apart(self) -> Iterator[None]:
        self._put(self._places, 0)
        try:
            yield
        finally:
            for held, name, total in self._places:
                held[name] = total.parameter

    @contextmanager
    def column(self, number: int) -> Iterator[None]:
        self._put(self._matrices, number)
        yield
        self._put(self._matrices, 0)

    def _put(self, places: Sequence[tuple[dict[str, nn.Parameter | None], str, _Total]], number: int) -> None:
        for held, name, total in places:
            held[name] = cast(nn.Parameter, total.stand_in(number))

    def multiply(self) -> None:
        pass


class _Recomputed(torch.autograd.Function):
    """`run(*tensors)`. Its inputs are the tickets of `sums`, and then the tensors.

    Weights are inputs of this one operation, so that they get their gradient once, when all pieces of a window are
    through. Were they reached from inside it, as in torch's reentrant checkpoints, their hooks would run for each
    piece: DeepSpeed exchanges gradients there.
    """

    @staticmethod
    def forward(
        ctx: Context, run: Run, sums: GradientSums, tickets: int, keep: bool, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.run, ctx.sums, ctx.tickets, ctx.kept = run, sums, tickets, None
        inputs = tensors[tickets:]
        if not keep:
            ctx.save_for_backward(*inputs)
            with torch.inference_mode():
                outputs = run(*inputs)
            return tuple(output.clone() for output in outputs)
        ctx.kept = _recorded(run, sums, inputs, ctx.needs_input_grad[4 + tickets :])
        return tuple(output.detach() for output in ctx.kept[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[4 + ctx.tickets :]
        inputs, outputs = ctx.kept or _recorded(ctx.run, ctx.sums, ctx.saved_tensors, wanted)
        ctx.kept = None
        pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if g is not None and x.requires_grad]
        ends, given = [x for x, _ in pairs], [g for _, g in pairs]
        del outputs, pairs
        torch.autograd.backward(ends, given)
        ctx.sums.multiply()  # or rows of many pieces would wait for their product
        return (*(None,) * (4 + ctx.tickets), *(x.grad for x in inputs))


def _recorded(
    run: Run, sums: GradientSums, tensors: Sequence[torch.Tensor], wanted: Sequence[bool]
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """`run` on copies without a past, with a graph of its own: its inputs and outputs."""
    inputs = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip(tensors, wanted, strict=True)]
    with torch.enable_grad(), sums.apart():
        return inputs, run(*inputs)


def recomputed(
    run: Run, sums: GradientSums, tickets: Sequence[torch.Tensor], *tensors: torch.Tensor, keep: bool = False
) -> tuple[torch.Tensor, ...]:
    """`run(*tensors)`, computed again in the backward pass: gradients as if it were called.

    `run` must give the same results each time, and use none but the weights whose `tickets` these are, in operations
    that `sums` sees. What it returns should be no views of larger tensors, which would stay. `keep`: what the backward
    pass needs is kept after all, and not computed again, as it pays for the last piece of a window.
    """
    outputs: tuple[torch.Tensor, ...] = _Recomputed.apply(run, sums, len(tickets), keep, *tickets, *tensors)
    return outputs
