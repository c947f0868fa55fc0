"""The ranks of a job: who we are, and the small exchanges that every rank takes part in."""

from __future__ import annotations

import hashlib
import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One rank's place. `control` is a CPU group: its small messages never queue behind the device's collectives."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host: str = field(default_factory=socket.gethostname)
    control: dist.ProcessGroup | None = None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the ranks, in place, on the device's group."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, value: T) -> list[T]:
        """Every rank's small Python value, in rank order, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return cast("list[T]", values)

    def ranks_here(self) -> int:
        """How many ranks share this rank's host, and its memory. All ranks must ask."""
        return self.all_gather(self.host).count(self.host)

    def broadcast(self, value: T) -> T:
        """Rank 0's small Python `value` on all ranks."""
        if self.size == 1:
            return value
        values: list[T | None] = [value if self.rank == 0 else None]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return cast("T", values[0])

    def broadcast_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's `tensor` on all ranks, on their devices; elsewhere `tensor` says its shape and type."""
        tensor = tensor.to(self.device)
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def on_rank0(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(...)` run on rank 0 alone; its result on all ranks, or the OSError or ValueError that it raised.

        Another exception is a fault of ours: rank 0 raises it, and the others lose contact when it ends.
        """
        outcome: _Outcome[T] = _run(function, *args, **kwargs) if self.rank == 0 else _Outcome()
        outcome = self.broadcast(outcome)
        if outcome.error is not None:
            raise _shared(outcome.error)
        return cast("T", outcome.result)

    def on_all_ranks(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(...)` run on every rank, no collectives inside; when one raises OSError or ValueError, all do.

        What they raise has the class of the first rank's error that raised: an I/O error must stay one, because a
        cluster retries a job that ended with it, and not one that ended with a user's mistake. A mistake that all ranks
        share is said as it is; one that only some ranks see, with who sees it.
        """
        outcome = _run(function, *args, **kwargs)
        for rank, error in enumerate(self.all_gather(outcome.error)):
            if error is not None:
                raise _shared(error if rank == 0 else _said_by(rank, error))
        return cast("T", outcome.result)

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


class AnyRank:
    """Whether any rank has said yes, known one question later: the answer travels while the device computes.

    Every rank asks as often as the others. On its device's group: NCCL adds up in a tree, and gloo's ring on the CPU,
    2 (N - 1) hops, would hold up a thousand ranks at every question.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._answer: torch.Tensor | None = None
        self._arrived: Callable[[], object] = lambda: None

    def ask(self, here: bool) -> bool:
        """Whether any rank said yes at the question before; one rank alone knows at once. Sends what is said `here`."""
        if self._world.size == 1:
            return here
        self._arrived()
        before = self._answer is not None and bool(self._answer)
        said = torch.zeros((), device=self._world.device)
        if here:
            said.fill_(1.0)
        work = dist.all_reduce(said, async_op=True)
        if said.device.type == "cpu":
            self._answer, self._arrived = said, work.wait
            return before
        work.wait()  # the stream waits, not this thread
        self._answer = torch.zeros((), pin_memory=True).copy_(said, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._arrived = event.synchronize
        return before


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What a function gave on one rank: a result or an error."""

    result: T | None = None
    error: Exception | None = None


def _run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> _Outcome[T]:
    try:
        return _Outcome(function(*args, **kwargs))
    except (OSError, ValueError) as error:
        return _Outcome(error=_portable(error))


def _portable(error: Exception) -> Exception:
    """`error` itself when another process can rebuild it, or a plain OSError or ValueError that says the same.

    Some classes can't be rebuilt from what pickle keeps of them (pydantic's ValidationError, for one).
    """
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # whatever such a class does on its way
        return OSError(str(error)) if isinstance(error, OSError) else ValueError(str(error))


def _said_by(rank: int, error: Exception) -> Exception:
    """An error of the same class whose text names the rank. An OSError keeps its number and its file."""
    kind = type(error)
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, f"rank {rank}: {error.strerror}", error.filename)
    try:
        return kind(f"rank {rank}: {error}")
    except TypeError:  # a class with a constructor of its own, such as UnicodeDecodeError
        return ValueError(f"rank {rank}: {error}")


def is_shared(error: BaseException) -> bool:
    """Whether every rank raises this error, so that rank 0 speaks for all."""
    return getattr(error, "shared", False)


def _shared(error: Exception) -> Exception:
    """Marks `error` as one that every rank raises."""
    error.shared = True  # type: ignore[attr-defined]
    return error


def derive_seed(seed: int, *names: str | int) -> int:
    """An independent 63-bit seed for the random stream called `names` under `seed`."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous CPU tensor as bytes: gloo sends only some dtypes."""
    return tensor.contiguous().view(-1).view(torch.uint8)
