"""Training jobs inside a test: real ranks, the real command line, no launcher; and reading what they left."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptb_ds.training.metrics import SPEEDS
from tests.harness.processes import FORKSERVER, PATIENCE, free_port, print_to, rank_environment, wait_until

# What runs in a rank before its command: see `faults`.
Fault = Callable[[int], None]

TINY = {
    "model.num_slots": 4,
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "data.lanes": 8,
    "data.window": 6,
    "optim.lr": 0.01,
    "optim.warmup_updates": 3,
    "train.updates": 12,
    "train.precision": "fp32",
    "run.save_every": 4,
    "run.keep": 100,
    "run.eval_every": 5,
    "run.eval_tokens": 30,  # five windows
    "run.log_every": 1,
    "run.hang_seconds": 60,
}


@dataclass
class Job:
    """A job of several ranks that was started."""

    processes: list[Any]
    outputs: list[Path]
    codes: list[int] = field(default_factory=list)

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Exit codes by rank (negative: the signal that ended it)."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        assert not late, f"ranks {late} still ran after {timeout} s:\n{self.text()}"
        self.codes = [process.exitcode for process in self.processes]
        return self.codes

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL to one rank, or to all that are left."""
        for index, process in enumerate(self.processes):
            if rank in (None, index) and process.is_alive():
                process.kill()

    def signal(self, number: signal.Signals, rank: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def text(self, rank: int | None = None) -> str:
        """What the ranks printed."""
        chosen = self.outputs if rank is None else [self.outputs[rank]]
        return "\n".join(path.read_text(errors="replace") for path in chosen if path.exists())


def start(
    run: Path,
    store: Path | Sequence[Path],
    *,
    ranks: int = 1,
    stage: int = 1,
    policy: dict[str, Any] | None = None,
    fault: Fault | None = None,
    **over: Any,
) -> Job:
    """Starts the tiny training in `run`; keys of `over` have `__` for the dot (train__updates=20).

    `fault` is planted in every rank first.
    """
    run.mkdir(parents=True, exist_ok=True)
    name = f"{time.monotonic_ns()}"
    config = run.parent / f"{run.name}-{name}-policy.json"
    config.write_text(json.dumps(policy or {"zero_optimization": {"stage": stage, "overlap_comm": False}}))
    values = TINY | {key.replace("__", "."): value for key, value in over.items()}
    stores = [store] if isinstance(store, Path) else list(store)
    args = ["train", "--deepspeed_config", str(config), "--run.dir", str(run), "--data.path", *map(str, stores)]
    for key, value in values.items():
        args += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return launch(args, ranks, run.parent / f"{run.name}-{name}", fault)


def launch(args: list[str], ranks: int, output: Path, fault: Fault | None = None) -> Job:
    """Starts `gptb-ds ARGS` on so many ranks; what rank r prints goes to `output`-r.txt."""
    port = free_port()
    outputs = [Path(f"{output}-{rank}.txt") for rank in range(ranks)]
    processes = [
        FORKSERVER.Process(target=_rank, args=(args, rank, ranks, port, outputs[rank], fault), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return Job(processes, outputs)


def _rank(args: list[str], rank: int, ranks: int, port: int, output: Path, fault: Fault | None) -> None:
    print_to(output)
    if ranks > 1:
        os.environ |= rank_environment(rank, ranks, port)
    import torch

    torch.set_num_threads(1)
    if fault is not None:
        fault(rank)
    from gptb_ds.cli import main

    code = main(args)
    sys.stdout.flush()
    os._exit(code)


def train(run: Path, store: Path | Sequence[Path], *, expect: int = 0, timeout: float = PATIENCE, **over: Any) -> Job:
    """`start`, wait, and check that every rank ended with `expect`."""
    job = start(run, store, **over)
    codes = job.wait(timeout)
    assert set(codes) == {expect}, f"exit codes {codes}, expected {expect}:\n{job.text()}"
    return job


def wait_for_lines(run: Path, count: int, job: Job | None = None) -> None:
    """Returns once metrics.jsonl has so many lines: an event of the run, on a machine of any speed."""
    path = run / "metrics.jsonl"
    said = job.text if job else lambda: ""
    wait_until(
        lambda: path.exists() and path.read_bytes().count(b"\n") >= count, f"{count} lines of {path}", said, 0.01
    )


def metrics(run: Path) -> list[str]:
    """The lines of a run's metrics.jsonl as text, without what speaks of speed."""
    lines = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        lines.append(json.dumps({key: value for key, value in json.loads(line).items() if key not in SPEEDS}))
    return lines


def losses(run: Path) -> dict[int, float]:
    """Training loss by update."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["update"]: line["loss"] for line in found if "loss" in line}


def file_checksums(run: Path, step: int) -> dict[str, str]:
    """Checksums of the tensor files of a checkpoint: equal checksums are equal bits."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def rewind(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run as a kill right after the checkpoint of `step` left it (later lines of metrics stay behind)."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("lock"))
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    return copy


def write_corpus(folder: Path, documents: int = 60, seed: int = 3) -> Path:
    """Small text files of very different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(seed)
    words = ["state", "slot", "lane", "column", "window", "reset", "update", "token", "step", "the", "of", "and", "to"]
    for number in range(documents):
        length = chooser.choice([1, 2, 5, 6, 7, 30, 60, 150])
        text = " ".join(chooser.choice(words) for _ in range(length))
        (folder / f"{number:03d}.txt").write_text(text)
    return folder
