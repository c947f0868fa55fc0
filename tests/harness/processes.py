"""Processes of a test: ranks forked from one that has loaded the slow imports, and waiting for what is to come."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import random
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.harness.preload"])

PATIENCE = 300  # seconds that anything may take on a busy machine before a test gives up: a limit, never a measure
# For runs whose watchdog is to speak, or must not. What a rank does between two signs of life, DeepSpeed's start with
# it, is shorter even when ten other programs share its cores.
HANG_SECONDS = 15


def wait_until(
    condition: Callable[[], Any], what: str, said: Callable[[], str] = lambda: "", every: float = 0.05
) -> Any:
    """The condition's first true value. Fails, naming `what` and with the output that `said` gives, if none comes."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}:\n{said()}"
        time.sleep(every)
    return value


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on now, different ones.

    Below the ports that the system gives to whoever asks for any (32768 and up on Linux), and from a random place:
    between this answer and the listening, another test at work beside this one is not likely to take them.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(15_000, 32_000), 1_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports")


def free_port() -> int:
    """One of `free_ports`."""
    return free_ports(1)[0]


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables of torch's rendezvous for a rank on this host."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {key: str(value) for key, value in names.items()}


def run_script(script: Path, arguments: Sequence[str], output: Path, timeout: float = PATIENCE) -> int:
    """The exit code of `python SCRIPT ARGUMENTS...` with the slow imports done; all that it prints goes to `output`."""
    process = FORKSERVER.Process(target=_script, args=(str(script), list(arguments), output))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{script} still ran after {timeout} s:\n{output.read_text()}")
    return process.exitcode


def _script(script: str, arguments: list[str], output: Path) -> None:
    print_to(output)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def print_to(output: Path) -> None:
    """From now on this process prints to that file."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = PATIENCE) -> list[Any]:
    """`function(world, *args)` on `world_size` ranks; their results in rank order. The first failure is raised."""
    port = free_port()
    results = FORKSERVER.Queue()
    processes = [
        FORKSERVER.Process(target=_rank, args=(rank, world_size, port, results, function, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    try:
        while len(answers) < world_size:
            rank, error, answer = results.get(timeout=timeout)
            if error:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{error}")
            answers[rank] = pickle.loads(answer)
    except queue.Empty:
        raise AssertionError(f"ranks did not answer in {timeout} s: have {sorted(answers)}") from None
    finally:
        for process in processes:
            process.join(timeout=5 if len(answers) == world_size else 0.1)
            if process.is_alive():
                process.kill()
    return [answers[rank] for rank in range(world_size)]


def _rank(rank: int, size: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= rank_environment(rank, size, port)
    import torch

    from gptb_ds.distributed.join import join, leave

    torch.set_num_threads(1)
    try:
        world = join(60)
        answer = function(world, *args)
        world.barrier()
        leave()
        # Plain bytes: tensors in a queue would be shared memory that ends with this process.
        results.put((rank, None, pickle.dumps(answer)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
