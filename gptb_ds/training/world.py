"""Owns the ranks: who we are, how we found out, and the small exchanges that every rank takes part in."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


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

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over the ranks: what one rank has noticed, all then know."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small Python value, in rank order, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value` on all ranks. An exception there is raised on every rank."""
        if self.size == 1:
            values = [value]
        else:
            values = [value if self.rank == 0 else None]
            dist.broadcast_object_list(values, src=0, group=self.control)
        if isinstance(values[0], Exception):
            raise _shared(values[0])
        return values[0]

    def on_first(self, function: Any, *args: Any) -> Any:
        """`function(*args)` run on rank 0 alone; its result, or its exception, on all ranks."""
        result: Any = None
        if self.rank == 0:
            try:
                result = function(*args)
            except (OSError, ValueError) as error:
                result = error
        return self.from_first(result)

    def together(self, function: Any, *args: Any) -> Any:
        """`function(*args)` run on every rank, no collectives inside; when one raises ValueError, all do."""
        result: Any = None
        problem = None
        try:
            result = function(*args)
        except (OSError, ValueError) as error:
            problem = str(error)
        problems = self.gather(problem)
        for rank, text in enumerate(problems):
            if text is not None:
                # A mistake that all share is said as it is; one that only some ranks see, with who sees it.
                raise _shared(ValueError(text if rank == 0 else f"rank {rank}: {text}"))
        return result

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def to_leader(self, tensors: dict[str, torch.Tensor], leader: int, members: range) -> dict[str, torch.Tensor]:
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


def find_rank(env: Mapping[str, str]) -> dict[str, str] | None:
    """The five variables of torch's rendezvous as `env` gives them, or None when this is a single process.

    In order: the variables themselves (deepspeed launcher, torchrun, launch/slurm.sbatch); a process started by
    `mpirun` (asked through mpi4py), in a Slurm allocation too; a Slurm step with a rendezvous address.
    Raises ValueError when only a part is set, when it contradicts MPI, or when MPI started us and mpi4py can't load it.
    """
    given = [name for name in _ENVIRONMENT if env.get(name)]
    mpi_size = max(int(env.get(name) or 1) for name in ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    if len(given) == len(_ENVIRONMENT):
        if mpi_size > 1 and mpi_size != int(env["WORLD_SIZE"]):
            raise ValueError(
                f"mpirun started {mpi_size} ranks, but the environment sets WORLD_SIZE={env['WORLD_SIZE']}: unset"
                f" {', '.join(_ENVIRONMENT)}"
            )
        return {name: env[name] for name in _ENVIRONMENT}
    if mpi_size > 1:
        return _ask_mpi(env)
    if int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_PROCID" in env:
        if not env.get("MASTER_ADDR") or not env.get("MASTER_PORT"):
            raise ValueError(
                "srun started several tasks, but MASTER_ADDR and MASTER_PORT are not set: see launch/slurm.sbatch"
            )
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
            "MASTER_ADDR": env["MASTER_ADDR"],
            "MASTER_PORT": env["MASTER_PORT"],
        }
    if int(env.get("PMI_SIZE") or 1) > 1:
        return _ask_mpi(env)
    if "RANK" in given or "WORLD_SIZE" in given:
        missing = ", ".join(name for name in _ENVIRONMENT if name not in given)
        raise ValueError(
            f"the environment sets {', '.join(given)} but not {missing}: set all five, or none for one process"
        )
    return None


def join(timeout_seconds: float) -> World:
    """Joins the job that this process was started in and returns its place; one process alone joins itself.

    Raises ValueError (see `find_rank`) or, when the others don't come in time, torch's distributed error.
    """
    place = find_rank(os.environ)
    _raise_file_limit()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    local_rank = int(place["LOCAL_RANK"]) if place else 0
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # Slurm and containers may show each task its own device alone; then that is number 0.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if place is None:
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        os.environ.update(place)
        dist.init_process_group(backend, init_method="env://", timeout=timeout)
    os.environ.update(place)
    control = dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None
    world = World(dist.get_rank(), dist.get_world_size(), local_rank, device, socket.gethostname(), control)
    if device.type == "cpu" and world.size > 1 and "OMP_NUM_THREADS" not in os.environ:
        _share_cores(world)
    return world


def _raise_file_limit() -> None:
    """gloo opens three sockets for each other rank: with the usual limit a few hundred ranks could not start."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _share_cores(world: World) -> None:
    """Without it every rank would start a thread on each core of its host."""
    ranks_here = world.gather(world.host).count(world.host)
    if len(os.sched_getaffinity(0)) == os.cpu_count():  # else somebody has shared them out already
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))


def leave() -> None:
    """Ends the process group, after a barrier: ranks that still talk would see it as a fault of the others."""
    dist.destroy_process_group()


def derive_seed(seed: int, *names: str | int) -> int:
    """An independent 63-bit seed for the random stream called `names` under `seed`."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _ask_mpi(env: Mapping[str, str]) -> dict[str, str]:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"mpirun started this process, but mpi4py cannot load MPI ({error}): install an MPI library"
        ) from None
    comm = MPI.COMM_WORLD
    rank = comm.Get_rank()
    address = port = None
    if rank == 0:
        address = env.get("MASTER_ADDR") or _own_address()
        port = env.get("MASTER_PORT") or str(_free_port())
    address, port = comm.bcast((address, port), root=0)
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(comm.Get_size()),
        "LOCAL_RANK": str(local.Get_rank()),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def _own_address() -> str:
    """An address of this host that other hosts can reach, or the loopback one when it has no other."""
    try:
        address = socket.gethostbyname(socket.getfqdn())
        if not address.startswith("127."):
            return address
        # Debian calls the host's own name 127.0.1.1: ask where a packet to elsewhere would start (none is sent).
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
    except OSError:
        return "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous CPU tensor as bytes: gloo sends only some dtypes."""
    return tensor.contiguous().view(-1).view(torch.uint8)
