"""Weight gradients through time, summed in float32 whatever the type of the weights.

A window uses each weight once a column. Autograd adds the K gradients up in the weight's own type: in bfloat16, with 8
bits, a sum of hundreds stops growing (relative error of the whole gradient 0.02 at K=128, 0.3 at K=1,024). Here the
gradients of a weight are kept back, added in float32, and handed to autograd once, when the last column is through.

Axes: R rows (lanes x slots) of some columns, I inputs, O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from .aligned import missing_outputs, with_columns, with_rows

# Rows whose inputs and output gradients are kept before they are multiplied: one product instead of one a column.
CHUNK_ROWS = 4096


Entered: TypeAlias = AbstractContextManager[object]
Context: TypeAlias = Any  # torch's, which takes what a forward leaves there for its backward


class GradientSums(Protocol):
    """Where the gradients of a window's weights are added up: `Fp32GradientSums`, or `InPlaceSums`."""

    def tickets(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Edges of the graph: the parameters' sums are handed in when all that have the edges are through."""

    def apart(self) -> Entered:
        """Inside, uses of the weights belong to a graph of their own, whose backward pass adds to the sums."""

    def column(self, number: int) -> Entered:
        """Around the column of this number, inside `apart`."""

    def multiply(self) -> None:
        """After the backward pass of such a graph."""


class _Sum:
    """The gradient of one parameter over one window: a float32 sum, and rows that are not multiplied yet."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.shape = parameter, parameter.shape
        self.total: torch.Tensor | None = None
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.waiting = 0

    def add(self, gradient: torch.Tensor) -> None:
        self.total = _wide(gradient) if self.total is None else self.total.add_(gradient)

    def add_product(self, left_RI: torch.Tensor, right_RO: torch.Tensor) -> None:
        """Adds left^T right, (I, O), at once or with the next columns'."""
        self.rows.append((left_RI, right_RO))
        self.waiting += len(left_RI)
        if self.waiting >= CHUNK_ROWS:
            self.multiply()

    def take(self) -> torch.Tensor | None:
        """The sum in the parameter's type; None when nothing has arrived. Starts anew."""
        self.multiply()
        total, self.total = self.total, None
        return None if total is None else total.to(self.parameter.dtype)

    def multiply(self) -> None:
        """Adds the product of the rows that wait."""
        if not self.rows:
            return
        lefts, rights = zip(*self.rows, strict=True)
        left_RI, right_RO = (x[0] if len(x) == 1 else torch.cat(x) for x in (lefts, rights))
        self.rows, self.waiting = [], 0
        # Outputs that were added for the product have no gradient to keep.
        self.add(_product(left_RI.t(), right_RO)[: self.shape[0]])


def _wide_type(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that sums are made in: float32, or float64 as it was."""
    return tensor.to(_wide_type(tensor), copy=True)


def _row_sum(rows_RO: torch.Tensor) -> torch.Tensor:
    """The sum of the rows (O,), in the type that sums are made in."""
    return rows_RO.sum(0, dtype=_wide_type(rows_RO))


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A matrix product, in float32 where the device gives it without converting the factors first."""
    if left.device.type == "cuda" and left.dtype in (torch.bfloat16, torch.float16) and _WIDE_PRODUCTS:
        return torch.mm(left, right, out_dtype=torch.float32)
    # The rows are summed in float32 inside the product; its result is rounded once a chunk, which does not add up.
    return left @ right


# torch 2.8 gave mm its `out_dtype`, for CUDA's libraries only.
_WIDE_PRODUCTS = torch.version.cuda is not None and "dtype" in torch.ops.aten.mm.overloads()


class _HandIn(torch.autograd.Function):
    """Behind all uses of a parameter: its backward hands the whole sum to the parameter."""

    @staticmethod
    def forward(ctx: Context, parameter: torch.Tensor, total: _Sum) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.total = total
        return parameter.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, _: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        return ctx.total.take(), None


class _Affine(torch.autograd.Function):
    """x W + b (or x W^T + b, `turned`), whose backward gives x its gradient and keeps back those of W and b."""

    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        weight_ticket: torch.Tensor,
        bias_ticket: torch.Tensor | None,
        weight: _Sum,
        bias: _Sum | None,
        turned: bool,
    ) -> torch.Tensor:
        # The parameter is looked up again in backward and not saved: at ZeRO-3 its data is released in between.
        ctx.weight, ctx.bias, ctx.turned = weight, bias, turned
        ctx.missing = missing_outputs(weight.parameter) if turned and bias is None else 0
        ctx.save_for_backward(x)
        if ctx.missing:
            return F.linear(x, with_rows(weight.parameter, ctx.missing))[..., : -ctx.missing]
        matrix = weight.parameter if turned else weight.parameter.t()
        return F.linear(x, matrix, None if bias is None else bias.parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gradient = with_columns(gradient, ctx.missing)
        x_RI, gradient_RO = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        if ctx.turned:  # W is (O, I)
            ctx.weight.add_product(gradient_RO, x_RI)
        else:
            ctx.weight.add_product(x_RI, gradient_RO)
        if ctx.bias is not None:
            ctx.bias.add(_row_sum(gradient_RO))
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        matrix = with_rows(ctx.weight.parameter, ctx.missing) if ctx.turned else ctx.weight.parameter.t()
        return (gradient @ matrix, *(None,) * 5)


class _Embedding(torch.autograd.Function):
    """Rows of a table; their gradients are added in float32, also where a token comes again and again."""

    @staticmethod
    def forward(ctx: Context, ids: torch.Tensor, ticket: torch.Tensor, table: _Sum) -> torch.Tensor:
        ctx.table = table
        ctx.save_for_backward(ids)
        return F.embedding(ids, table.parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: torch.Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        rows = _wide(gradient.reshape(-1, gradient.shape[-1]))
        # A run must repeat bit by bit, so rows are added in a fixed order. On CUDA `index_put_` alone does that: it
        # sorts first. `index_add_` does not, nor does `embedding_dense_backward` for a table of a few dozen rows. On
        # CPUs all do, and `embedding_dense_backward` is four times as fast in wide windows.
        if rows.is_cuda:
            total = rows.new_zeros(ctx.table.shape).index_put_((ids.reshape(-1),), rows, accumulate=True)
        else:
            total = torch.ops.aten.embedding_dense_backward(rows, ids.reshape(-1), ctx.table.shape[0], -1, False)
        ctx.table.add(total)
        return None, None, None


class _Use(torch.autograd.Function):
    """A parameter as it is, for one use in an operation of any kind; the gradient of the use is kept back."""

    @staticmethod
    def forward(ctx: Context, ticket: torch.Tensor, total: _Sum) -> torch.Tensor:
        ctx.total = total
        return total.parameter.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: torch.Tensor) -> tuple[None, None]:
        ctx.total.add(gradient)
        return None, None


class _UseAll(torch.autograd.Function):
    """As `_Use`, for many parameters at once."""

    @staticmethod
    def forward(ctx: Context, totals: list[_Sum], *tickets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.totals = totals
        return tuple(total.parameter.detach() for total in totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *gradients: torch.Tensor | None) -> tuple[None, ...]:
        for total, gradient in zip(ctx.totals, gradients, strict=True):
            if gradient is not None:
                total.add(gradient)
        return (None,) * (1 + len(gradients))


class Fp32GradientSums(TorchFunctionMode):
    """Inside `with`, the gradients of every parameter's uses in the operations below are summed in float32.

    One object for each forward pass; enter it again around what is recomputed. Works at the level of torch's functions,
    so that modules, their hooks (DeepSpeed's gather parameters at ZeRO-3) and any backbone stay as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[int, _Sum] = {}
        # Edges of the graph without a value: autograd runs what is behind one when all uses have handed theirs in. Not
        # in the sums themselves, to which their nodes point: such a ring would outlive the window.
        self._tickets: dict[int, torch.Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func not in _OPERATIONS or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs and _is_weight(args[0]) and _is_weight(args[2]):
            return self._affine(args[1], args[2], args[0], turned=False)
        if func is F.linear and not kwargs and _is_weight(args[1]):
            bias = args[2] if len(args) > 2 else None
            if bias is None or _is_weight(bias):
                return self._affine(args[0], args[1], bias, turned=True)
        # nn.Embedding passes: ids, table, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse.
        if func is F.embedding and _is_weight(args[1]) and args[2:4] == (None, None) and not any(args[5:]):
            table = self._sum(args[1])
            return _Embedding.apply(args[0], self._tickets[id(args[1])], table)
        return func(*map(self._use, args), **{name: self._use(value) for name, value in kwargs.items()})

    def tickets(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Of each parameter what stands for its uses: the sum is handed in when their backward passes are through."""
        for parameter in parameters:
            self._sum(parameter)
        return [self._tickets[id(parameter)] for parameter in parameters]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """As `with` this object, but uses belong to another graph, whose backward pass hands in no sum."""
        tickets = self._tickets
        self._tickets = {number: torch.empty((), requires_grad=True) for number in self._sums}
        try:
            with self:
                yield
        finally:
            self._tickets = tickets

    def column(self, number: int) -> Entered:
        """Nothing that a column of its own would need."""
        return nullcontext()

    def multiply(self) -> None:
        """Adds up the rows that wait for a product with more of them: they take memory."""
        for total in self._sums.values():
            total.multiply()

    def uses(self, parameters: Sequence[nn.Parameter]) -> tuple[torch.Tensor, ...]:
        """One use of each parameter, in operations that this object does not see."""
        totals = [self._sum(parameter) for parameter in parameters]
        tickets = [self._tickets[id(parameter)] for parameter in parameters]
        uses: tuple[torch.Tensor, ...] = _UseAll.apply(totals, *tickets)
        return uses

    def _affine(self, x: torch.Tensor, weight: nn.Parameter, bias: nn.Parameter | None, turned: bool) -> torch.Tensor:
        matrix, vector = self._sum(weight), None if bias is None else self._sum(bias)
        ticket = None if vector is None else self._tickets[id(bias)]
        result: torch.Tensor = _Affine.apply(x, self._tickets[id(weight)], ticket, matrix, vector, turned)
        return result

    def _use(self, value: object) -> object:
        if not _is_weight(value):
            return value
        total = self._sum(value)
        return _Use.apply(self._tickets[id(value)], total)

    def _sum(self, parameter: nn.Parameter) -> _Sum:
        if id(parameter) not in self._sums:
            total = self._sums[id(parameter)] = _Sum(parameter)
            self._tickets[id(parameter)] = _HandIn.apply(parameter, total)
        return self._sums[id(parameter)]


def recomputed_in(
    sums: GradientSums | None,
) -> Callable[[], tuple[Entered, Entered]]:
    """For `checkpoint(context_fn=...)`: what is recomputed meets the same operations as the first time."""
    entered = sums if isinstance(sums, Fp32GradientSums) else nullcontext()
    return lambda: (nullcontext(), entered)


_OPERATIONS = {
    *(torch.addmm, F.linear, F.embedding, F.layer_norm, F.rms_norm),
    *(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.add, torch.Tensor.add),
    *(torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.float, torch.Tensor.to, torch.Tensor.clone),
}


def _is_weight(value: object) -> TypeGuard[nn.Parameter]:
    return isinstance(value, nn.Parameter) and value.requires_grad
