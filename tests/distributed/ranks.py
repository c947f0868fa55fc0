"""Running a function on several gloo ranks inside a test, without a launcher."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# Ranks are forked from a process that has loaded the slow imports already.
_CONTEXT.set_forkserver_preload(["tests.distributed.preload"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """`function(world, *args)` on `world_size` ranks; their results in rank order. The first failure is raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = _CONTEXT.Queue()
    processes = [
        _CONTEXT.Process(target=_rank, args=(rank, world_size, port, results, function, args), daemon=True)
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
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
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
