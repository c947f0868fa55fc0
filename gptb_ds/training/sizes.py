"""Sizes that a run leaves to the machine: columns kept for the backward pass, and lanes. Decided before it, once.

Axes: B lanes, K columns of a window, S slots, E embedding, c columns between two states that are kept.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from gptb_ds.config import AUTO_LANES, AUTO_RECOMPUTE, Config
from gptb_ds.data.corpus import open_corpus
from gptb_ds.distributed.watchdog import progress_made
from gptb_ds.model.backbones import build_decoder
from gptb_ds.model.cheap import Recipes
from gptb_ds.model.decoder_configuration import GPTBDecoderConfig
from gptb_ds.model.objective import WindowObjective
from gptb_ds.model.window_model import WindowModel
from gptb_ds.model_choice import model_configuration, new_model
from gptb_ds.training.kept_choice import kept_number

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the memory that is free a backward pass may keep so much: products' results and gradients come and go beside it.
_USABLE = 0.75
# The knee: the fewest lanes that reach this share of the best rate. More lanes are more tokens an update.
_KNEE = 0.9
# Columns of a trial of speed, and lanes beyond which none is made.
_TRIAL_COLUMNS, _MOST_LANES = 4, 1 << 14


@dataclass(frozen=True)
class WindowMemory:
    """Bytes that a window keeps for its backward pass: of one lane in one column, and of a lane's state."""

    column: float
    state: int

    def kept(self, lanes: int, window: int, every: int) -> float:
        """With the states of every c-th column kept; 0: everything is."""
        if not every:
            return lanes * window * self.column
        return lanes * (min(every, window) * self.column + -(-window // every) * self.state)


def measure_memory(
    model: WindowModel, device: torch.device, precision: str, recompute_cheap: bool = False
) -> WindowMemory:
    """By two small windows of a copy of `model` on the device, of which autograd says what it keeps.

    `recompute_cheap` as in `WindowObjective`.
    """
    trial = copy.deepcopy(model).to(device, _DTYPES[precision]).train()
    few, more = (_kept_bytes(trial, 2, steps, recompute_cheap) for steps in (2, 4))
    state = trial.empty_state(1)
    return WindowMemory((more - few) / 4, state.numel() * state.element_size())


def _kept_bytes(model: WindowModel, lanes: int, steps: int, recompute_cheap: bool = False) -> int:
    """Bytes of the storages that the graph of a window holds, without parameters and what is computed again."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []  # a storage that is freed gives its address to the next one

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and (recipes is None or recipes.of(tensor) is None):
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    recipes = Recipes() if recompute_cheap else None
    kept_noted = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.enable_grad(), recipes or nullcontext(), kept_noted:
        loss, _ = WindowObjective(model)(*_trial_window(model, lanes, steps))
    del loss
    return sum(kept.values())


def _trial_window(model: WindowModel, lanes: int, steps: int) -> tuple[torch.Tensor, ...]:
    state_BSE = model.empty_state(lanes)
    ids_KB = torch.zeros((steps, lanes), dtype=torch.int64, device=state_BSE.device)
    return ids_KB, ids_KB, torch.zeros_like(ids_KB, dtype=torch.bool), state_BSE


def choose_recompute(memory: WindowMemory, lanes: int, window: int, usable: float) -> int:
    """The largest c that fits, 0 (keep everything) if that does; else the one that keeps least.

    Whatever c is, each column is computed once more: a larger one only costs fewer interruptions.
    """
    if memory.kept(lanes, window, 0) <= usable:
        return 0
    choices = [max(1, window >> n) for n in range(1, window.bit_length() + 1)]
    fitting = [every for every in choices if memory.kept(lanes, window, every) <= usable]
    return max(fitting) if fitting else min(choices, key=lambda every: memory.kept(lanes, window, every))


def free_memory(device: torch.device, ranks_here: int) -> float:
    """Bytes that this rank may take: of its GPU, with what torch's allocator holds idle; or its share of the host's."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + idle)
    return float(psutil.virtual_memory().available) / ranks_here


def training_bytes(model: nn.Module, precision: str) -> int:
    """Of weights, gradients and AdamW's moments on one rank without ZeRO: the most that they take."""
    values = sum(p.numel() for p in model.parameters())
    return values * (16 if precision == "fp32" else 18)


def with_sizes(config: Config, device: torch.device, ranks: int, ranks_here: int, say: Callable[[str], None]) -> Config:
    """`config` with numbers in the place of `data.lanes auto` and `train.recompute_every auto`; on rank 0.

    A run that has made its choice keeps it. Raises ValueError for a store or model that can't be read, and for a
    `data.skip` beyond the lanes.
    """
    lanes, every = config.data.lanes, config.train.recompute_every
    if lanes == AUTO_LANES:
        lanes = kept_number(config, "data.lanes") or 0
    if every == AUTO_RECOMPUTE:
        kept = kept_number(config, "train.recompute_every")
        every = (AUTO_RECOMPUTE if kept is None else kept) if config.model.kind == "gptb" else 0
    if lanes == AUTO_LANES or every == AUTO_RECOMPUTE:
        model = _trial_model(config)
        memory = measure_memory(model, device, config.train.precision, config.train.recompute_cheap)
        usable = _USABLE * (free_memory(device, ranks_here) - training_bytes(model, config.train.precision))
        groups = config.train.most_groups
        if lanes == AUTO_LANES:
            fits = most_lanes(memory, config.data.window, every, usable)
            rates = lane_rates(model, device, config.train.precision, fits)
            chosen = knee(rates)
            lanes = chosen * ranks * groups
            found = ", ".join(f"{n}: {rate:,.0f}" for n, rate in rates.items())
            say(f"data.lanes auto: {lanes} lanes, {chosen} a rank and lane group (tokens/s by lanes: {found})")
        if every == AUTO_RECOMPUTE:
            every = choose_recompute(memory, lanes // ranks // groups, config.data.window, usable)
            if every:
                say(f"train.recompute_every auto: {every}")
    data = config.data.model_copy(update={"lanes": lanes})
    data.skips()  # the configuration could not look yet whether they are among the lanes
    train = config.train.model_copy(update={"recompute_every": every})
    return config.model_copy(update={"data": data, "train": train})


def most_lanes(memory: WindowMemory, window: int, every: int, usable: float) -> int:
    """The most lanes whose window fits, and a trial's as well; at least one. `every`: recomputation, or its "auto"."""
    if every == AUTO_RECOMPUTE:
        every = choose_recompute(memory, 1, window, 0.0)
    a_lane = max(memory.kept(1, window, every), memory.kept(1, _TRIAL_COLUMNS, 0))
    return max(1, int(usable / a_lane))


def _trial_model(config: Config) -> WindowModel:
    corpus = open_corpus(config.data.path, config.data.weights, "train")
    configuration = model_configuration(config, corpus.vocab_size, corpus.eot_id)
    if isinstance(configuration, GPTBDecoderConfig):
        return build_decoder(configuration)
    return new_model(configuration)


def lane_rates(model: WindowModel, device: torch.device, precision: str, most: int) -> dict[int, float]:
    """tokens/s of forward and backward for 1, 2, 4, ... lanes, until two doublings have gained nothing."""
    trial = copy.deepcopy(model).to(device, _DTYPES[precision]).train()
    objective, lanes = WindowObjective(trial), 1
    rates: dict[int, float] = {}
    while lanes <= min(most, _MOST_LANES) and not _has_levelled(list(rates.values())):
        inputs = _trial_window(trial, lanes, _TRIAL_COLUMNS)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            objective(*inputs)[0].backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        rates[lanes] = lanes * _TRIAL_COLUMNS / best
        lanes *= 2
        progress_made(f"trying {lanes} lanes")
    return rates


def _has_levelled(rates: list[float]) -> bool:
    return len(rates) > 2 and max(rates[-2:]) < 1.05 * max(rates[:-2])


def knee(rates: dict[int, float]) -> int:
    """The fewest lanes that reach `_KNEE` of the best rate."""
    return next(lanes for lanes, rate in rates.items() if rate >= _KNEE * max(rates.values()))


def memory_line(memory: WindowMemory, lanes: int, window: int, every: int, free: float) -> str:
    """What a rank's backward pass is estimated to keep, for a person; `lanes` are those it takes at once."""
    columns = f"every {every} of {window}" if every else f"{window}"
    return (
        f"memory a rank: about {_text(memory.kept(lanes, window, every))} kept for the backward pass"
        f" ({lanes} lanes x {columns} columns, {_text(memory.column)} each) of {_text(free)} free"
    )


def _text(count: float) -> str:
    unit = next((u for u in ("KiB", "MiB", "GiB") if count < 2 ** {"KiB": 20, "MiB": 30, "GiB": 99}[u]), "GiB")
    return f"{count / 2 ** {'KiB': 10, 'MiB': 20, 'GiB': 30}[unit]:.1f} {unit}"
