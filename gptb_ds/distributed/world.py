"""The ranks of a job: who we are, and the small exchanges that every rank takes part in."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """One rank's place. `control` is a CPU group: its small messages never queue behind the device's collectives."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host: str = field(default_factory=socket.gethostname)
    control: Any = None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the ranks, in place, on the device's group."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, *values: float) -> list[float]:
        """The largest of each value over the ranks: what one rank has noticed, all then know."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's small Python value, in rank order, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on all ranks. An exception there is raised on every rank."""
        if self.size == 1:
            values = [value]
        else:
            values = [value if self.rank == 0 else None]
            dist.broadcast_object_list(values, src=0, group=self.control)
        if isinstance(values[0], Exception):
            raise _shared(values[0])
        return values[0]

    def on_rank0(self, function: Any, *args: Any) -> Any:
        """`function(*args)` run on rank 0 alone; its result, or its exception, on all ranks."""
        result: Any = None
        if self.rank == 0:
            try:
                result = function(*args)
            except (OSError, ValueError) as error:
                result = error
        return self.broadcast(result)

    def on_all_ranks(self, function: Any, *args: Any) -> Any:
        """`function(*args)` run on every rank, no collectives inside; when one raises ValueError, all do."""
        result: Any = None
        problem = None
        try:
            result = function(*args)
        except (OSError, ValueError) as error:
            problem = str(error)
        problems = self.all_gather(problem)
        for rank, text in enumerate(problems):
            if text is not None:
                # A mistake that all share is said as it is; one that only some ranks see, with who sees it.
                raise _shared(ValueError(text if rank == 0 else f"rank {rank}: {text}"))
        return result

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def gather_to(self, tensors: dict[str, torch.Tensor], leader: int, members: range) -> dict[str, torch.Tensor]:
        """CPU `tensors` of the ranks in `members` (equal shapes), stacked in rank order on `leader`; {} elsewhere.

        A few leaders then write for many ranks, instead of a file each.
        """
        if len(members) == 1:
            return {name: tensor[None] for name, tensor in tensors.items()}
        if self.rank != leader:
            for tensor in tensors.values():
                dist.send(_bytes(tensor), leader, group=self.control)
            return {}
        stacked = {}
        for name, tensor in tensors.items():
            whole = torch.empty((len(members), *tensor.shape), dtype=tensor.dtype)
            for index, member in enumerate(members):
                if member == self.rank:
                    whole[index].copy_(tensor)
                else:
                    dist.recv(_bytes(whole[index]), member, group=self.control)
            stacked[name] = whole
        return stacked


def is_shared(error: BaseException) -> bool:
    """Whether every rank raises this error, so that rank 0 speaks for all."""
    return getattr(error, "shared", False)


def _shared(error: Exception) -> Exception:
    error.shared = True  # type: ignore[attr-defined]
    return error


def derive_seed(seed: int, *names: str | int) -> int:
    """An independent 63-bit seed for the random stream called `names` under `seed`."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous CPU tensor as bytes: gloo sends only some dtypes."""
    return tensor.contiguous().view(-1).view(torch.uint8)
