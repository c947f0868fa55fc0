"""The collectives of a process, counted where they are called in torch.distributed: calls, bytes, and their time.

DeepSpeed, torch's optimizers and we all call them there. A group's own methods, which torch uses inside, are not seen.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist

from gptb_ds.distributed.world import World
from gptb_ds.phases import phase

COMMUNICATION, WAITS = "communication", "waits for other ranks"
_TENSORS = ("all_reduce", "broadcast", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather")
_OTHERS = ("all_to_all_single", "send", "recv", "broadcast_object_list", "all_gather_object", "barrier")
_POINT_TO_POINT = ("send", "recv")


@dataclass
class Tally:
    """Calls of one collective, and the bytes of the tensors that this process gave to it or got from it."""

    calls: int = 0
    bytes: int = 0


class CollectiveMeter:
    """Counts the collectives from `install` on; with `timed` each is also a phase, and it waits for each to end.

    Time until the last rank has come is not a message's: with `timed` all ranks meet before each collective, and that
    time is a phase of its own. Training is slower then, its numbers are the same. Every rank must install one.
    """

    def __init__(self, world: World, *, timed: bool = False) -> None:
        self.tallies: dict[str, Tally] = {}
        self._world, self.timed = world, timed
        self._inside = threading.local()
        self._barrier = dist.barrier
        self._replaced: dict[str, Callable[..., object]] = {}

    def install(self) -> CollectiveMeter:
        """Puts itself before torch.distributed's functions. DeepSpeed keeps some of them from when it is set up."""
        for name in (*_TENSORS, *_OTHERS):
            self._replaced[name] = getattr(dist, name)
            setattr(dist, name, self._metered(name, self._replaced[name]))
        return self

    def remove(self) -> None:
        for name, function in self._replaced.items():
            setattr(dist, name, function)

    def _metered(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(function)
        def call(*args: object, **options: object) -> object:
            if getattr(self._inside, "busy", False):  # one collective of torch's that is made of others
                return function(*args, **options)
            tally = self.tallies.setdefault(name, Tally())
            tally.calls += 1
            tally.bytes += _bytes_of(name, args, options)
            self._inside.busy = True
            try:
                return self._timed_call(name, function, args, options) if self.timed else function(*args, **options)
            finally:
                self._inside.busy = False

        return call

    def _timed_call(
        self, name: str, function: Callable[..., object], args: tuple[object, ...], options: dict[str, object]
    ) -> object:
        group = cast("dist.ProcessGroup | None", options.get("group"))
        with phase(WAITS):
            if name not in _POINT_TO_POINT and dist.get_world_size(group) == self._world.size > 1:
                self._barrier(group=self._world.control)
        with phase(WAITS if name == "barrier" else COMMUNICATION):
            work = function(*args, **options)
            if isinstance(work, dist.Work):  # with `async_op`
                work.wait()
        return work


def _bytes_of(name: str, args: tuple[object, ...], options: dict[str, object]) -> int:
    """Of the largest tensor: a gather's result, a scatter's source, what is reduced or sent."""
    if name not in (*_TENSORS, "all_to_all_single", "send", "recv"):
        return 0
    found = [value for value in (*args, *options.values()) if isinstance(value, torch.Tensor)]
    found += [tensor for value in args if isinstance(value, list) for tensor in value]
    return max((tensor.numel() * tensor.element_size() for tensor in found), default=0)
