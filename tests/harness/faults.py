"""Faults by name: what is planted in the ranks of a job, and damage done to a checkpoint on the disk.

A fault of a rank is called in it, with its number, before the command runs:
`start(run, store, fault=faults.small_files)`. It changes what the rank will meet, never what is checked.
"""

from __future__ import annotations

import functools
import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

# In the ranks of a job


def small_files(rank: int, limit: int = 40_000) -> None:
    """The system refuses to write files beyond a size, as a full disk would: checkpoints, of the tiny model, are."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def smaller_files(rank: int) -> None:
    """As `small_files`, so small that metrics.jsonl outgrows it and a checkpoint of the narrowest model doesn't."""
    small_files(rank, 30_000)


def raises_in_update(kind: type[Exception], number: int) -> Callable[[int], None]:
    """Rank 1 meets a fault of its own in this update."""
    return functools.partial(_raises_in_update, kind, number)


def _raises_in_update(kind: type[Exception], number: int, rank: int) -> None:
    from gptb_ds.training.engine import Engine

    update, calls = Engine.update, []

    def failing(self, *call):
        calls.append(1)
        if rank == 1 and len(calls) == number:
            raise kind("the fault of rank 1")
        return update(self, *call)

    Engine.update = failing


def waits_in_update(number: int) -> Callable[[int], None]:
    """Every rank is in a call that never ends from this update on, as in a collective of NCCL whose peer is gone."""
    return functools.partial(_before_update, number, _waits_for_ever)


def slow_in_update(number: int, seconds: float) -> Callable[[int], None]:
    """This update of rank 1 takes so long: it sleeps, and it computes in Python."""
    return functools.partial(_before_update, number, functools.partial(_is_slow, seconds))


def _before_update(number: int, action: Callable[[int], None], rank: int) -> None:
    from gptb_ds.training.engine import Engine

    update, calls = Engine.update, []

    def later(self, *call):
        calls.append(1)
        if len(calls) == number:
            action(rank)
        return update(self, *call)

    Engine.update = later


def _waits_for_ever(rank: int) -> None:
    time.sleep(1_000_000)


def _is_slow(seconds: float, rank: int) -> None:
    if rank == 1:
        time.sleep(seconds / 2)
        end = time.monotonic() + seconds / 2
        while time.monotonic() < end:
            sum(range(1000))


def infinite_losses(rank: int) -> None:
    """The loss of rank 0 is infinite in updates 5 and 6, its gradients are not."""
    _infinite_in((5, 6), rank)


def one_infinite_loss(rank: int) -> None:
    """The loss of rank 0 is infinite in update 15, and not when that is made once more."""
    _infinite_in((15,), rank)


def _infinite_in(chosen: tuple[int, ...], rank: int) -> None:
    from gptb_ds.model.objective import WindowObjective

    forward = WindowObjective.forward

    def infinite(self, *call):
        loss, state = forward(self, *call)
        # Each objective counts for itself: those that measure a window's memory before training are others.
        self.calls = getattr(self, "calls", 0) + 1
        return loss + (math.inf if self.calls in chosen and rank == 0 else 0.0), state

    WindowObjective.forward = infinite


def slow_reading(rank: int) -> None:
    """Each tensor of a checkpoint takes a while to be read, and all of them longer than `HANG_SECONDS`."""
    from gptb_ds.checkpoint.reader import CheckpointReader

    fetch = CheckpointReader.fetch

    def slow(self, kind, name):
        time.sleep(0.4)
        return fetch(self, kind, name)

    CheckpointReader.fetch = slow


def empty_compile_cache(folder: Path) -> Callable[[int], None]:
    """What torch has compiled before is not found."""
    return functools.partial(_compile_cache, str(folder))


def _compile_cache(folder: str, rank: int) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def requeued(rank: int) -> None:
    """Slurm has started this job before."""
    os.environ["SLURM_RESTART_COUNT"] = "1"


def wandb_offline(rank: int) -> None:
    """W&B keeps what it gets on the disk, and prints nothing."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def hangs_in_reading(rank: int) -> None:
    """Rank 1 never comes back from reading its inputs."""
    import gptb_ds.training.setup as setup

    if rank == 1:
        setup.read_inputs = lambda *_: time.sleep(10_000)


def says_small_exchanges(rank: int) -> None:
    """Each collective on the ranks' CPU group, the first group that is made, says so."""
    import torch.distributed as dist

    new_group, made = dist.new_group, []

    def noted(*args, **options):
        made.append(new_group(*args, **options))
        return made[-1]

    dist.new_group = noted

    def saying(name):
        collective = getattr(dist, name)

        def call(*args, group=None, **options):
            if made and group is made[0]:
                print(f"small exchange: {name}", flush=True)
            return collective(*args, group=group, **options)

        setattr(dist, name, call)

    for name in ("all_reduce", "broadcast", "broadcast_object_list", "all_gather_object", "barrier", "send", "recv"):
        saying(name)


def slow_evaluation(number: int) -> Callable[[int], None]:
    """From this evaluation of the process on, each window takes a while longer."""
    return functools.partial(_slow_evaluation, number)


def _slow_evaluation(number: int, rank: int) -> None:
    import gptb_ds.evaluation as evaluation

    windows, evaluations = evaluation.held_out_windows, []

    def slow(*call, **options):
        evaluations.append(1)
        for window in windows(*call, **options):
            if len(evaluations) >= number:
                time.sleep(0.25)
            yield window

    evaluation.held_out_windows = slow


# On the disk: each returns what a refusal must say


def truncated(checkpoint: Path) -> str:
    file = next(checkpoint.glob("optimizer-*"))
    file.write_bytes(file.read_bytes()[:100])
    return "has 100 bytes"


def flipped_byte(checkpoint: Path) -> str:
    """One byte of its weights differs."""
    file = next(checkpoint.glob("model-*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "was altered"


def flipped_in_manifest(checkpoint: Path) -> str:
    file = checkpoint / "manifest.json"
    file.write_text(file.read_text().replace('"step": 12', '"step": 13'))
    return "manifest.json was altered"


def no_manifest(checkpoint: Path) -> str:
    """Neither of the two copies."""
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest-copy.json").unlink()
    return "no manifest.json"


def no_file(checkpoint: Path) -> str:
    next(checkpoint.glob("lanes-*")).unlink()
    return "is missing"


def garbage_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_bytes(b"\x80\x04not json")
    return "cannot be read"
