"""What only a real GPU can show: agreement with the CPU, no waits, CUDA graphs, speed and memory. See gpu.sh.

Axes: B lanes, K steps, S slots, E embedding, V vocabulary.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import GPT2Config, GPT2Model

from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GPU = torch.device("cuda", 0)
# Dense matmul rates in bf16, FLOP/s, by a part of the card's name: what MFU is a share of.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}
BUDGET_SECONDS = 420.0
_started = time.monotonic()


def small_model(vocab: int = 61, **shape: int) -> GPTBLMHeadModel:
    torch.manual_seed(0)
    values = {"n_positions": 8, "num_slots": 8, "n_layer": 2, "n_head": 2, "n_embd": 64} | shape
    values["n_positions"] = values["num_slots"]
    return GPTBLMHeadModel(GPTBConfig(vocab_size=vocab, dropout=0.0, **values)).bfloat16().float().train()


def window(steps: int, lanes: int, vocab: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(vocab, (2, steps, lanes), generator=generator)
    reset = torch.rand((steps, lanes), generator=generator) < 0.05
    return ids.to(device), targets.to(device), reset.to(device)


def gradients(device: torch.device, dtype: torch.dtype, steps: int, **options: Any) -> dict[str, torch.Tensor]:
    model = small_model().to(device, dtype)
    loss, _ = WindowObjective(model, **options)(*window(steps, 16, 61, device), model.empty_state(16))
    (loss / (steps * 16)).backward()
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach().double().cpu() / (steps * 16)}


def error(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    names = [name for name in want if name != "loss"]
    apart = sum(float((found[n] - want[n]).square().sum()) for n in names)
    return (apart / sum(float(want[n].square().sum()) for n in names)) ** 0.5


def agreement() -> dict[str, Any]:
    """Loss and gradient of a window of 16 columns against the CPU in float64."""
    want = gradients(torch.device("cpu"), torch.float64, 16)
    rows = {}
    for name, limit in (("fp32", 1e-3), ("bf16", 3e-2), ("fp16", 1e-2)):
        found = gradients(GPU, DTYPES[name], 16)
        rows[name] = {"gradient": error(found, want), "loss": abs(float(found["loss"] - want["loss"]))}
        assert rows[name]["gradient"] < limit, f"{name}: gradients are {rows[name]['gradient']:.2e} from the CPU's"
    return rows


def long_windows() -> dict[str, Any]:
    """Relative error of bf16 gradients by K: summed by autograd, and in float32."""
    rows = {}
    for steps in (16, 128, 512, 1024):
        want = gradients(GPU, torch.float32, steps)
        plain = error(gradients(GPU, torch.bfloat16, steps, fp32_sums=False), want)
        rows[f"K={steps}"] = {"autograd": plain, "fp32 sums": error(gradients(GPU, torch.bfloat16, steps), want)}
    assert rows["K=1024"]["fp32 sums"] < 0.05, rows
    return rows


def no_waits() -> dict[str, Any]:
    """Forward and backward of a window in which any wait of the host would raise."""
    for name in ("fp32", "bf16"):
        model = small_model().to(GPU, DTYPES[name])
        objective, inputs, state = WindowObjective(model), window(8, 16, 61, GPU), model.empty_state(16)
        objective(*inputs, state)[0].backward()  # libraries are loaded in the first one
        torch.cuda.set_sync_debug_mode("error")
        try:
            objective(*inputs, state)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"fp32": "none", "bf16": "none"}


def graph() -> dict[str, Any]:
    """A whole window, forward and backward, as one CUDA graph: equal to the plain path, and its speed."""
    model = small_model(num_slots=20, n_layer=12, n_head=12, n_embd=768).to(GPU, torch.bfloat16)
    objective, inputs, state = WindowObjective(model), window(16, 64, 61, GPU), model.empty_state(64)
    parameters = list(model.parameters())

    def step() -> torch.Tensor:
        loss, _ = objective(*inputs, state)
        loss.backward()
        # Without its graph, which would keep nodes of the stream that it was made on: a capture refuses them.
        return loss.detach()

    plain_seconds = seconds(lambda: (model.zero_grad(), step()))
    model.zero_grad(set_to_none=True)
    plain_loss = step()
    plain = [p.grad.clone() for p in parameters]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        loss = step()
    captured.replay()
    torch.cuda.synchronize()
    apart = max(float((p.grad - g).abs().max()) for p, g in zip(parameters, plain, strict=True))
    assert torch.equal(loss, plain_loss), "the graph's loss differs"
    tokens = 16 * 64
    return {
        "largest difference of a gradient": apart,
        "plain tokens/s": tokens / plain_seconds,
        "graph tokens/s": tokens / seconds(captured.replay),
    }


def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Of one call, the best of a few, after one to warm up."""
    best = float("inf")
    for number in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - start)
    return best


def speed() -> dict[str, Any]:
    """124M, S=20, bf16, forward and backward, over lanes: tokens/s, MFU, memory; GPT-2's blocks on the same rows."""
    shape = {"num_slots": 20, "n_layer": 12, "n_head": 12, "n_embd": 768}
    model = small_model(50257, **shape).to(GPU, torch.bfloat16)
    plain = GPT2Model(GPT2Config(n_positions=20, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    plain = plain.to(GPU, torch.bfloat16).train()
    blocks = sum(p.numel() for p in model.transformer.h.parameters())
    peak = next((rate for name, rate in PEAKS.items() if name in torch.cuda.get_device_name(GPU)), None)
    step_flops = 6 * blocks * 20 + 12 * 12 * 20 * 20 * 768
    flops = step_flops + 6 * 768 * 50257
    rows: dict[str, Any] = {}
    for lanes, steps, recompute in ((64, 16, 0), (256, 16, 0), (1024, 16, 0), (1024, 16, 4)):
        if time.monotonic() - _started > BUDGET_SECONDS:
            break
        objective = WindowObjective(model, recompute)
        inputs, state = window(steps, lanes, 50257, GPU), model.empty_state(lanes)
        torch.cuda.reset_peak_memory_stats()

        def train(objective=objective, inputs=inputs, state=state) -> None:
            model.zero_grad(set_to_none=True)
            objective(*inputs, state)[0].backward()

        taken = seconds(train)
        memory = torch.cuda.max_memory_allocated() / 2**30
        model.zero_grad(set_to_none=True)
        x = torch.randn(lanes, 20, 768, device=GPU, dtype=torch.bfloat16)
        taken_plain = seconds(lambda x=x: plain(inputs_embeds=x).last_hidden_state.sum().backward()) * steps
        row = {
            "tokens/s": lanes * steps / taken,
            "peak GiB": memory,
            "TFLOP/s": lanes * steps * flops / taken / 1e12,
            "GPT-2 blocks TFLOP/s": lanes * steps * step_flops / taken_plain / 1e12,
        }
        if peak:
            row |= {"MFU": lanes * steps * flops / taken / peak}
        rows[f"{lanes} lanes x {steps}, recompute {recompute}"] = row
    return rows


def engine() -> dict[str, Any]:
    """Three updates under DeepSpeed and NCCL with one rank: every stage and precision against fp32 at stage 1."""
    from gptb_ds.config import OptimConfig
    from gptb_ds.data.window import Window
    from gptb_ds.distributed.join import join, leave
    from gptb_ds.training.deepspeed_policy import with_defaults
    from gptb_ds.training.engine import Engine

    world = join(120)
    rows: dict[str, Any] = {}
    for precision in ("fp32", "bf16", "fp16"):
        for stage in (0, 1, 2, 3):
            if (stage, precision) == (0, "fp16"):
                continue
            trained = Engine(
                WindowObjective(small_model(), 3),
                world,
                lanes=16,
                lane_groups=2,
                precision=precision,
                optim=OptimConfig(lr=1e-3, warmup_updates=0),
                policy=with_defaults({"zero_optimization": {"stage": stage}}),
                graph="off",
            )
            states = [trained.model.empty_state(8) for _ in range(2)]
            losses = []
            for _ in range(3):
                ids, targets, reset = window(8, 16, 61, GPU)
                parts = Window(ids, targets, reset, None).split_lanes(2)
                result, states = trained.update(list(zip(parts, states, strict=True)), 1e-3, 8 * 16)
                losses.append(result.loss)
            rows[f"stage {stage} {precision}"] = {f"loss {n}": loss for n, loss in enumerate(losses)}
            if precision != "fp16":  # fp16 skips its first updates: the loss scale starts too large
                want = rows["stage 0 fp32"]
                for key, loss in rows[f"stage {stage} {precision}"].items():
                    assert abs(loss - want[key]) < (1e-3 if precision == "fp32" else 3e-2), (stage, precision, losses)
    leave()
    return rows


def generation() -> dict[str, Any]:
    """Tokens/s of `generate`, 124M, one lane and 64."""
    model = small_model(50257, num_slots=20, n_layer=12, n_head=12, n_embd=768).to(GPU, torch.bfloat16).eval()
    rows = {}
    for lanes in (1, 64):
        ids = torch.randint(50257, (lanes, 4), device=GPU)
        taken = seconds(lambda ids=ids: model.generate(ids, max_new_tokens=64, do_sample=False), 1)
        rows[f"{lanes} lanes"] = {"tokens/s": lanes * 64 / taken}
    return rows


# The graph comes last: a capture that breaks off leaves the process unfit for more.
SECTIONS = [agreement, no_waits, long_windows, engine, speed, generation, graph]


def show(section: str, found: dict[str, Any]) -> None:
    for row, values in found.items():
        cells = values.items() if isinstance(values, dict) else [("", values)]
        text = "  ".join(f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}".strip() for name, v in cells)
        print(f"{section:<13} {row:<34} {text}", flush=True)


def main(path: str = "gpu-report.json") -> int:
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(GPU),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    os.environ.setdefault("DS_ACCELERATOR", "cuda")
    show("machine", report)
    failed = []
    for section in SECTIONS:
        name = section.__name__
        try:
            report[name] = section()
            show(name, report[name])
        except ImportError as missing:
            report[name] = {"skipped": str(missing)}
            show(name, report[name])
        except Exception:
            failed.append(name)
            report[name] = {"failed": traceback.format_exc()}
            print(f"{name:<13} FAILED\n{report[name]['failed']}", flush=True)
        report["seconds"] = time.monotonic() - _started
        with open(path, "w") as file:
            json.dump(report, file, indent=1)
    print(f"{len(SECTIONS) - len(failed)} of {len(SECTIONS)} parts passed in {report['seconds']:.0f} s; {path} written")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
