"""Parts of the GPU report: what the product's engine does with a window as CUDA graphs and with a compiled step.

Axes: B lanes, K steps.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gptb_ds.config import OptimConfig
from gptb_ds.data.window import Window
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.compilation import compile_step
from tests.gpu.common import (
    GPT2_SMALL,
    GPT2_VOCAB,
    GPU,
    VOCAB,
    rates,
    seconds,
    seconds_left,
    show,
    small_model,
    window,
)
from tests.gpu.training import run_command, same_runs, world
from tests.harness.training import TINY, write_corpus

# (lanes, graph) at K=16, or 8 where 1,024 lanes x 16 would not fit. A number of lanes is compiled for itself, which
# takes a minute.
TRAINED = [(64, "off"), (64, "on"), (256, "off"), (256, "on"), (1024, "off"), (1024, "on")]
COMPILED = [(64, "on"), (1024, "on"), (1024, "off")]


def make_engine(model: Any, lanes: int, groups: int, *, stage: int, precision: str, graph: str, recompute: int = 0):
    """The product's engine, and the lines that it said."""
    from gptb_ds.training.deepspeed_policy import with_defaults
    from gptb_ds.training.engine import Engine

    said: list[str] = []
    trained = Engine(
        WindowObjective(model, recompute),
        world(),
        lanes=lanes,
        lane_groups=groups,
        precision=precision,
        optim=OptimConfig(lr=1e-3, warmup_updates=0),
        policy=with_defaults({"zero_optimization": {"stage": stage}}),
        graph=graph,
        say=said.append,
    )
    return trained, said


def updates(stage: int, precision: str, recompute: int, graph: str) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses of four updates in two lane groups, each another window, and the weights after them."""
    engine, said = make_engine(small_model(), 16, 2, stage=stage, precision=precision, graph=graph, recompute=recompute)
    states = [engine.model.empty_state(8) for _ in range(2)]
    ids, targets, reset = window(32, 16, VOCAB, GPU)
    losses = []
    for columns in range(0, 32, 8):
        part = slice(columns, columns + 8)
        parts = Window(ids[part], targets[part], reset[part], None).split_lanes(2)
        result, states = engine.update(list(zip(parts, states, strict=True)), 1e-3, 8 * 16)
        losses.append(result.loss)
    assert not said, said
    assert graph == "off" or (engine.graphs is not None and engine.graphs.replays == 8)
    return losses, engine.fp32_state.export(lambda name: True)["weight"]


def captured() -> dict[str, Any]:
    """Updates with windows as CUDA graphs beside the plain path: losses, and the largest gap between weights.

    The plain path beside itself says what the order of additions in some kernels makes of it alone.
    """
    rows: dict[str, Any] = {}
    for stage, precision, recompute in ((0, "fp32", 0), (0, "bf16", 3), (1, "bf16", 0), (1, "fp16", 3), (2, "bf16", 0)):
        plain, weights = updates(stage, precision, recompute, "off")
        again, weights_again = updates(stage, precision, recompute, "off")
        replayed, weights_replayed = updates(stage, precision, recompute, "on")
        rows[f"stage {stage} {precision}, recompute {recompute}"] = row = {
            "losses equal": replayed == plain,
            "gap of weights": max(float((weights[n] - weights_replayed[n]).abs().max()) for n in weights),
            "plain against plain": max(float((weights[n] - weights_again[n]).abs().max()) for n in weights),
            "plain's losses equal": again == plain,
        }
        for one, other in zip(plain, replayed, strict=True):
            assert abs(one - other) < 1e-3, (row, plain, replayed)
    return rows


def trained_speed() -> dict[str, Any]:
    """124M, S=20, K=16 (or 8), bf16, ZeRO 1, whole updates: tokens/s and MFU, plain and as graphs, with peak memory.

    "left GiB" is what the process still held when the engine had been dropped: graphs that were not freed would show.
    """
    return _costs(TRAINED, compiled=False)


def compiled_speed() -> dict[str, Any]:
    """As `trained_speed`, with a compiled step. "first s" is the time until the first update was made."""
    return _costs(COMPILED, compiled=True)


def _costs(shapes: list[tuple[int, str]], *, compiled: bool) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for lanes, graph in shapes:
        name = f"{lanes} lanes, graph {graph}" + (", compiled" if compiled else "")
        if seconds_left() < 60:
            rows[name] = {"left out": "no time"}
            continue
        try:
            rows[name] = _update_cost(lanes, graph, compiled)
        except torch.OutOfMemoryError as error:
            rows[name] = {"out of memory": str(error).splitlines()[0][:100]}
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        rows[name]["left GiB"] = torch.cuda.memory_reserved() / 2**30
        show("so far", {name: rows[name]})
    return rows


def _update_cost(lanes: int, graph: str, compiled: bool) -> dict[str, Any]:
    model, said = small_model(GPT2_VOCAB, **GPT2_SMALL), []
    per_token = rates(model, 1, 1.0)  # now: at ZeRO-3 it would not be whole any more
    if compiled:
        compile_step(model, said.append)
    engine, lines = make_engine(model, lanes, 1, stage=1, precision="bf16", graph=graph)
    state = engine.model.empty_state(lanes)
    roomy = torch.cuda.get_device_properties(GPU).total_memory > 120 * 2**30
    columns = 16 if lanes < 1024 or roomy else 8
    one = Window(*window(columns, lanes, GPT2_VOCAB, GPU), None)
    torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()

    def update() -> None:
        engine.update([(one, state)], 1e-4, columns * lanes)

    update()
    torch.cuda.synchronize()
    first = time.monotonic() - began
    taken = seconds(update, 3)
    rate = columns * lanes / taken
    row = {"columns": columns, "tokens/s": rate, "MFU": per_token["MFU"] * rate, "ms": taken * 1e3, "first s": first}
    row |= {"peak GiB": torch.cuda.max_memory_allocated() / 2**30}
    engine.close()
    return row | ({"said": "; ".join(said + lines)} if said or lines else {})


# Two sizes of run, each with windows as graphs and without.
RUNS: dict[str, dict[str, object]] = {
    "2 blocks, E=128": {"model.n_layer": 2, "model.n_embd": 128, "model.n_head": 4, "model.num_slots": 8},
    "12 blocks, E=768": {"model.n_layer": 12, "model.n_embd": 768, "model.n_head": 12, "model.num_slots": 20},
}


def trainer() -> dict[str, Any]:
    """The command in bf16, 64 lanes, K=16, with windows as CUDA graphs and without: what it wrote, and its speed.

    "same" compares metrics and the last checkpoint to the last bit. One run after the other, for their speeds.
    """
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_corpus(folder / "texts")
        run_command("prepare", "--source", texts, "--out", folder / "store", "--holdout", "0.2")
        for kind, model in RUNS.items():
            if seconds_left() < 60:
                rows[kind] = {"left out": "no time"}
                continue
            values = TINY | {"data.lanes": 64, "data.window": 16, "train.precision": "bf16", "train.updates": 40}
            values |= {"run.eval_every": 0, "run.save_every": 0, "data.path": folder / "store"} | model
            for graph in ("off", "on"):
                own = values | {"run.dir": folder / kind / graph, "train.graph": graph}
                said = run_command("train", *(word for key, value in own.items() for word in (f"--{key}", value)))
                assert "not captured" not in said, said
            plain, replayed = folder / kind / "off", folder / kind / "on"
            speeds = {graph: _late_speed(folder / kind / graph) for graph in ("off", "on")}
            rows[kind] = {f"tokens/s, graph {graph}": speed for graph, speed in speeds.items()}
            rows[kind] |= {"ratio": speeds["on"] / speeds["off"], "same": same_runs(plain, replayed, 40)}
            show("so far", {kind: rows[kind]})
    return rows


def _late_speed(run: Path) -> float:
    """The median of tokens/s over the second half of a run's updates."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return statistics.median(speeds[len(speeds) // 2 :])


def kernels() -> dict[str, Any]:
    """Where the device's time goes in a window of 2 columns, 1,024 lanes, 124M, bf16: plain, and compiled."""
    rows: dict[str, Any] = {}
    for kind in ("plain", "compiled"):
        if kind == "compiled" and seconds_left() < 120:
            continue
        rows |= {f"{kind}: {name}": row for name, row in _kernel_times(kind == "compiled").items()}
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _kernel_times(compiled: bool) -> dict[str, dict[str, Any]]:
    model = small_model(GPT2_VOCAB, **GPT2_SMALL).to(GPU, torch.bfloat16)
    if compiled:
        model.compile_step()
    objective, state, inputs = WindowObjective(model), model.empty_state(1024), window(2, 1024, GPT2_VOCAB, GPU)
    for _ in range(2):
        objective(*inputs, state)[0].backward()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        objective(*inputs, state)[0].backward()
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda event: event.self_device_time_total, reverse=True)
    total = sum(event.self_device_time_total for event in found)
    rows: dict[str, dict[str, Any]] = {"all": {"ms": total / 1e3, "launches": sum(event.count for event in found)}}
    for event in found[:16]:
        rows[event.key[:90]] = {
            "share": event.self_device_time_total / total,
            "times": event.count,
            "us each": event.self_device_time_total / event.count,
        }
    return rows
