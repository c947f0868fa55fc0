"""The speed of one training window: `python tests/benchmarks/bench_step.py --help`.

Prints tokens/s of forward and backward (head and loss included, no optimizer), all contenders in turn, in one run:

- the original's loop: transformers' GPT2Model called for each column, the head and the loss in each step;
- our window, plain, compiled, and with recomputation;
- GPT-2's blocks over as many rows, not recurrent, in several micro-batches; `tax` is our time over that of the best of
  them (above 1: slower);
- a product of the widest matrix and the slots of all lanes: the rate that `share` is a share of.

Axes: B lanes, K steps, S slots, E embedding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from math import isqrt

import torch
import torch.nn.functional as F
from transformers import GPT2Model
from transformers.activations import ACT2FN

from gptb_ds import GPTBConfig, GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.flops import flops_per_token

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PRODUCTS = 20  # measured at once
Window = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Run = Callable[[], None]


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    shape = {name: getattr(args, name) for name in ("embd", "layers", "heads", "slots", "lanes", "window", "vocab")}
    print(f"{device.type}, {args.threads} threads, " + ", ".join(f"{name} {value}" for name, value in shape.items()))
    for precision in args.precision:
        rows = measure_precision(args, device, DTYPES[precision])
        for row in rows:
            print(
                f"{precision} {row['contender']:32s} {row['tokens_per_second']:10,.0f} tokens/s"
                f"  x{row['times_loop']:.2f}  tax {row['tax']:.2f}  share {row['share']:.0%}",
                flush=True,
            )
            if args.out:
                facts = {"benchmark": "step", "device": device.type, "threads": args.threads, "precision": precision}
                with open(args.out, "a") as file:
                    file.write(json.dumps(facts | shape | row) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = {"embd": 128, "layers": 2, "heads": 4, "slots": 8, "lanes": 64, "window": 16, "vocab": 257}
    for name, default in (shapes | {"rounds": 7, "threads": 2}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--more", action="store_true", help="other kinds of attention and activation too")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further round after so long, a precision")
    parser.add_argument("--out", help="append a line of JSON for each contender to this file")
    return parser.parse_args()


def measure_precision(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, object]]:
    window = make_window(args, device)
    runs = {"the original's loop": original_run(args, window, dtype), "window": window_run(args, window, dtype)}
    runs["window, recomputed"] = window_run(args, window, dtype, recompute=isqrt(args.window))
    if not args.no_compile:
        runs["window, compiled"] = window_run(args, window, dtype, compiled=True)
        runs["window, compiled, recomputed"] = window_run(
            args, window, dtype, compiled=True, recompute=isqrt(args.window)
        )
    if args.more:
        runs["window, sdpa"] = window_run(args, window, dtype, kind="sdpa")
        # Another function than GPT-2's, for who trains from nothing and wants to know its price.
        runs["window, erf GELU"] = window_run(args, window, dtype, activation="gelu")
    rows = args.lanes * args.window
    blocks = [f"GPT-2's blocks, {m} rows at once" for m in sorted({min(16, rows), args.lanes, rows})]
    runs |= {name: blocks_run(args, window, dtype, int(name.split()[2])) for name in blocks}
    seconds, rate = measure(runs, device, dtype, args)
    flops = flops_per_token(make_model(args, dtype, device)) * rows
    best_blocks = min(seconds[name] for name in blocks)
    return [
        {
            "contender": name,
            "tokens_per_second": rows / taken,
            "times_loop": seconds["the original's loop"] / taken,
            "tax": taken / best_blocks,
            "share": flops / taken / rate,
            "matmul_gflops": rate / 1e9,
        }
        for name, taken in seconds.items()
    ]


def make_window(args: argparse.Namespace, device: torch.device) -> Window:
    """Ids, targets and resets, (K, B) each."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.window, args.lanes)
    ids, targets = (torch.randint(args.vocab, shape, generator=generator).to(device) for _ in range(2))
    reset = (torch.rand(shape, generator=generator) < 0.01).to(device)
    return ids, targets, reset


def make_model(
    args: argparse.Namespace,
    dtype: torch.dtype,
    device: torch.device,
    kind: str | None = None,
    activation: str = "gelu_new",
) -> GPTBLMHeadModel:
    torch.manual_seed(0)
    shape = {"n_embd": args.embd, "n_layer": args.layers, "n_head": args.heads, "n_positions": args.slots}
    options = {"num_slots": args.slots, "dropout": 0.0, "activation_function": activation}
    options |= {"attn_implementation": kind} if kind else {}
    return GPTBLMHeadModel(GPTBConfig(vocab_size=args.vocab, **options, **shape)).to(device, dtype).train()


def window_run(
    args: argparse.Namespace,
    window: Window,
    dtype: torch.dtype,
    *,
    kind: str | None = None,
    compiled: bool = False,
    recompute: int = 0,
    activation: str = "gelu_new",
) -> Run:
    """What the trainer computes."""
    model = make_model(args, dtype, window[0].device, kind, activation)
    if compiled:
        model.compile_step()
    objective, state_BSE = WindowObjective(model, recompute), model.empty_state(args.lanes)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        objective(*window, state_BSE)[0].backward()

    return run


def gpt2_of(model: GPTBLMHeadModel) -> GPT2Model:
    """The model's backbone as transformers builds GPT-2."""
    backbone = model.transformer
    backbone.config.is_causal = False
    for block in backbone.h:
        block.mlp.act = ACT2FN["gelu_new"]
    return backbone


def original_run(args: argparse.Namespace, window: Window, dtype: torch.dtype) -> Run:
    """The recurrence as the original computes it: transformers' own model, head and loss for every column."""
    model = make_model(args, dtype, window[0].device, "eager")
    backbone = gpt2_of(model)
    ids_KB, targets_KB, reset_KB = window

    def run() -> None:
        model.zero_grad(set_to_none=True)
        initial_SE = backbone.initial_embeds
        state_BSE, loss = initial_SE.expand(args.lanes, -1, -1), torch.zeros((), device=ids_KB.device)
        for ids_B, targets_B, reset_B in zip(ids_KB, targets_KB, reset_KB, strict=True):
            state_BSE = torch.where(reset_B[:, None, None], initial_SE, state_BSE)
            x_BSE = torch.cat((state_BSE, backbone.wte(ids_B[:, None])), dim=1)
            y_BSE = GPT2Model.forward(backbone, inputs_embeds=x_BSE, use_cache=False).last_hidden_state
            loss = loss + F.cross_entropy(model.lm_head(y_BSE[:, -1]).float(), targets_B, reduction="sum")
            state_BSE = y_BSE[:, :-1]
        loss.backward()

    return run


def blocks_run(args: argparse.Namespace, window: Window, dtype: torch.dtype, at_once: int) -> Run:
    """GPT-2 over K*B independent rows of S positions, so many at once; head and loss on the last position."""
    model = make_model(args, dtype, window[0].device, "eager" if window[0].device.type == "cpu" else "sdpa")
    backbone = gpt2_of(model)
    targets_R = window[1].flatten()
    x_RSE = torch.randn(len(targets_R), args.slots, args.embd, device=targets_R.device).to(dtype)
    pieces = list(zip(x_RSE.split(at_once), targets_R.split(at_once), strict=True))

    def run() -> None:
        model.zero_grad(set_to_none=True)
        for x, targets in pieces:
            y = GPT2Model.forward(backbone, inputs_embeds=x, use_cache=False).last_hidden_state
            F.cross_entropy(model.lm_head(y[:, -1]).float(), targets, reduction="sum").backward()

    return run


def measure(
    runs: dict[str, Run], device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> tuple[dict[str, float], float]:
    """Least seconds of each, and the best rate of the product in FLOP/s, taken turn by turn.

    The least is what the work costs when nothing else disturbs it.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    rows, best_product, began = args.lanes * args.slots, float("inf"), time.perf_counter()
    # One thread's own time does not count what else runs on the machine.
    clock = time.process_time if device.type == "cpu" and args.threads == 1 else time.perf_counter
    x_RE = torch.ones(rows, args.embd, dtype=dtype, device=device)
    weight = torch.ones(args.embd, 4 * args.embd, dtype=dtype, device=device)

    def products() -> None:
        for _ in range(_PRODUCTS):
            x_RE @ weight

    for turn in range(args.rounds + 2):
        if turn > 2 and time.perf_counter() - began > args.seconds:
            break
        best_product = min(best_product, _taken(products, clock, device) / _PRODUCTS)
        for name, run in runs.items():
            taken = _taken(run, clock, device)
            if turn >= 2:  # the first turns warm up and compile
                times[name].append(taken)
    return {name: min(values) for name, values in times.items()}, 8.0 * rows * args.embd**2 / best_product


def _taken(run: Run, clock: Callable[[], float], device: torch.device) -> float:
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
