"""Updates on the make-believe device, for test_engine.py: prints a JSON line for each case.

A process of its own: `python -m tests.gpu_sim.engine_cases CASE...`, a case being STAGE:PRECISION:RECOMPUTE:GROUPS
and then, one or none, :graph (captured windows), :offload (the optimizer on the host), :offload-all (the parameters
too); with ! behind it a further update is made twice. Or window:PRECISION:RECOMPUTE:1, sample:PRECISION:0:TOKENS, or
kept:PRECISION:RECOMPUTE:LANES. @FAMILY behind it takes another backbone. RECOMPUTE may be "cheap".
Axes: B lanes, K steps.
"""

from __future__ import annotations

import os

from tests.gpu_sim import fake_cuda

os.environ["DS_ACCELERATOR"] = "cuda"

import gc
import hashlib
import json
import sys
import traceback

import torch

from gptb_ds.config import OptimConfig
from gptb_ds.data.window import Window
from gptb_ds.distributed.join import join
from gptb_ds.distributed.world import World
from gptb_ds.loading import PRECISIONS
from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.decoder import AnyGPTB
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.deepspeed_policy import with_defaults
from gptb_ds.training.engine import Engine
from gptb_ds.training.samples import sample_document
from tests.harness.backbones import small_decoder
from tests.harness.window_memory import kept_bytes

LANES, STEPS, VOCAB = 8, 6, 31


def small_model(family: str = "") -> AnyGPTB:
    if family:
        return small_decoder(family, backbone={"vocab_size": VOCAB, "initializer_range": 0.02}).train()
    torch.manual_seed(5)
    shape = {"n_positions": 5, "num_slots": 5, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return GPTBLMHeadModel(GPTBConfig(vocab_size=VOCAB, dropout=0.0, **shape)).train()


def windows(update: int, groups: int, device: torch.device) -> list[Window]:
    generator = torch.Generator().manual_seed(100 + update)
    tokens = torch.randint(VOCAB, (STEPS + 1, LANES), generator=generator)
    reset = torch.rand((STEPS, LANES), generator=generator) < 0.2
    return Window(tokens[:-1], tokens[1:], reset, None).to(device).split_lanes(groups)


# The policy's own buckets are 200 MB of poisoned memory a case.
SMALL_BUCKETS = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
HOST = {"device": "cpu", "pin_memory": False}
OFFLOADED = {"": {}, "offload": {"offload_optimizer": HOST}}
OFFLOADED["offload-all"] = OFFLOADED["offload"] | {"offload_param": HOST}


def recomputed(model: AnyGPTB, recompute: str) -> WindowObjective:
    if recompute == "cheap":
        return WindowObjective(model, recompute_cheap=True)
    return WindowObjective(model, int(recompute))


def run(
    world: World, again: bool, stage: int, precision: str, recompute: str, groups: int, family: str, variant: str = ""
) -> dict:
    """Losses of three updates and the weights after them; what the last one waited for and copied."""
    offload = OFFLOADED.get(variant, {})
    engine = Engine(
        recomputed(small_model(family), recompute),
        world,
        lanes=LANES,
        lane_groups=groups,
        precision=precision,
        optim=OptimConfig(lr=1e-3, warmup_updates=0),
        policy=with_defaults({"zero_optimization": {"stage": stage} | (SMALL_BUCKETS if stage else {}) | offload}),
        graph="on" if variant == "graph" else "off",
    )
    states = [engine.model.empty_state(LANES // groups) for _ in range(groups)]
    losses, applied = [], []
    for update in range(3):
        parts = windows(update, groups, world.device)
        fake_cuda.reset()
        result, states = engine.update(list(zip(parts, states, strict=True)), 1e-3, LANES * STEPS)
        losses.append(result.loss)
        applied.append(result.applied)
    counts = fake_cuda.counts()
    found = {"losses": losses, "applied": applied, "weights": weights_of(engine)} | counts
    return found | {"twice": made_twice(engine, states, groups)} if again else found


def made_twice(engine: Engine, states: list[torch.Tensor], groups: int) -> list[dict]:
    """Loss and weights of an update that is made, and made once more from what there was before."""
    twice = []
    part, scaler = engine.fp32_state.own_part(), engine.fp32_state.scaler_state()
    for _ in range(2):
        engine.fp32_state.set_own_part(part)
        engine.fp32_state.load_scaler_state(scaler)
        parts = windows(3, groups, states[0].device)
        given = [state.clone() for state in states]
        result, _ = engine.update(list(zip(parts, given, strict=True)), 1e-3, LANES * STEPS)
        twice.append({"loss": result.loss, "weights": weights_of(engine)})
    return twice


def weights_of(engine: Engine) -> dict[str, str]:
    """A checksum of each weight."""
    tensors = engine.fp32_state.export(lambda name: True)["weight"]
    return {name: hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def run_window(device: torch.device, precision: str, recompute: str, family: str) -> dict:
    """Forward and backward of one window, without DeepSpeed: what a CUDA graph would hold."""
    model = small_model(family).to(device, PRECISIONS[precision])
    window = windows(0, 1, device)[0]
    state = model.empty_state(LANES)
    fake_cuda.reset()
    loss, _ = recomputed(model, recompute)(window.input_ids, window.targets, window.reset, state)
    loss.backward()
    counts = fake_cuda.counts()
    return {"losses": [loss.item() / (LANES * STEPS)], "applied": []} | counts


def run_sample(device: torch.device, precision: str, tokens: int) -> dict:
    """A sample of so many tokens, as training prints them."""
    model = small_model().eval().to(device, PRECISIONS[precision])
    fake_cuda.reset()
    drawn = sample_document(model, VOCAB - 1, tokens, seed=7)
    return {"drawn": len(drawn)} | fake_cuda.counts()


def run_kept(device: torch.device, precision: str, recompute: int, lanes: int) -> dict:
    """Bytes that a window's forward keeps for its backward pass, and what the formula says."""
    torch.manual_seed(5)
    shape = {"n_positions": 8, "num_slots": 8, "n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 16}
    model = GPTBLMHeadModel(GPTBConfig(dropout=0.0, **shape)).train().to(device, PRECISIONS[precision])
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros((STEPS, lanes), dtype=torch.int64, device=device)
    reset, state = torch.zeros_like(ids, dtype=torch.bool), model.empty_state(lanes)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = WindowObjective(model, recompute)(ids, ids, reset, state)
    value_bytes = PRECISIONS[precision].itemsize
    formula = kept_bytes(model.config, value_bytes).kept(lanes, STEPS, recompute)
    # This device has no fused kernel for attention. PyTorch's plain one keeps queries, keys, values and shares of its
    # own, in float32, instead of the projections' result and a number a head.
    slots, width, heads, blocks = (shape[key] for key in ("num_slots", "n_embd", "n_head", "n_layer"))
    plain = 4 * (3 * width + heads * slots) - (3 * width * value_bytes + 4 * heads)
    return {
        "kept": sum(kept.values()),
        "formula": formula + lanes * STEPS * blocks * slots * plain,
        "loss": float(loss.detach()),
    }


def main(cases: list[str]) -> None:
    torch.set_num_threads(1)
    world = join(60)
    gc.freeze()  # each engine's start collects garbage, and would go through all that was imported
    for asked in cases:
        case = asked.removesuffix("!")
        numbers, _, family = case.partition("@")
        stage, precision, recompute, groups, *variant = numbers.split(":")
        try:
            if stage == "window":
                found = run_window(world.device, precision, recompute, family)
            elif stage == "kept":
                found = run_kept(world.device, precision, int(recompute), int(groups))
            elif stage == "sample":
                found = run_sample(world.device, precision, int(groups))
            else:
                found = run(world, asked != case, int(stage), precision, recompute, int(groups), family, *variant)
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps({"case": case} | found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
