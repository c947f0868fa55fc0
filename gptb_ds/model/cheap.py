"""Norms and activation functions are computed again in the backward pass, rather than kept for it.

What a block keeps for its backward pass is for a good part the output of operations that cost next to nothing: both
norms, and the activation function, which is four times as wide. What they are made of is kept anyway, for their own
backward passes. Products and attention are not computed again.

Axes: E embedding, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

_CHEAP = {F.layer_norm, F.rms_norm, F.gelu, F.silu, F.relu}


@dataclass(frozen=True)
class Recipe:
    """How a tensor came to be: the same function of the same numbers gives the same bits."""

    function: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    options: dict[str, Any]
    storage: StorageWeakRef
    values: int
    version: int

    def __call__(self, shape: torch.Size) -> torch.Tensor:
        """The tensor, made again."""
        with torch.no_grad(), torch._C.DisableTorchFunction():
            return self.function(*self.args, **self.options).view(shape)


class Recipes(TorchFunctionMode):
    """Inside `with`, remembers how the outputs of cheap operations came to be."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, Recipe] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func in _CHEAP and made.requires_grad and made.is_contiguous():
            # A weak reference keeps the place from being taken by another storage, but not the numbers.
            storage = StorageWeakRef(made.untyped_storage())
            options = {name: _detached(value) for name, value in kwargs.items()}
            recipe = Recipe(func, tuple(map(_detached, args)), options, storage, made.numel(), made._version)
            self._found[storage.cdata] = recipe
        return made

    def of(self, tensor: torch.Tensor) -> Recipe | None:
        """The recipe of this tensor, or of the one that it is a view of; None: keep it."""
        recipe = self._found.get(tensor.untyped_storage()._cdata)
        if recipe is None or recipe.values != tensor.numel() or recipe.version != tensor._version:
            return None
        return recipe if tensor.is_contiguous() else None


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, torch.Tensor) else value


@contextmanager
def cheap_recomputed() -> Iterator[None]:
    """Inside `with`, what is kept for the backward pass leaves out what is cheap to compute again.

    Gradients are the same to the last bit. Not within `torch.utils.checkpoint`, which keeps its own account of what is
    kept, and without effect on a compiled step, where Inductor makes this choice.
    """

    def kept(tensor: torch.Tensor) -> torch.Tensor | tuple[Recipe, torch.Size]:
        recipe = recipes.of(tensor)
        return tensor if recipe is None else (recipe, tensor.shape)

    def needed(held: torch.Tensor | tuple[Recipe, torch.Size]) -> torch.Tensor:
        return held if isinstance(held, torch.Tensor) else held[0](held[1])

    with Recipes() as recipes, torch.autograd.graph.saved_tensors_hooks(kept, needed):
        yield
