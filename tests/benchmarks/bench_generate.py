"""The speed and memory of `generate`: `python tests/benchmarks/bench_generate.py --help`.

Tokens/s and the cache's bytes at several positions, for a GPTB, and beside it transformers' GPT-2 and Llama of the same
size with their KV caches, turn by turn in one run. The GPTB reads its way to a position, as long as `--seconds` allow
it, and says how its memory grew meanwhile; beyond that its state is used as if it stood there, for a state has one
size. The others are handed caches of that length, filled with noise. Then assisted decoding (prompt lookup, and a small
GPTB) beside plain, with models trained on this Python's own sources.

Every figure is printed, and written to `--out` as a line of JSON, as soon as it is known.

Axes: B lanes, T tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gptb_ds import GPTBConfig, GPTBLMHeadModel
from gptb_ds.model import GPTBCache
from gptb_ds.model.objective import WindowObjective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENDLESS: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}


class Report:
    """Prints figures and writes them, as they come."""

    def __init__(self, out: str | None, seconds: float) -> None:
        self._out, self._end = out, time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def add(self, text: str, **figures: object) -> None:
        print(text, flush=True)
        if self._out:
            with open(self._out, "a") as file:
                file.write(json.dumps(figures) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = {"embd": 128, "layers": 4, "heads": 4, "slots": 8, "vocab": 2048}
    for name, default in (shapes | {"rounds": 3, "new-tokens": 48, "threads": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 10_000, 100_000])
    parser.add_argument("--train-seconds", type=float, default=20, help="0: no assisted decoding")
    parser.add_argument("--seconds", type=float, default=600, help="stop reading further when so many are over")
    parser.add_argument("--precision", default="fp32", choices=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="a file for the figures, a line of JSON each")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    report = Report(args.out, args.seconds)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    report.add(
        f"{where}, {args.precision}: E={args.embd} blocks={args.layers} S={args.slots} vocabulary={args.vocab}",
        what="setting",
        where=where,
        **{key: value for key, value in vars(args).items() if key != "out"},
    )
    by_position(args, report)
    if args.train_seconds:
        assisted(args, report)


# By position


def by_position(args: argparse.Namespace, report: Report) -> None:
    gptb, *others = (model.to(args.device, DTYPES[args.precision]).eval() for model in same_size(args))
    cache, caches = GPTBCache(), {}
    for position in sorted(args.positions):  # before the others' caches are there, which would hide what reading takes
        read_up_to(position, gptb, cache, args, report)
        caches[position] = cache.copy()
    for position, cache in caches.items():
        turns: dict[str, Callable[[], int]] = {"GPTB": turn(gptb, cache.copy, position, args)}
        bytes_of = {"GPTB": sum(m.state_BSE.nbytes for m in cache.layer.moments)}
        for model in others:
            name = "GPT-2" if isinstance(model, GPT2LMHeadModel) else "Llama"
            filled = noise(model, position)
            turns[name] = turn(model, cropped(filled, position), position, args)
            bytes_of[name] = sum(layer.keys.nbytes + layer.values.nbytes for layer in filled.layers)
        speeds = alternate(turns, args.rounds)
        for name, speed in speeds.items():
            ratio = speeds["GPTB"] / speed
            text = f"position {position:>7,} {name:6s} {speed:9,.1f} tokens/s, cache {bytes_of[name] / 2**20:9.3f} MiB"
            report.add(
                text + ("" if name == "GPTB" else f"   GPTB: {ratio:.2f} x as fast"),
                what="position",
                position=position,
                model=name,
                tokens_per_second=speed,
                cache_bytes=bytes_of[name],
                gptb_times_as_fast=ratio,
            )


def same_size(args: argparse.Namespace) -> list[PreTrainedModel]:
    """A GPTB, a GPT-2 and a Llama with blocks of the same width, depth and number of weights."""
    torch.manual_seed(0)
    shape = {"n_embd": args.embd, "n_layer": args.layers, "n_head": args.heads, "vocab_size": args.vocab}
    longest = max(args.positions) + 2 * args.new_tokens
    llama = LlamaConfig(
        hidden_size=args.embd,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=round(8 / 3 * args.embd),
        vocab_size=args.vocab,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        **ENDLESS,
    )
    gptb = GPTBLMHeadModel(GPTBConfig(num_slots=args.slots, dropout=0.0, **shape, **ENDLESS))
    return [gptb, GPT2LMHeadModel(GPT2Config(n_positions=longest, **shape, **ENDLESS)), LlamaForCausalLM(llama)]


def read_up_to(
    position: int, model: GPTBLMHeadModel, cache: GPTBCache, args: argparse.Namespace, report: Report
) -> None:
    """Reads tokens until the cache stands at `position`, in calls of 10,000; stops when the time is over."""
    begin, first = time.monotonic(), cache.layer.seen
    generator = torch.Generator().manual_seed(first)
    while (at := cache.layer.seen) < position:
        rate = (at - first) / max(1e-9, time.monotonic() - begin)
        step = min(position - at, 10_000 if rate > 1000 else 1000)
        if at > first and step / rate > report.left:
            break
        ids = torch.randint(args.vocab, (1, step), generator=generator).to(args.device)
        with torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
    read, seconds = cache.layer.seen - first, time.monotonic() - begin
    cache.layer.seen = position  # what is missing is taken as read: the state has one size
    report.add(
        f"GPTB read {read:,} tokens to position {first + read:,}: {read / seconds:,.0f} tokens/s, peak memory"
        f" {peak_memory(args.device) / 2**20:,.0f} MiB",
        what="read",
        tokens=read,
        position=first + read,
        tokens_per_second=read / seconds,
        peak_memory_bytes=peak_memory(args.device),
    )


def peak_memory(device: str) -> int:
    """Of the process on a CPU, of the device's tensors on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def noise(model: PreTrainedModel, position: int) -> DynamicCache:
    """A cache of keys and values as after `position` tokens."""
    cache = DynamicCache(config=model.config)
    heads = model.config.num_attention_heads
    shape = (1, heads, position, model.config.hidden_size // heads)
    for layer in range(model.config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def cropped(cache: DynamicCache, position: int) -> Callable[[], DynamicCache]:
    def again() -> DynamicCache:
        cache.crop(position - cache.get_seq_length())
        return cache

    return again


def turn(
    model: PreTrainedModel, cache: Callable[[], Any], position: int, args: argparse.Namespace
) -> Callable[[], int]:
    """Generates from a cache that stands at `position`; the number of tokens."""
    ids = torch.ones((1, 1), dtype=torch.int64, device=args.device)
    mask = torch.ones((1, position + 1), dtype=torch.int64, device=args.device)

    def run() -> int:
        found = model.generate(
            ids, attention_mask=mask, past_key_values=cache(), max_new_tokens=args.new_tokens, do_sample=False
        )
        if args.device == "cuda":
            torch.cuda.synchronize()
        return found.shape[1] - 1

    return run


def alternate(turns: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Tokens/s of each, the median over rounds in which all take their turn; a first round warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, run in turns.items():
            begin = time.monotonic()
            tokens = run()
            if number:
                speeds[name].append(tokens / (time.monotonic() - begin))
    return {name: median(values) for name, values in speeds.items()}


# Assisted decoding


def assisted(args: argparse.Namespace, report: Report) -> None:
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:80]
    text = b"".join(path.read_bytes() for path in sources)
    models = []
    for layers, embd in ((args.layers, args.embd), (1, max(args.heads * 8, args.embd // 4))):
        torch.manual_seed(0)
        config = GPTBConfig(
            num_slots=args.slots, n_layer=layers, n_embd=embd, n_head=args.heads, vocab_size=257, dropout=0.0, **ENDLESS
        )
        model = GPTBLMHeadModel(config).to(args.device)
        loss = train(model, text, args.train_seconds / 2)
        models.append(model.to(DTYPES[args.precision]).eval())
        report.add(
            f"trained {layers} blocks of width {embd} for {args.train_seconds / 2:.0f} s: {loss:.2f} nats a byte",
            what="trained",
            layers=layers,
            embd=embd,
            loss=loss,
        )
    large, small = models
    small.generation_config.assistant_confidence_threshold = 0
    prompts = [torch.tensor([list(path.read_bytes()[-400:])], device=args.device) for path in sources[:3]]
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "prompt lookup": {"prompt_lookup_num_tokens": 8},
        "small GPTB": {"assistant_model": small},
    }
    answers: dict[str, list[list[int]]] = {}
    speeds = alternate(
        {name: asked(large, prompts, 4 * args.new_tokens, how, answers, name) for name, how in ways.items()},
        args.rounds,
    )
    for name, speed in speeds.items():
        same = answers[name] == answers["plain"]
        report.add(
            f"assisted decoding, {name:14s} {speed:9,.1f} tokens/s, {speed / speeds['plain']:.2f} x plain"
            + ("" if same else " (other tokens than plain)"),
            what="assisted",
            how=name,
            tokens_per_second=speed,
            times_plain=speed / speeds["plain"],
            same_tokens=same,
        )


def asked(
    model: GPTBLMHeadModel,
    prompts: list[torch.Tensor],
    new: int,
    how: dict[str, Any],
    answers: dict[str, list[list[int]]],
    name: str,
) -> Callable[[], int]:
    """Reads nothing anew: each prompt but for its last token stands in a cache that is copied."""
    with torch.no_grad():
        caches = [model(ids[:, :-1]).past_key_values for ids in prompts]

    def run() -> int:
        found = [
            model.generate(ids, past_key_values=cache.copy(), max_new_tokens=new, do_sample=False, **how)
            for ids, cache in zip(prompts, caches, strict=True)
        ]
        answers[name] = [row[0].tolist() for row in found]
        return new * len(found)

    return run


def train(model: GPTBLMHeadModel, text: bytes, seconds: float, lanes: int = 64, window: int = 16) -> float:
    """Trains on lanes of bytes for so long; the loss of the last windows."""
    objective = WindowObjective(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    columns_TB = torch.tensor(list(text[: len(text) // lanes * lanes])).view(lanes, -1).t().to(model.device)
    state_BSE, losses = model.transformer.initial_embeds.detach().expand(lanes, -1, -1), []
    reset_KB = torch.zeros((window, lanes), dtype=torch.bool, device=model.device)
    end = time.monotonic() + seconds
    for first in itertools.cycle(range(0, len(columns_TB) - window, window)):
        ids, targets = columns_TB[first : first + window], columns_TB[first + 1 : first + window + 1]
        loss, state_BSE = objective(ids, targets, reset_KB, state_BSE)
        optimizer.zero_grad()
        (loss / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / targets.numel())
        if time.monotonic() > end:
            return sum(losses[-20:]) / len(losses[-20:])
    raise AssertionError


if __name__ == "__main__":
    main()
