"""What is a state worth on text? GPTB, its twin without a state, GPT-2 and an LSTM on the Python standard library.

    python launch/experiments/text.py --out runs/text --device cuda --workers 7

trains models of about the same size for the same number of tokens through `gptb-ds train`, and appends a line to
OUT/results.jsonl for each: held-out bits per byte, by position in the document too, parameters, FLOPs of a token, and
seconds. Started again, it goes on where it stopped. `--parts` names what is run, in this order:

    variants   every variant of each contender, seed 0, at one rate
    rates      the best variant of each at half and twice the rate, and further as long as that is better
    seeds      the best variant at its best rate with three seeds: the headline
    equal      GPT-2 and the LSTM with as much arithmetic as GPTB: seven times its tokens or so
    longer     each contender with four times the tokens
    windows    GPTB and the LSTM with windows of 4 and 64, with as many and with four times the tokens
    grid       GPTB and its twin with another window, slots, width or depth

OUT/models gets the models of seed 0, for `long_text.py`. `--source FILE` takes a text of your own, `--tokenizer
bpe:4096` reads it in pieces of words; `--small` fits a CPU.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from side_by_side import Cell, Line, Results, parameters_of, run_cells

SEEDS = (0, 1, 2)
FIRST_RATE, RATES = 8e-3, (1e-3, 0.256)  # where the search of rates begins, and its bounds
PIECE = 2048  # tokens of a document, in training and when it is scored
SHAPE: Line = {"model.n_layer": 2, "model.n_embd": 192, "model.n_head": 4, "model.num_slots": 8}
COLUMNS: Line = {"data.lanes": 512, "data.window": 16, "train.precision": "fp32"}
# What docs/batch.md found for wide windows, in short: Muon, and smaller updates at first.
RECIPE: Line = {"optim.name": "muon", "train.updates_per_window": ["4:10%", "1"]}
SMALL: Line = {"model.n_layer": 2, "model.n_embd": 64, "model.n_head": 2, "data.lanes": 64, "data.window": 16}
WIDE = "wide"  # first weights of 1 / sqrt(width)
WIDE_START: Line = {"start": WIDE}
RECENT: Line = {"model.recent_tokens": 4}
TWIN: Line = {"model.recent_tokens": 4, "model.carry": "nothing"}
# Contender -> its variants, the first ones first.
FAMILIES: dict[str, dict[str, Line]] = {
    "GPTB": {
        "GPTB, 4 recent tokens": RECENT,
        "GPTB, 4 recent tokens, shifted": RECENT | {"model.carry": "shift"},
        "GPTB, 4 recent tokens, first weights wide": RECENT | WIDE_START,
        "GPTB, 4 recent tokens, shifted, first weights wide": RECENT | WIDE_START | {"model.carry": "shift"},
        "GPTB, state alone": {},
        "GPTB, state alone, shifted, first weights wide": WIDE_START | {"model.carry": "shift"},
        "GPTB, 6 recent tokens": {"model.recent_tokens": 6},
    },
    # A token costs about what GPT-2's does: one vector of state, no recent tokens.
    "2-slot GPTB": {"2-slot GPTB": {"model.num_slots": 2}},
    "twin": {
        "its twin without a state": TWIN,
        "its twin without a state, first weights wide": TWIN | WIDE_START,
        "twin of 6 recent tokens": TWIN | {"model.recent_tokens": 6},
    },
    "GPT-2": {
        "GPT-2": {"model.kind": "gpt2", "model.context": 256},
        "GPT-2 of 4 blocks": {"model.kind": "gpt2", "model.context": 256, "model.n_layer": 4, "width": 0.71},
        "GPT-2, context 512": {"model.kind": "gpt2", "model.context": 512},
        "GPT-2, context 128": {"model.kind": "gpt2", "model.context": 128},
        "GPT-2, context 64": {"model.kind": "gpt2", "model.context": 64},
        "GPT-2, context 32": {"model.kind": "gpt2", "model.context": 32},
    },
    "LSTM": {
        "LSTM": {"model.kind": "lstm"},
        "LSTM of 1 layer": {"model.kind": "lstm", "model.n_layer": 1, "width": 1.417},
        "LSTM, AdamW": {"model.kind": "lstm", "optim.name": "adamw"},
    },
}
# Only trials: the headline's twin has the slots of the headline's GPTB.
OTHER_SLOTS = ("GPTB, 6 recent tokens", "twin of 6 recent tokens")
MODELS: dict[str, Line] = {
    name: keys
    # The first of each family, then the second ones: in the order of their worth.
    for place in range(max(map(len, FAMILIES.values())))
    for variants in FAMILIES.values()
    for name, keys in list(variants.items())[place : place + 1]
}
# As many tokens an update, whatever the window.
GRID: dict[str, Line] = {
    "window 4": {"data.window": 4},
    "window 64": {"data.window": 64},
    "2 slots, both of state": {"model.num_slots": 2, "model.recent_tokens": 0},
    "4 slots, 2 recent tokens": {"model.num_slots": 4, "model.recent_tokens": 2},
    "16 slots, 4 recent tokens": {"model.num_slots": 16},
    "16 slots, 12 recent tokens": {"model.num_slots": 16, "model.recent_tokens": 12},
    "32 slots, 24 recent tokens": {"model.num_slots": 32, "model.recent_tokens": 24},
    "window 1": {"data.window": 1},
    "half the width": {"width": 0.5},
    "twice the width": {"width": 2.0},
    "4 blocks of as many weights": {"model.n_layer": 4, "width": 0.71},
}


def keys_of(name: Line, args: argparse.Namespace) -> Line:
    """The dotted keys of the run of this name."""
    keys = SHAPE | COLUMNS | RECIPE | (SMALL if args.small else {})
    tokens_an_update, heads = keys["data.lanes"] * keys["data.window"], keys["model.n_head"]
    keys |= {"width": 1.0, "start": 0.02} | MODELS[name["model"]] | GRID.get(name.get("change", ""), {})
    width = round(keys.pop("width") * keys["model.n_embd"] / (2 * heads)) * 2 * heads
    start = keys.pop("start")
    keys |= {"model.n_embd": width, "model.initializer_range": width**-0.5 if start == WIDE else start}
    kind = keys.get("model.kind")
    if kind == "gpt2":  # it sees two windows
        keys["data.window"] = keys["model.context"] // 2
    keys["data.lanes"] = tokens_an_update // keys["data.window"]
    graphs = {"train.graph": "on"} if args.device == "cuda" and kind is None else {}
    tokens = name.get("tokens", args.tokens)
    seeds = {"optim.lr": name["lr"], "data.seed": name["seed"], "train.seed": name["seed"]}
    return keys | graphs | seeds | {
        "data.path": str(args.out / "store"),
        "data.max_document_tokens": PIECE,
        "optim.warmup_tokens": tokens // 20,
        "train.tokens": tokens,
        "run.eval_every": 0,
        "run.eval_tokens": args.eval_tokens,
    }  # fmt: skip


class Plan:
    """Which runs are wanted, as the lines so far have it."""

    def __init__(self, results: Results, args: argparse.Namespace) -> None:
        self._results, self._args = results, args
        self._models = [model for model in MODELS if model in args.models]

    def cells(self) -> Iterator[Cell]:
        """The runs in the order of the parts, each once."""
        seen: list[Line] = []
        for part in self._args.parts:
            for name in PARTS[part](self):
                if name not in seen:
                    seen.append(name)
                    yield Cell(name, keys_of(name, self._args), score)

    def variants(self) -> Iterator[Line]:
        """Every model with seed 0 at the first rate."""
        yield from (self._run(model, FIRST_RATE) for model in self._models)

    def rates(self) -> Iterator[Line]:
        """The best variant of each contender at half and at twice the rate, and on in the direction that is better."""
        for family in FAMILIES:
            if (model := self._best_variant(family)) is not None:
                yield from self._searched(model)

    def seeds(self) -> Iterator[Line]:
        """The best of each contender, with the other seeds."""
        best = [found for family in FAMILIES if (found := self._best(family)) is not None]
        for seed in SEEDS:
            yield from (self._run(**found, seed=seed) for found in best)

    def equal(self) -> Iterator[Line]:
        """GPT-2 and the LSTM with as much arithmetic as the best GPTB: as many more tokens."""
        most = self._line_of_best_variant("GPTB")
        for family in ("GPT-2", "LSTM"):
            line = self._line_of_best_variant(family)
            if most is not None and line is not None:
                times = most["flops_per_token"] / line["flops_per_token"]
                tokens = round(times * self._args.tokens / 1e5) * 100_000
                yield self._run(line["name"]["model"], FIRST_RATE) | {"tokens": tokens}

    def longer(self) -> Iterator[Line]:
        """The best variant of each contender with four times the tokens; all of GPT-2: the best context may grow."""
        for family in FAMILIES:
            if (best := self._best_variant(family)) is not None:
                rest = [m for m in self._models if m in FAMILIES[family] and m != best] if family == "GPT-2" else []
                for model in (best, *rest):
                    yield self._run(model, FIRST_RATE) | {"tokens": 4 * self._args.tokens}

    def windows(self) -> Iterator[Line]:
        """GPTB and the LSTM, whose gradients end with a window, with other windows; with four times the tokens, too."""
        for family in ("LSTM", "GPTB"):
            if (model := self._best_variant(family)) is not None:
                other = [self._run(model, FIRST_RATE) | {"change": change} for change in ("window 4", "window 64")]
                yield from other
                yield from (name | {"tokens": 4 * self._args.tokens} for name in other)

    def grid(self) -> Iterator[Line]:
        """One thing changed in the first GPTB, and in its twin."""
        for change in self._args.changes:
            for family in ("GPTB", "twin"):
                yield self._run(next(iter(FAMILIES[family])), FIRST_RATE) | {"change": change}

    def _run(self, model: str, lr: float, seed: int = 0) -> Line:
        return {"text": self._args.name, "model": model, "lr": lr, "seed": seed}

    def _bits(self, name: Line) -> float | None:
        """Bits per byte of this run; infinite where it diverged; None as long as it is to come."""
        if (line := self._results.line(**name)) is not None:
            return line.get("eval_bits_per_byte", float("inf"))
        return float("inf") if self._results.has_ended(name) else None

    def _best_variant(self, family: str) -> str | None:
        """The variant with the fewest bits per byte at the first rate; None as long as one is to come."""
        models = [m for m in self._models if m in FAMILIES[family] and m not in OTHER_SLOTS]
        bits = {model: self._bits(self._run(model, FIRST_RATE)) for model in models}
        known = {model: value for model, value in bits.items() if value is not None}
        return min(known, key=known.__getitem__) if known and len(known) == len(bits) else None

    def _line_of_best_variant(self, family: str) -> Line | None:
        model = self._best_variant(family)
        return None if model is None else self._results.line(**self._run(model, FIRST_RATE))

    def _searched(self, model: str) -> Iterator[Line]:
        """The runs of this model at the first rate times powers of two, until a rate has a worse one on either side."""
        for factor in (2.0, 0.5):
            rate = FIRST_RATE
            while RATES[0] <= rate * factor <= RATES[1]:
                here, rate = self._bits(self._run(model, rate)), rate * factor
                yield self._run(model, rate)
                there = self._bits(self._run(model, rate))
                if here is None or there is None or there >= here:
                    break

    def _best(self, family: str) -> Line | None:
        """Model and rate with the fewest bits per byte; None until the search is over."""
        if (model := self._best_variant(family)) is None:
            return None
        names = [self._run(model, FIRST_RATE), *self._searched(model)]
        bits = {name["lr"]: self._bits(name) for name in names}
        known = {rate: value for rate, value in bits.items() if value is not None}
        return {"model": model, "lr": min(known, key=known.__getitem__)} if len(known) == len(bits) else None


PARTS = {
    "variants": Plan.variants,
    "rates": Plan.rates,
    "seeds": Plan.seeds,
    "equal": Plan.equal,
    "longer": Plan.longer,
    "windows": Plan.windows,
    "grid": Plan.grid,
}


def wanted(results: Results, args: argparse.Namespace) -> Iterator[Cell]:
    """The runs to make, the first ones first."""
    return Plan(results, args).cells()


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
    if made.name["seed"] == 0 and "change" not in made.name and made.keys.get("model.kind") != "lstm":
        _keep_model(run, made)
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


def _keep_model(run: Path, made: Cell) -> None:
    """The model beside the results, whose folder is two above the run's."""
    from gptb_ds.export import ExportOptions, export

    name = "".join(
        c if c.isalnum() else "-" for c in f"{made.name['text']} {made.name['model']} lr {made.name['lr']:g}"
    )
    folder = run.parent.parent / "models" / (name + ("-longer" if "tokens" in made.name else ""))
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    export(ExportOptions(str(run), str(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    parser.add_argument("--source", default="stdlib", help="stdlib (the default), or a file or folder of text")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="training tokens of a run")
    parser.add_argument("--eval-tokens", type=int, default=400_000)
    parser.add_argument(
        "--changes", nargs="+", choices=GRID, default=list(GRID), help="of the grid, only these", metavar="NAME"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is run, in this order")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="only these", metavar="NAME")
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
        lambda results: list(wanted(results, args)),
        results,
        workers=args.workers,
        device=args.device,
        seconds=left,
        least_seconds=60.0,
    )


if __name__ == "__main__":
    main()
