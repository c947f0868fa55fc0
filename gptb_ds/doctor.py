"""A look at this machine: what a bug report needs, and each thing that is wrong in one line with its remedy."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "mpi4py")
LAUNCHERS = {
    "deepspeed": "launch/one_node.sh; comes with the Python package deepspeed",
    "mpirun": "launch/mpirun.sh; an MPI library (Debian: openmpi-bin)",
    "srun": "launch/slurm.sbatch; a Slurm cluster",
    "ssh": "launch/hostfile.sh; Debian: openssh-client",
    "pdsh": "launch/hostfile.sh; Debian: pdsh",
    "numactl": "binds CPU ranks to cores; Debian: numactl",
}

# What each of two processes runs: a sum over both, on the backend that training would use.
_ALL_REDUCE = """
import os, sys, torch, torch.distributed as dist
rank = int(sys.argv[1])
device = torch.device("cuda", rank) if sys.argv[3] == "nccl" else torch.device("cpu")
dist.init_process_group(sys.argv[3], init_method="file://" + sys.argv[2], rank=rank, world_size=2)
total = torch.full((1000,), float(rank + 1), device=device)
dist.all_reduce(total)
assert total.eq(3.0).all()
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `bad` makes the machine unfit to train; `note` only takes a way to launch away."""

    level: Literal["ok", "note", "bad"]
    name: str
    text: str


def examine(stores: list[str], run: str | None) -> Iterator[Finding]:
    """Looks at everything, cheap things first."""
    yield Finding("ok", "python", f"{platform.python_version()} at {sys.executable}")
    yield Finding("ok", "platform", f"{platform.platform()}, {socket.gethostname()}")
    yield from _packages()
    backend = None
    try:
        for finding in _devices():
            backend = finding.text if finding.name == "backend" else backend
            yield finding
    except ImportError as error:
        yield Finding("bad", "torch", f"cannot be imported ({error}); reinstall it: pip install -e .")
    yield from _build_tools()
    yield _extensions()
    yield from _launchers()
    yield _network()
    for store in stores:
        yield _store(Path(store))
    if run is not None:
        yield _run_folder(Path(run))
    if backend:
        yield _all_reduce(backend)


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding("ok", name, version(name))
        except PackageNotFoundError:
            # MPI is one way to launch among several; all others are imported by a training run.
            level: Literal["note", "bad"] = "note" if name == "mpi4py" else "bad"
            yield Finding(level, name, f"not installed: pip install {name}")
    try:
        importlib.import_module("gptb_ds.training.engine")  # it alone imports deepspeed
    except Exception as error:  # whatever keeps a training run from starting
        yield Finding("bad", "deepspeed", f"cannot be imported: {' '.join(str(error).split())[:300]}")


def _devices() -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        for index in range(count):
            properties = torch.cuda.get_device_properties(index)
            yield Finding("ok", f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        yield Finding("ok", "cuda", f"{torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "bad",
            "cuda",
            f"torch {torch.__version__} sees no GPU though nvidia-smi is here: install torch's CUDA build,"
            " and check CUDA_VISIBLE_DEVICES and the driver",
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding("ok", "cpu", f"{cores} cores, torch uses {torch.get_num_threads()} (OMP_NUM_THREADS {threads})")
    yield Finding("ok", "backend", "nccl" if count else "gloo")


def _build_tools() -> Iterator[Finding]:
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    for name, program, remedy in (
        ("compiler", compiler, "Debian: g++"),
        ("ninja", "ninja", "put the environment's bin folder on PATH, or pip install ninja"),
    ):
        path = shutil.which(program) if program else None
        if path:
            yield Finding("ok", name, path)
        else:
            yield Finding("note", name, f"not found; train.compile and optimizer offload need it ({remedy})")


def _extensions() -> Finding:
    """Where DeepSpeed's CPU Adam is built, and whether a build is under way there, or was killed."""
    from gptb_ds.extension_builds import CPU_ADAM, abandoned, build_folder

    try:
        folder = build_folder(CPU_ADAM)
    except (OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        return Finding("note", "extensions", f"no folder to build them in, set TORCH_EXTENSIONS_DIR ({reason[:200]})")
    if not os.access(folder, os.W_OK):
        text = f"{folder} can't be written to; optimizer offload builds there: set TORCH_EXTENSIONS_DIR"
        return Finding("note", "extensions", text)
    lock = folder / "lock"
    if abandoned(lock):
        return Finding("note", "extensions", f"{lock} is left from a build that was killed; training removes it")
    if lock.exists():
        return Finding("note", "extensions", f"a build is under way in {folder}; if there is none, remove {lock}")
    state = "built" if any(folder.glob("*.so")) else "not built yet, optimizer offload does it when it starts"
    return Finding("ok", "extensions", f"{folder}: {state}")


def _launchers() -> Iterator[Finding]:
    for name, use in LAUNCHERS.items():
        path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
        yield Finding("ok", name, path) if path else Finding("note", name, f"not found ({use})")


def _network() -> Finding:
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return Finding(
            "note",
            "host name",
            f"{socket.gethostname()} does not resolve: add it to /etc/hosts, or set GLOO_SOCKET_IFNAME and"
            " NCCL_SOCKET_IFNAME to the interface between the hosts",
        )
    if address.startswith("127."):
        return Finding(
            "note",
            "host name",
            f"{socket.gethostname()} is {address}, which other hosts can't reach: for several hosts set MASTER_ADDR,"
            " and GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between them",
        )
    return Finding("ok", "host name", f"{socket.gethostname()} is {address}")


def _store(path: Path) -> Finding:
    from gptb_ds.data.documents import open_store

    try:
        splits = open_store(path).manifest["splits"]
        documents = [splits[split]["documents"] for split in ("train", "validation")]
    except (ValueError, OSError) as error:
        return Finding("bad", "store", " ".join(str(error).split()))
    writable = "" if os.access(path, os.W_OK) else "; read only, which is enough to train"
    return Finding("ok", "store", f"{path}: {documents[0]:,} documents, {documents[1]:,} held out{writable}")


def _run_folder(path: Path) -> Finding:
    """Can we write there, and how much room is left? Makes nothing: the folder's nearest parent is tried."""
    place = path
    try:
        while not place.exists():
            place = place.parent
        with tempfile.NamedTemporaryFile(dir=place) as file:
            file.write(b"gptb-ds")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding("bad", "run folder", f"cannot write in {place}: {error.strerror}; choose another --run.dir")
    return Finding("ok", "run folder", f"{path}: {shutil.disk_usage(place).free / 2**30:.1f} GiB free")


def _all_reduce(backend: str) -> Finding:
    """Two real processes add up a tensor."""
    import torch

    backend = "nccl" if backend == "nccl" and torch.cuda.device_count() > 1 else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _ALL_REDUCE]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), f"{folder}/meet", backend],
                env=dict(os.environ, OMP_NUM_THREADS="1"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = ""
        try:
            said = "".join(rank.communicate(timeout=120)[1] for rank in ranks)
        except subprocess.TimeoutExpired:
            said = "the ranks did not meet within two minutes"
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    if any(rank.returncode for rank in ranks):
        last = said.strip().splitlines()[-1:] or ["no message"]
        remedy = "set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) to a working interface; NCCL_DEBUG=INFO says more"
        return Finding("bad", "all-reduce", f"2 ranks over {backend} failed: {last[0]}; {remedy}")
    return Finding("ok", "all-reduce", f"2 ranks over {backend}")
