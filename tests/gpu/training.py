"""Parts of the GPU report: waits, copies and launches, DeepSpeed under NCCL, and runs that stop and go on.

Axes: B lanes, K steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gptb_ds.config import OptimConfig
from gptb_ds.data.window import Window
from gptb_ds.distributed.world import World
from gptb_ds.model.objective import WindowObjective
from tests.gpu.common import DTYPES, GPU, VOCAB, show, small_model, window
from tests.harness.training import TINY, file_checksums, metrics, rewind, write_corpus

# In an update on the make-believe device the host waits 9 times at most: tests/gpu_sim/test_engine.py says what for. At
# stage 3 it waits for streams too, which CUDA's check does not count.
MOST_WAITS = 9


def no_waits() -> dict[str, Any]:
    """Forward and backward of a window in which any wait of the host would raise."""
    rows = {}
    for name in ("fp32", "bf16"):
        for recompute in (0, 3):
            model = small_model().to(GPU, DTYPES[name])
            objective, inputs, state = (
                WindowObjective(model, recompute),
                window(8, 16, VOCAB, GPU),
                model.empty_state(16),
            )
            objective(*inputs, state)[0].backward()  # libraries are loaded in the first one
            torch.cuda.set_sync_debug_mode("error")
            try:
                objective(*inputs, state)[0].backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            rows[f"{name}, recompute {recompute}"] = "none"
    return rows


def engine() -> dict[str, Any]:
    """Updates under DeepSpeed and NCCL with one rank: every stage and precision against fp32 at stage 0.

    Beside the losses how often the host waited for the device in an update, as CUDA's own check of it counts.
    """
    rows: dict[str, Any] = {}
    for precision in ("fp32", "bf16", "fp16"):
        for stage in (0, 1, 2, 3):
            if (stage, precision) == (0, "fp16"):
                continue
            update, losses = _engine(stage, precision)
            for _ in range(3):
                update()
            row = rows[f"stage {stage} {precision}"] = {f"loss {n}": loss for n, loss in enumerate(losses)}
            places = _waits(update)
            row |= {"waits": sum(places.values()), "where": ", ".join(f"{place} x{n}" for place, n in places.items())}
            if precision != "fp16":  # fp16 skips its first updates: the loss scale starts too large
                for number, loss in enumerate(losses[:3]):
                    apart = abs(loss - rows["stage 0 fp32"][f"loss {number}"])
                    assert apart < (1e-3 if precision == "fp32" else 3e-2), (stage, precision, row)
                assert row["waits"] <= MOST_WAITS, (stage, precision, row)
    return rows


def traffic() -> dict[str, Any]:
    """Kernel launches of an update of two lane groups, and its copies between host and device."""
    rows: dict[str, Any] = {}
    for stage, precision in ((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")):
        update, _ = _engine(stage, precision)
        update()
        update()
        names = _device_events(update)

        def count(*parts: str, names: Counter[str] = names) -> int:
            return sum(number for name, number in names.items() if any(part in name for part in parts))

        rows[f"stage {stage} {precision}"] = {
            "launches": count("cudaLaunchKernel", "cuLaunchKernel"),
            "copies in": count("Memcpy HtoD"),
            "copies out": count("Memcpy DtoH"),
        }
    return rows


_worlds: list[World] = []


def world() -> World:
    """This process as the one rank of a job, which it joins once."""
    from gptb_ds.distributed.join import join

    if not _worlds:
        _worlds.append(join(120))
    return _worlds[0]


def _engine(stage: int, precision: str) -> tuple[Callable[[], None], list[float | None]]:
    """An update of a new engine, and the losses that it leaves."""
    from gptb_ds.training.deepspeed_policy import with_defaults
    from gptb_ds.training.engine import Engine

    trained = Engine(
        WindowObjective(small_model(), 3),
        world(),
        lanes=16,
        lane_groups=2,
        precision=precision,
        optim=OptimConfig(lr=1e-3, warmup_updates=0),
        policy=with_defaults({"zero_optimization": {"stage": stage}}),
        graph="off",
    )
    states = [trained.model.empty_state(8) for _ in range(2)]
    parts = Window(*window(8, 16, VOCAB, GPU), None).split_lanes(2)
    losses: list[float | None] = []

    def update() -> None:
        nonlocal states
        result, states = trained.update(list(zip(parts, states, strict=True)), 1e-3, 8 * 16)
        losses.append(result.loss)

    return update, losses


def _waits(function: Callable[[], None]) -> Counter[str]:
    """How often each line of Python made the host wait for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    return Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits)


def _device_events(function: Callable[[], None]) -> Counter[str]:
    """How often each of CUDA's calls and activities comes in it."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        return Counter(event.get("name", "") for event in json.loads(Path(file.name).read_text())["traceEvents"])


RUNS: dict[str, dict[str, object]] = {
    "stage 1 fp32": {"train.precision": "fp32"},
    "stage 1 bf16": {"train.precision": "bf16", "model.dropout": 0.1},
    "stage 3 bf16": {"train.precision": "bf16", "stage": 3, "train.lane_groups": 2},
    "stage 1 bf16 compiled": {"train.precision": "bf16", "train.compile": "on"},
}


def resume() -> dict[str, Any]:
    """The command, straight, straight again, and stopped after 4 of 12 updates and resumed: metrics and checkpoints.

    "equal" is to the last bit. Each run has a process for itself. All kinds go side by side, and a kind's row is
    printed as soon as it is known: compiling takes many times as long as the rest.
    """
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(RUNS)) as pool:
        folder = Path(name)
        texts = write_corpus(folder / "texts")
        run_command("prepare", "--source", texts, "--out", folder / "store", "--holdout", "0.2")
        waiting = {pool.submit(_stopped_and_straight, folder, kind): kind for kind in RUNS}
        rows, failed = {}, {}
        for done in as_completed(waiting):
            kind = waiting[done]
            try:
                rows[kind] = done.result()
                show("so far", {kind: rows[kind]})
            except RuntimeError as error:
                failed[kind] = str(error)
                print(f"so far        {kind}: failed\n{error}", flush=True)
    if failed:
        raise RuntimeError(f"{rows}; failed: {failed}")
    return rows


def _stopped_and_straight(folder: Path, kind: str) -> dict[str, Any]:
    straight, again, resumed = (folder / kind / turn for turn in ("straight", "again", "resumed"))
    started = time.monotonic()
    processes = {turn: _train(folder, kind, turn) for turn in ("straight", "again")}
    for turn, process in processes.items():
        _finish(process, f"{kind}, {turn}")
    rewind(straight, resumed, 4)
    _finish(_train(folder, kind, "resumed"), f"{kind}, resumed")
    row: dict[str, Any] = {"repeated": same_runs(straight, again, 12), "resumed": same_runs(straight, resumed, 12)}
    return row | {"seconds": time.monotonic() - started}


def run_command(*words: object) -> str:
    """`gptb-ds WORDS`, to its end; what it said. Raises RuntimeError with that when it fails."""
    return _finish(_command(*words), str(words[0]))


def _finish(process: subprocess.Popen[str], what: str) -> str:
    said, _ = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(f"{what}: exit code {process.returncode}\n{said[-3000:]}")
    return said


def same_runs(run: Path, other: Path, last: int) -> str:
    """Whether metrics (speeds left out) and checkpoints of update `last` are equal, or from where they differ."""
    lines = list(zip(metrics(run), metrics(other), strict=True))
    differing = [json.loads(one)["update"] for one, two in lines if one != two]
    if differing:
        return f"metrics differ from update {differing[0]}"
    return "equal" if file_checksums(run, last) == file_checksums(other, last) else "checkpoints differ"


def _train(folder: Path, kind: str, turn: str) -> subprocess.Popen[str]:
    values = TINY | {"model.n_embd": 64, "data.lanes": 64, "data.window": 16} | RUNS[kind]
    policy = folder / f"{kind}.json"
    policy.write_text(json.dumps({"zero_optimization": {"stage": values.pop("stage", 1)}}))
    values |= {"run.dir": folder / kind / turn, "data.path": folder / "store", "run.hang_seconds": 200}
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return _command("train", *words, "--deepspeed_config", policy)


def _command(*words: object) -> subprocess.Popen[str]:
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    environment = {key: value for key, value in os.environ.items() if key not in outer}
    command = [sys.executable, "-m", "gptb_ds", *map(str, words)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
