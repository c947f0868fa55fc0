"""What is a state worth on text? GPTB, its twin without a state, GPT-2 and an LSTM on the Python standard library.

    python launch/experiments/text.py --out runs/text --device cuda --workers 3

trains models of about the same size for the same number of tokens through `gptb-ds train`, and appends a line to
OUT/results.jsonl for each: held-out bits per byte, by position in the document too, parameters, FLOPs of a token, and
seconds. Started again, it goes on where it stopped. Every model is run at the same learning rates with seed 0, and at
its best one with the other seeds. `--source FILE` takes a text of your own, `--tokenizer bpe:4096` reads it in pieces
of words; `--small` fits a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from side_by_side import Cell, Line, Results, parameters_of, run_cells

SEEDS, RATES = (0, 1, 2), (3e-3, 1e-3, 1e-2)
PIECE = 2048  # tokens of a document, in training and when it is scored
SHAPE: Line = {"model.n_layer": 4, "model.n_embd": 128, "model.n_head": 4, "model.num_slots": 8}
COLUMNS: Line = {"data.lanes": 256, "data.window": 32, "train.precision": "fp32"}
SMALL: Line = {"model.n_layer": 2, "model.n_embd": 64, "model.n_head": 2, "data.lanes": 64, "data.window": 16}
MODELS: dict[str, Line] = {
    "GPTB, 4 recent tokens": {"model.recent_tokens": 4},
    "its twin without a state": {"model.recent_tokens": 4, "model.carry": "nothing"},
    "GPT-2": {"model.kind": "gpt2"},
    "LSTM": {"model.kind": "lstm"},
    "GPTB, state alone": {},
    "GPTB, state alone, shifted": {"model.carry": "shift"},
    "GPTB, 4 recent tokens, shifted": {"model.recent_tokens": 4, "model.carry": "shift"},
    "twin of 6 recent tokens": {"model.recent_tokens": 6, "model.carry": "nothing"},
    "GPTB, 6 recent tokens": {"model.recent_tokens": 6},
    # About what GPTB's blocks compute for S slots.
    "GPT-2, 8 times the tokens": {"model.kind": "gpt2"},
}


def keys_of(model: str, args: argparse.Namespace) -> Line:
    """The dotted keys of a model's run."""
    keys = SHAPE | COLUMNS | (SMALL if args.small else {}) | MODELS[model]
    if keys.get("model.kind") == "gpt2":  # as many tokens an update, in longer windows; it sees two of them
        lanes, window = keys["data.lanes"] // 4, keys["data.window"] * 4
        keys |= {"data.lanes": lanes, "data.window": window, "model.context": 2 * window}
    tokens = args.tokens * (8 if "8 times" in model else 1)
    graphs = {"train.graph": "on"} if args.device == "cuda" and "model.kind" not in keys else {}
    return keys | graphs | {
        "data.path": str(args.out / "store"),
        "data.max_document_tokens": PIECE,
        "optim.warmup_tokens": args.tokens // 20,
        "optim.beta2": 0.99,
        "train.tokens": tokens,
        "run.eval_every": 0,
        "run.eval_tokens": args.eval_tokens,
    }  # fmt: skip


def wanted(results: Results, args: argparse.Namespace) -> Iterator[Cell]:
    """First each model at one rate, then its seeds at the best of the rates that were tried, then the other rates."""
    chosen = list(MODELS)[: args.models]

    def at(model: str, rate: float, seed: int) -> Cell:
        name = {"text": args.name, "model": model, "lr": rate, "seed": seed}
        seeds = {"optim.lr": rate, "data.seed": seed, "train.seed": seed}
        return Cell(name, keys_of(model, args) | seeds, score)

    yield from (at(model, RATES[0], 0) for model in chosen)
    yield from (at(model, rate, 0) for model in chosen[:4] for rate in RATES[1:])
    for seed in SEEDS[1:]:
        yield from (at(model, best_rate(results, args.name, model), seed) for model in chosen[:4])
    yield from (at(model, rate, 0) for model in chosen[4:] for rate in RATES[1:])
    for seed in SEEDS[1:]:
        yield from (at(model, best_rate(results, args.name, model), seed) for model in chosen[4:])


def best_rate(results: Results, name: str, model: str) -> float:
    """The rate with the fewest bits per byte of those that were tried with seed 0."""
    found = {rate: results.line(text=name, model=model, lr=rate, seed=0) for rate in RATES}
    bits = {rate: line["eval_bits_per_byte"] for rate, line in found.items() if line and "eval_loss" in line}
    return min(bits, key=lambda rate: bits[rate], default=RATES[0])


def score(run: Path, made: Cell, device: str, left: float | None) -> Line:
    """Bits per byte of held-out pieces by position, read with the state carried on."""
    import torch

    from gptb_ds.data.corpus import open_corpus
    from gptb_ds.data.segments import whole_pieces
    from gptb_ds.distributed.world import World
    from gptb_ds.loading import load_any
    from gptb_ds.model.objective import WindowObjective
    from gptb_ds.state_use import Reader

    line = parameters_of(run)
    if left is not None and left < 10:
        return line
    model, _ = load_any(str(run))
    model.to(torch.device(device)).eval()
    corpus = open_corpus([made.keys["data.path"]], None, "validation")
    lanes = made.keys["data.lanes"]
    reader = Reader(WindowObjective(model).eval(), corpus, World(device=torch.device(device)), lanes, 128)
    pieces = whole_pieces(corpus, made.keys["run.eval_tokens"], PIECE)
    with torch.no_grad():
        read = reader.score(pieces, "pieces", corpus.bytes_per_target(PIECE))
    if read is None:
        return line
    by_position = [asdict(row) for row in read.by_position]
    return line | {"scored_bits_per_byte": read.bits_per_byte, "by_position": by_position}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    parser.add_argument("--source", default="stdlib", help="stdlib (the default), or a file or folder of text")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--tokens", type=int, default=6_000_000, help="training tokens of each run")
    parser.add_argument("--eval-tokens", type=int, default=400_000)
    parser.add_argument("--models", type=int, default=len(MODELS), help="only the first so many models")
    parser.add_argument("--small", action="store_true", help="two layers of width 64, for a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    args = parser.parse_args()
    started = time.monotonic()
    size = "small, " if args.small else ""
    args.name = f"{Path(args.source).name}, {args.tokenizer}, {size}{args.tokens / 1e6:g} M tokens"
    results = Results(args.out / "results.jsonl")
    if not (args.out / "store" / "store.json").exists():
        from gptb_ds.cli import main as gptb_ds

        source = ["--source", args.source, "--tokenizer", args.tokenizer, "--out", str(args.out / "store")]
        if code := gptb_ds(["prepare", *source]):
            raise SystemExit(code)
    left = None if args.seconds is None else args.seconds - (time.monotonic() - started)
    run_cells(
        lambda results: list(wanted(results, args)), results, workers=args.workers, device=args.device, seconds=left
    )


if __name__ == "__main__":
    main()
