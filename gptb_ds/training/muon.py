"""Muon for the matrices of the blocks, AdamW for everything else, in one optimizer that ZeRO may cut into pieces.

Axes: I inputs, O outputs of a matrix.

DeepSpeed 0.19.8 has a Muon of its own (`runtime/zero/muon`). It is not used here, for five reasons that were read in
its source:
- it takes every matrix whose name lacks `embed` and `lm_head`, and so GPT-2's `wte` and `wpe` (`set_optimizer_flags`);
- it takes a matrix's shape for (out, in), where GPT-2's Conv1D is (in, out) (`_aspect_ratio_scale`);
- it orthogonalises the fused q, k and v as one matrix;
- it clips the orthogonalised update: at width 128 the step becomes four times smaller (`stage_1_and_2.py:3036`);
- at stage 3 its momentum lies beside the optimizer's state, where a checkpoint by name does not find it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

MOMENTUM = "momentum_buffer"
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


@dataclass(frozen=True)
class Matrix:
    """A weight of the blocks: `parts` matrices side by side along dimension `dim`, that of its outputs.

    They are equally large, or have `sizes` outputs. With `groups` > 1 their outputs alternate: those of the first group
    (of one head, say) of each part come first, then those of the second group.
    """

    parts: int
    dim: int
    groups: int = 1
    sizes: tuple[int, ...] | None = None

    def split(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """The matrices, each whole."""
        # Along `dim`: (O) -> (groups, O / groups), of which each part takes its own from every group.
        grouped = torch.unflatten(weight, self.dim, (self.groups, -1))
        sizes = self.sizes or (grouped.shape[self.dim + 1] // self.parts,) * self.parts
        return [part.flatten(self.dim, self.dim + 1) for part in torch.split(grouped, list(sizes), self.dim + 1)]

    def join(self, matrices: list[torch.Tensor]) -> torch.Tensor:
        """The weight, from what `split` gave."""
        grouped = [torch.unflatten(matrix, self.dim, (self.groups, -1)) for matrix in matrices]
        return torch.cat(grouped, self.dim + 1).flatten(self.dim, self.dim + 1)


@dataclass(frozen=True)
class Piece:
    """Where this rank's share of a parameter lies in a tensor that the optimizer steps.

    Elements [start, start + size) of the flattened parameter are elements [offset, offset + size) of the flat tensor.
    `size` is 0 when all of it lies on other ranks. The list of a tensor's pieces names the same parameters, in the same
    order, on all ranks.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    offset: int
    size: int


def matrices_of(model: nn.Module) -> dict[str, Matrix]:
    """The weights that Muon takes, by parameter name: those of the blocks' linear layers.

    Not the embeddings, the head, norms, biases and the initial state: their rows are read one at a time, or they are no
    linear maps; Muon's authors leave them to AdamW (Jordan et al. 2024, kellerjordan.github.io/posts/muon). Maps that
    share their input, and so a weight, are told apart: q, k and v in GPT-2's `c_attn`, the gates of an LSTM.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # type: ignore[no-untyped-call]
    found: dict[str, Matrix] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            found |= {f"{name}.{own}": matrix for own, matrix in _recurrent(module).items()}
        elif isinstance(module, (Conv1D, nn.Linear)) and module is not head:
            dim = 1 if isinstance(module, Conv1D) else 0
            kind = name.rpartition(".")[2]
            if kind in _FUSED_ATTENTION:
                found[f"{name}.weight"] = _fused_attention(model, kind, module.weight.shape[dim], dim)
            else:
                found[f"{name}.weight"] = Matrix(2 if kind == "gate_up_proj" else 1, dim)
    return found


def _recurrent(module: nn.RNNBase) -> dict[str, Matrix]:
    """torch has the maps of a layer's gates one below the other, `weight_ih_l0` (gates * H, I); a projection is one."""
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    weights = (name for name, parameter in module.named_parameters() if parameter.ndim == 2)
    return {name: Matrix(1 if name.startswith("weight_hr") else gates, 0) for name in weights}


# Names of layers that hold q, k and v: GPT-2's; Phi 3's; GPT-NeoX', Bloom's and Falcon's.
_FUSED_ATTENTION = ("c_attn", "qkv_proj", "query_key_value")


def _fused_attention(model: Any, kind: str, outputs: int, dim: int) -> Matrix:
    config = getattr(model.config, "backbone_config", model.config)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if outputs == 3 * heads * width:
        # `query_key_value` has q, k and v of the first head, then of the second.
        return Matrix(3, dim, groups=heads if kind == "query_key_value" else 1)
    shared = (outputs - heads * width) // 2  # keys and values that several heads share
    return Matrix(3, dim, sizes=(heads * width, shared, shared))


def orthogonalised(matrix: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """About the nearest matrix with orthonormal rows or columns, by Newton-Schulz iterations in `dtype`.

    U S V^T becomes U S' V^T with S' between 0.7 and 1.2, whatever the scale of the matrix. Five iterations of Muon's
    quintic (Jordan et al. 2024), as in `torch.optim.Muon`, which computes them in bfloat16 only: in float32 runs on
    other numbers of ranks stay equal to float tolerance.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = (wide / wide.norm().clamp(min=1e-7)).to(dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide is matrix else x.mT).to(matrix.dtype)


def muon_direction(momentum: torch.Tensor, matrix: Matrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Muon's step for a weight at learning rate 1, without its sign: each logical matrix orthogonalised and scaled.

    The scale 0.2 * sqrt(max(I, O)) gives the step the root mean square of AdamW's steps, so that AdamW's learning rate
    and weight decay carry over (Moonlight, 2502.16982). It is the same for a matrix and its transpose.
    """
    return matrix.join(
        [orthogonalised(part, dtype) * (0.2 * max(part.shape) ** 0.5) for part in matrix.split(momentum)]
    )


class MuonWithAdamW(torch.optim.AdamW):
    """Muon for parameter groups with `muon` on, AdamW for the others.

    ZeRO hands an optimizer flat pieces of its parameters (stages 1 to 3), but a matrix is orthogonalised whole. The
    momentum is kept in the pieces, as Adam's moments are. In each step the ranks exchange: with W ranks, W matrices at
    a time, each rank is sent the pieces of one of them, orthogonalises it, and sends the pieces back. No rank ever
    holds more than one whole matrix, and none is orthogonalised twice. At stage 0 every rank has all and does all.

    The gradients that arrive here were averaged, unscaled and clipped by DeepSpeed. A clipped gradient weighs less in
    the momentum; the length of the step is that of an orthogonal matrix all the same.
    """

    def __init__(
        self,
        groups: list[dict[str, object]],
        *,
        matrices: dict[str, Matrix],
        momentum: float,
        device: torch.device,
        **options: Any,
    ) -> None:
        """`options` are AdamW's. `layout` must be set before the first step (see `Fp32State`).

        `device` is where matrices are orthogonalised and exchanged, wherever the pieces lie.
        """
        super().__init__(groups, **options)
        self.layout: Callable[[torch.Tensor], Sequence[Piece]] | None = None
        self.matrices, self._momentum, self._device = matrices, momentum, device
        self._known_spans: dict[tuple[str, ...], list[list[tuple[int, int]]]] = {}
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both. Every rank must call it, with the same groups."""
        assert closure is None
        if self.layout is None:
            return None  # one of DeepSpeed's wrappers (stage 0, bf16 and fp16) steps while it is built
        groups = self.param_groups
        # AdamW steps whatever is in `param_groups`. DeepSpeed narrows the list in the same way, to one group at a time.
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for tensor in group["params"]:
                    self._step_muon(tensor, group["lr"], group["weight_decay"])
        return None

    @torch.no_grad()
    def _step_muon(self, tensor: torch.Tensor, rate: float, weight_decay: float) -> None:
        if tensor.grad is None:
            return
        state = self.state[tensor]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(tensor)
        gradient = tensor.grad.to(tensor.dtype)
        state[MOMENTUM].lerp_(gradient, 1 - self._momentum)
        # Nesterov's momentum: the gradient once more on top.
        direction = gradient.lerp(state[MOMENTUM], self._momentum)
        assert self.layout is not None, "set after DeepSpeed has cut the parameters"
        pieces = self.layout(tensor)
        flat = direction.reshape(-1)
        if tensor.ndim > 1:
            (piece,) = pieces
            flat = muon_direction(direction, self.matrices[piece.name], self._dtype).reshape(-1)
        else:
            self._exchange(flat, pieces)
        tensor.mul_(1 - rate * weight_decay)
        tensor.add_(flat.reshape(tensor.shape), alpha=-rate)

    def _exchange(self, flat: torch.Tensor, pieces: Sequence[Piece]) -> None:
        """Replaces the momentum in `flat` by Muon's direction, with W matrices in flight at a time."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        for first in range(0, len(pieces), world):
            self._exchange_round(flat, pieces[first : first + world], world)

    def _exchange_round(self, flat: torch.Tensor, pieces: Sequence[Piece], world: int) -> None:
        rank = dist.get_rank() if world > 1 else 0
        spans = self._spans(pieces, world)
        mine = [flat[piece.offset : piece.offset + piece.size].to(self._device) for piece in pieces]
        sizes_out = [piece.size for piece in pieces] + [0] * (world - len(pieces))
        sizes_in = [size for _, size in spans[rank]] if rank < len(pieces) else [0] * world
        received = flat.new_empty(sum(sizes_in), device=self._device)
        _all_to_all(received, torch.cat(mine), sizes_in, sizes_out)
        if rank < len(pieces):
            received = self._solve(received, pieces[rank], spans[rank])
        returned = flat.new_empty(sum(sizes_out), device=self._device)
        _all_to_all(returned, received, sizes_out, sizes_in)
        for piece, part in zip(pieces, torch.split(returned, sizes_out), strict=False):
            flat[piece.offset : piece.offset + piece.size] = part.to(flat.device)

    def _solve(self, received: torch.Tensor, piece: Piece, spans: list[tuple[int, int]]) -> torch.Tensor:
        """The direction of one whole matrix, from all ranks' pieces to all ranks' pieces."""
        whole = received.new_empty(torch.Size(piece.shape).numel())
        for (start, size), part in zip(spans, torch.split(received, [size for _, size in spans]), strict=True):
            whole[start : start + size] = part
        found = muon_direction(whole.view(piece.shape), self.matrices[piece.name], self._dtype).reshape(-1)
        return torch.cat([found[start : start + size] for start, size in spans])

    def _spans(self, pieces: Sequence[Piece], world: int) -> list[list[tuple[int, int]]]:
        """By parameter, the (start, size) of every rank's piece; asked for once, it does not change."""
        key = tuple(piece.name for piece in pieces)
        if key not in self._known_spans:
            own = [(piece.start, piece.size) for piece in pieces]
            everyone = [own] * world
            if world > 1:
                dist.all_gather_object(everyone, own)
            self._known_spans[key] = [list(spans) for spans in zip(*everyone, strict=True)]
        return self._known_spans[key]


def _all_to_all(received: torch.Tensor, sent: torch.Tensor, sizes_in: list[int], sizes_out: list[int]) -> None:
    if len(sizes_in) == 1:
        received.copy_(sent)
    else:
        dist.all_to_all_single(received, sent, sizes_in, sizes_out)
