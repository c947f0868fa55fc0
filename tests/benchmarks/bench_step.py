"""The speed of one training window of the model: `python tests/benchmarks/bench_step.py --help`.

Prints tokens/s of forward and backward (head and loss included, no optimizer) for ways to run the same step, each as
a ratio to transformers' own GPT2Model.forward called once per token, all measured in this run, turn by turn.

Axes: B lanes, K steps, S slots, E embedding.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import GPT2Model
from transformers.activations import ACT2FN

from gptb_ds import GPTBConfig, GPTBLMHeadModel

Window = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    window = make_window(args, device)
    runs: dict[str, Callable[[], None]] = {}
    for precision in args.precision:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        runs[f"GPT2Model.forward a step, {precision}"] = naive_run(args, window, dtype)
        for kind in ("eager", "sdpa"):
            runs[f"lean step, {kind}, {precision}"] = lean_run(args, window, dtype, kind)
        # Another function than GPT-2's, for who trains from nothing and wants to know its price.
        runs[f"lean step, eager, erf GELU, {precision}"] = lean_run(args, window, dtype, "eager", activation="gelu")
        if not args.no_compile:
            runs[f"compiled step, eager, {precision}"] = lean_run(args, window, dtype, "eager", compiled=True)
    print(f"{device.type}, {args.threads} threads, E={args.embd} blocks={args.layers} S={args.slots}", end="")
    print(f" lanes={args.lanes} K={args.window} vocabulary={args.vocab}")
    seconds = measure(runs, device, args.rounds)
    base = next(iter(seconds.values()))
    for name, value in seconds.items():
        print(f"{name:36s} {args.lanes * args.window / value:10,.0f} tokens/s  x{base / value:.2f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = {"embd": 128, "layers": 2, "heads": 4, "slots": 8, "lanes": 64, "window": 16, "vocab": 257}
    for name, default in (shapes | {"rounds": 7, "threads": 2}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def make_window(args: argparse.Namespace, device: torch.device) -> Window:
    generator = torch.Generator().manual_seed(0)
    shape = (args.lanes, args.window)
    ids, targets = (torch.randint(args.vocab, shape, generator=generator).to(device) for _ in range(2))
    reset = (torch.rand(shape, generator=generator) < 0.01).to(device)
    return ids, targets, reset


def make_model(
    args: argparse.Namespace, dtype: torch.dtype, device: torch.device, kind: str, activation: str = "gelu_new"
) -> GPTBLMHeadModel:
    torch.manual_seed(0)
    shape = {"n_embd": args.embd, "n_layer": args.layers, "n_head": args.heads, "n_positions": args.slots}
    config = GPTBConfig(
        vocab_size=args.vocab,
        num_slots=args.slots,
        dropout=0.0,
        attn_implementation=kind,
        activation_function=activation,
        **shape,
    )
    return GPTBLMHeadModel(config).to(device, dtype)


def lean_run(
    args: argparse.Namespace,
    window: Window,
    dtype: torch.dtype,
    kind: str,
    compiled: bool = False,
    activation: str = "gelu_new",
) -> Callable[[], None]:
    model = make_model(args, dtype, window[0].device, kind, activation)
    if compiled:
        model.compile_step()
    ids, targets, reset = window

    def run() -> None:
        model.zero_grad(set_to_none=True)
        logits = model(ids, reset=reset, use_cache=False).logits.float()
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    return run


def naive_run(args: argparse.Namespace, window: Window, dtype: torch.dtype) -> Callable[[], None]:
    """The recurrence in the plainest way: transformers' own model, called once for every column."""
    model = make_model(args, dtype, window[0].device, "sdpa")
    backbone = model.transformer
    backbone.config.is_causal = False
    for block in backbone.h:
        block.mlp.act = ACT2FN["gelu_new"]  # what transformers builds for GPT-2
    ids, targets, reset = window

    def run() -> None:
        model.zero_grad(set_to_none=True)
        initial = backbone.initial_embeds
        state, hidden = initial.expand(args.lanes, -1, -1), []
        for k in range(args.window):
            state = torch.where(reset[:, k, None, None], initial, state)
            x = torch.cat((state, backbone.wte(ids[:, k : k + 1])), dim=1)
            y = GPT2Model.forward(backbone, inputs_embeds=x, use_cache=False).last_hidden_state
            hidden.append(y[:, -1])
            state = y[:, :-1]
        logits = model.lm_head(torch.stack(hidden, dim=1)).float()
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    return run


def measure(runs: dict[str, Callable[[], None]], device: torch.device, rounds: int) -> dict[str, float]:
    """Least seconds of each, taken turn by turn: what the work costs when nothing else disturbs it."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:  # the first turns warm up and compile
                times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
