"""Whether a run's step is compiled (`train.compile`), and what is said and done while it is."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from typing import cast

import torch

from gptb_ds.config import Config
from gptb_ds.distributed.watchdog import long_work
from gptb_ds.model.modeling import RecurrentLM
from gptb_ds.training.flops import peak_flops
from gptb_ds.training.kept_choice import kept_choice

# On one CPU core (torch 2.13) the compilation takes 28 s at E=128 and 2 blocks, 57 s at E=256 and 4. Then the step is
# 1.10 times as fast in fp32, 1.27 times in bf16. That is earned back after 2 to 10 minutes; we ask for twice that.
WORTH_SECONDS = 1200.0
# What a run reaches of the rate of large products, roughly: its length is estimated with it.
_SHARE_OF_RATE = 0.4


def with_compilation(config: Config, device: torch.device) -> Config:
    """`config` with "on" or "off" in the place of `train.compile auto`.

    A run that has one keeps it: the other would round differently. "auto" is on for runs on CPUs that are estimated to
    take `WORTH_SECONDS` or longer; on a GPU compiled windows are slower. With `recompute_cheap`, which has no say in a
    compiled step, it is off.
    """
    if config.train.compile != "auto":
        return config
    cheap = config.train.recompute_cheap
    chosen = "off" if cheap else kept_choice(config, "train.compile", ("on", "off"))
    if chosen is None:
        can_pay = config.model.kind == "gptb" and device.type == "cpu"
        worth = can_pay and estimated_seconds(config, device) >= WORTH_SECONDS
        chosen = "on" if worth else "off"
    return config.model_copy(update={"train": config.train.model_copy(update={"compile": chosen})})


def obstacle(stage: int) -> str | None:
    """Why no step can be compiled here at this ZeRO stage, or None."""
    if stage == 3:
        return "at ZeRO stage 3 hooks gather the weights, and can't be compiled"
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "c++", "clang++")):
        return "there is no C++ compiler (Debian package: g++)"
    return None


def compile_step(model: RecurrentLM, say: Callable[[str], None]) -> None:
    """Compiles the model's step when it is first needed: with a line, the watchdog kept quiet, and cached on disk.

    Should that fail, the line says so, and the step runs as it is.
    """

    def compiled(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        from torch._inductor.compile_fx import compile_fx

        say("compiling the step, for up to a minute or two (later runs find it in torch's cache)")
        began = time.monotonic()
        try:
            with long_work("compiling the step"):
                made = cast("Callable[..., object]", compile_fx(graph, inputs))
        except Exception as error:  # whatever a compiler does: training goes on without
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(f"the step can't be compiled, training goes on without: {reason}")
            return graph.forward
        say(f"the step is compiled, after {time.monotonic() - began:.0f} s")
        return made

    model.compile_step(backend=compiled)


def estimated_seconds(config: Config, device: torch.device) -> float:
    """How long the run's products take, roughly, at the rate that this device has now."""
    model, train, data = config.model, config.train, config.data
    blocks = 12 * model.n_layer * model.n_embd**2
    tokens = train.tokens or train.updates * data.lanes * data.window / max(n for n, _ in train.batch_phases())
    flops = 6.0 * blocks * model.num_slots * tokens * (4 / 3 if train.recompute_every else 1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rate, _ = peak_flops(device, train.precision, 1024, model.n_embd)
    return flops / ranks / (rate * _SHARE_OF_RATE)
