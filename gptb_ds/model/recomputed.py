"""Some columns of a window that keep only what goes into them, and are computed again in the backward pass.

`torch.utils.checkpoint` without reentry records the whole graph of the first pass and leaves out its numbers: nodes and
places for what is left out, about 350 KB a column of 12 blocks, however few lanes there are. With a few lanes that is
most of the memory of a long window, and recording takes time. Here the first pass records nothing.

Axes: B lanes, S slots, E embedding, c columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeAlias

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .gradient_sums import Context, Fp32GradientSums

Run: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]


class _Recomputed(torch.autograd.Function):
    """`run(*tensors)`. Its inputs are the weights' tickets of `sums`, or the weights themselves, and then the tensors.

    Weights are inputs of this one operation, so that they get their gradient once, when all pieces of a window are
    through. Were they reached from inside it, as in torch's reentrant checkpoints, their hooks would run for each
    piece: DeepSpeed exchanges gradients there.
    """

    @staticmethod
    def forward(
        ctx: Context, run: Run, sums: Fp32GradientSums | None, weights: Sequence[nn.Parameter], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.run, ctx.sums, ctx.weights = run, sums, weights
        ctx.save_for_backward(*tensors[len(weights) :])
        with torch._C.DisableTorchFunction():  # `sums` has nothing to do without gradients
            return run(*tensors[len(weights) :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        sums, weights = ctx.sums, ctx.weights
        wanted = ctx.needs_input_grad[3 + len(weights) :]
        inputs = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad(), nullcontext() if sums is None else sums.apart():
            outputs = ctx.run(*inputs)
        pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if g is not None and x.requires_grad]
        ends, given = [x for x, _ in pairs], [g for _, g in pairs]
        leaves = [x for x in inputs if x.requires_grad]
        if sums is None:
            found = torch.autograd.grad(ends, [*weights, *leaves], given, allow_unused=True)
            of_weights: list[torch.Tensor | None] = [*found[: len(weights)]]
            of_inputs = iter(found[len(weights) :])
        else:
            torch.autograd.backward(ends, given)
            sums.multiply()  # or rows of many pieces would wait for their product
            of_weights = [None] * len(weights)
            of_inputs = iter([x.grad for x in leaves])
        return None, None, None, *of_weights, *(next(of_inputs) if x.requires_grad else None for x in inputs)


def recomputed(
    run: Run, sums: Fp32GradientSums | None, weights: Sequence[nn.Parameter], *tensors: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """`run(*tensors)`, computed again in the backward pass: gradients as if it were called.

    `run` must give the same results each time, and use none but these weights; with `sums`, in which the caller is, in
    operations that it sees. What it returns should be no views of larger tensors, which would stay.
    """
    stand_ins = weights if sums is None else sums.tickets(weights)
    outputs: tuple[torch.Tensor, ...] = _Recomputed.apply(run, sums, weights, *stand_ins, *tensors)
    return outputs
