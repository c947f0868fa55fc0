"""How a process finds its rank and joins the other ranks of its job, whatever launched it."""

from __future__ import annotations

import errno
import os
import resource
import socket
import sys
import threading
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from gptb_ds.distributed.world import World
from gptb_ds.exit_codes import FAULT, USAGE

# After so many seconds of waiting for the other ranks, somebody says so.
_QUIET_SECONDS = 10.0

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class JoinError(OSError):
    """A rank can't join its job, or the ranks don't find each other. The message, one line, says what to do.

    `code` is the exit code. Where all ranks of a host have the same trouble (`alone` false), one says it for all.
    """

    def __init__(self, text: str, code: int = FAULT, alone: bool = False) -> None:
        super().__init__(text)
        self.code, self.alone = code, alone


def find_rank(env: Mapping[str, str]) -> dict[str, str] | None:
    """The five variables of torch's rendezvous as `env` gives them, or None when this is a single process.

    In order: the variables themselves (deepspeed launcher, torchrun, launch/slurm.sbatch); a process started by
    `mpirun` (asked through mpi4py), in a Slurm allocation too; a Slurm step with a rendezvous address.
    Raises ValueError when only a part is set or is no number in its range, when it contradicts MPI, or when MPI started
    us and mpi4py can't load it.
    """
    given = [name for name in _ENVIRONMENT if env.get(name)]
    mpi_size = max(int(env.get(name) or 1) for name in ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    if len(given) == len(_ENVIRONMENT):
        if mpi_size > 1 and mpi_size != int(env["WORLD_SIZE"]):
            raise ValueError(
                f"mpirun started {mpi_size} ranks, but the environment sets WORLD_SIZE={env['WORLD_SIZE']}: unset"
                f" {', '.join(_ENVIRONMENT)}"
            )
        return _checked({name: env[name] for name in _ENVIRONMENT})
    if mpi_size > 1:
        return _ask_mpi(env)
    if int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_PROCID" in env:
        if not env.get("MASTER_ADDR") or not env.get("MASTER_PORT"):
            raise ValueError(
                "srun started several tasks, but MASTER_ADDR and MASTER_PORT are not set: see launch/slurm.sbatch"
            )
        return _checked(
            {
                "RANK": env["SLURM_PROCID"],
                "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
                "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
                "MASTER_ADDR": env["MASTER_ADDR"],
                "MASTER_PORT": env["MASTER_PORT"],
            }
        )
    if int(env.get("PMI_SIZE") or 1) > 1:
        return _ask_mpi(env)
    if "RANK" in given or "WORLD_SIZE" in given:
        missing = ", ".join(name for name in _ENVIRONMENT if name not in given)
        raise ValueError(
            f"the environment sets {', '.join(given)} but not {missing}: set all five, or none for one process"
        )
    return None


def _checked(place: dict[str, str]) -> dict[str, str]:
    """`place` itself. Raises ValueError for a number that is none, or out of its range."""
    size = int(place["WORLD_SIZE"]) if place["WORLD_SIZE"].isdecimal() else 0
    for name, low, high in (
        ("WORLD_SIZE", 1, 1 << 31),
        ("RANK", 0, size - 1),
        ("LOCAL_RANK", 0, size - 1),
        ("MASTER_PORT", 1, 65535),
    ):
        value = place[name]
        if not value.isdecimal() or not low <= int(value) <= high:
            raise ValueError(f"{name}={value} in the environment: must be a whole number from {low} to {high}")
    return place


def join(timeout_seconds: float) -> World:
    """Joins the job that this process was started in and returns its place; one process alone joins itself.

    Raises ValueError (see `find_rank`, and on all ranks when two have the same GPU), or JoinError when there is no GPU
    for this rank, when the address is unknown, its port taken, or when the others don't come in time.
    """
    place = find_rank(os.environ)
    os.environ.update(place or {})
    _raise_file_limit()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    local_rank = int(place["LOCAL_RANK"]) if place else 0
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = visible_index(local_rank, torch.cuda.device_count())
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if place is not None:
        # DeepSpeed reads it, too, and takes it for the number of a device.
        place["LOCAL_RANK"] = str(local_rank)
    if place is None:
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        _meet(place, backend, timeout)
    os.environ.update(place)
    control = dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None
    world = World(dist.get_rank(), dist.get_world_size(), local_rank, device, socket.gethostname(), control)
    if device.type == "cuda":
        _one_gpu_each(world)
    if device.type == "cpu" and world.size > 1 and "OMP_NUM_THREADS" not in os.environ:
        _share_cores(world)
    return world


def _meet(place: Mapping[str, str], backend: str, timeout: timedelta) -> None:
    """Makes the process group of all ranks. Raises JoinError.

    The name is looked up here first: torch retries an unknown one in silence until its time is over.
    """
    address, port = place["MASTER_ADDR"], place["MASTER_PORT"]
    try:
        socket.getaddrinfo(address, int(port))
    except OSError as error:  # "not known" is a mistake, anything else may be the name server's bad hour
        code = USAGE if error.errno == socket.EAI_NONAME else FAULT
        raise JoinError(f"MASTER_ADDR={address}: {error.strerror}; give the host or address of rank 0", code) from None
    patience = threading.Timer(_QUIET_SECONDS, _say_that_it_waits, (place, timeout))
    patience.daemon = True
    if place["LOCAL_RANK"] == "0":
        patience.start()
    try:
        dist.init_process_group(backend, init_method="env://", timeout=timeout)
    except dist.DistError as error:
        text = " ".join(str(error).split())
        if "EADDRINUSE" in text or os.strerror(errno.EADDRINUSE) in text:
            raise JoinError(
                f"MASTER_PORT={port}: another program listens there on {socket.gethostname()}; choose another port"
            ) from None
        raise JoinError(
            f"the {place['WORLD_SIZE']} ranks did not meet at {address}:{port} within {timeout.total_seconds():.0f} s;"
            f" is every rank started, and can its host reach that address? ({text[:200]})"
        ) from None
    finally:
        patience.cancel()


def _say_that_it_waits(place: Mapping[str, str], timeout: timedelta) -> None:
    print(
        f"[rank {place['RANK']} on {socket.gethostname()}] waits for the {place['WORLD_SIZE']} ranks to meet at"
        f" {place['MASTER_ADDR']}:{place['MASTER_PORT']} (up to {timeout.total_seconds():.0f} s)",
        file=sys.stderr,
        flush=True,
    )


def visible_index(local_rank: int, gpus: int) -> int:
    """Which of the GPUs that this process sees is its own.

    Slurm (`--gpus-per-task=1`) and containers may show each task its own GPU alone: then that is number 0, whatever the
    rank. Raises JoinError when there are several, but too few.
    """
    if gpus == 1 or local_rank < gpus:
        return min(local_rank, gpus - 1)
    raise JoinError(
        f"local rank {local_rank} has no GPU: {gpus} are visible here; start at most {gpus} ranks on a host, or show"
        " each rank one of its own",
        USAGE,
        alone=True,
    )


def _one_gpu_each(world: World) -> None:
    """Raises ValueError on all ranks when two have been given the same GPU: NCCL would hang, or fail without names."""
    unique = str(getattr(torch.cuda.get_device_properties(world.device), "uuid", world.device))
    owners: dict[tuple[str, str], int] = {}
    for rank, gpu in enumerate(world.all_gather((world.host, unique))):
        first = owners.setdefault(gpu, rank)
        if first != rank:
            raise ValueError(
                f"ranks {first} and {rank} have the same GPU, {gpu[1]} on {gpu[0]}: start one rank for each GPU of a"
                " host (CUDA_VISIBLE_DEVICES says which a rank sees)"
            )


def _raise_file_limit() -> None:
    """gloo opens three sockets for each other rank: with the usual limit a few hundred ranks could not start."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _share_cores(world: World) -> None:
    """Without it every rank would start a thread on each core of its host."""
    ranks_here = world.all_gather(world.host).count(world.host)
    if len(os.sched_getaffinity(0)) == os.cpu_count():  # else somebody has shared them out already
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))


def leave() -> None:
    """Ends the process group, after a barrier: ranks that still talk would see it as a fault of the others."""
    dist.destroy_process_group()


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
