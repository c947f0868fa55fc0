"""Parts of the GPU report: what the product's engine does with a window as CUDA graphs and with a compiled step.

Axes: B lanes, K steps.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gptb_ds.config import OptimConfig
from gptb_ds.data.window import Window
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.compilation import compile_step
from tests.gpu.common import GPT2_SMALL, GPT2_VOCAB, GPU, VOCAB, rates, seconds, seconds_left, small_model, window
from tests.gpu.training import world

# (lanes, graph, compiled) at K=16. A number of lanes is compiled for itself, which takes a minute.
TRAINED = [
    (64, "off", False),
    (64, "on", False),
    (64, "on", True),
    (256, "off", False),
    (256, "on", False),
    (1024, "off", False),
    (1024, "on", False),
    (1024, "on", True),
]


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
    """124M, S=20, K=16, bf16, ZeRO 1, whole updates: tokens/s and MFU plain, as graphs, as graphs of a compiled step.

    With peak memory, and for graphs the time until the first replay (capture, and compilation).
    """
    rows: dict[str, Any] = {}
    for lanes, graph, compiled in TRAINED:
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
    return rows


def _update_cost(lanes: int, graph: str, compiled: bool) -> dict[str, Any]:
    model, said = small_model(GPT2_VOCAB, **GPT2_SMALL), []
    counted = rates(model, 1, 1.0)["TFLOP/s"]
    if compiled:
        compile_step(model, said.append)
    engine, lines = make_engine(model, lanes, 1, stage=1, precision="bf16", graph=graph)
    state = engine.model.empty_state(lanes)
    one = Window(*window(16, lanes, GPT2_VOCAB, GPU), None)
    torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()

    def update() -> None:
        engine.update([(one, state)], 1e-4, 16 * lanes)

    update()
    torch.cuda.synchronize()
    first = time.monotonic() - began
    taken = seconds(update, 3)
    rate = 16 * lanes / taken
    peak = rates(model, 1, 1.0)["TFLOP/s"] / rates(model, 1, 1.0)["MFU"]
    row = {"tokens/s": rate, "MFU": counted * rate / peak, "ms": taken * 1e3, "first s": first}
    row |= {"peak GiB": torch.cuda.max_memory_allocated() / 2**30}
    return row | ({"said": "; ".join(said + lines)} if said or lines else {})


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
