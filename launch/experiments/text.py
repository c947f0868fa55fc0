"""What is a state worth on text? GPTB, its twin without a state, GPT-2 and an LSTM on the Python standard library.

    python launch/experiments/text.py --out runs/text --device cuda --workers 7

trains models of about the same size for the same number of tokens through `gptb-ds train`, and appends a line to
OUT/results.jsonl for each: held-out bits per byte, by position in the document too, parameters, FLOPs of a token, and
seconds. Started again, it goes on where it stopped. First trials of seed 0 with a part of the tokens: the variants of
each contender, at the same learning rates. Then the headline: the best of each contender's, with all tokens and three
seeds; then GPT-2 with as much arithmetic as GPTB, and a grid of window, slots and lanes in trials. OUT/models gets the
headline's models of seed 0, for `long_text.py`.

`--source FILE` takes a text of your own, `--tokenizer bpe:4096` reads it in pieces of words; `--small` fits a CPU.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from side_by_side import Cell, Line, Results, parameters_of, run_cells

SEEDS, RATES = (0, 1, 2), (8e-3, 4e-3)  # more rates: --rates
PIECE = 2048  # tokens of a document, in training and when it is scored
SHAPE: Line = {"model.n_layer": 2, "model.n_embd": 192, "model.n_head": 4, "model.num_slots": 8}
COLUMNS: Line = {"data.lanes": 512, "data.window": 16, "train.precision": "fp32"}
# What docs/batch.md found for wide windows, in short: Muon, and smaller updates at first.
RECIPE: Line = {"optim.name": "muon", "train.updates_per_window": ["4:10%", "1"]}
SMALL: Line = {"model.n_layer": 2, "model.n_embd": 64, "model.n_head": 2, "data.lanes": 64, "data.window": 16}
WIDE_START: Line = {"model.initializer_range": 0.072}  # 1 / sqrt(192)
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
    "twin": {
        "its twin without a state": TWIN,
        "its twin without a state, first weights wide": TWIN | WIDE_START,
        "twin of 6 recent tokens": TWIN | {"model.recent_tokens": 6},
    },
    "GPT-2": {
        "GPT-2": {"model.kind": "gpt2", "model.context": 256},
        "GPT-2 of 4 blocks": {"model.kind": "gpt2", "model.context": 256, "model.n_layer": 4, "model.n_embd": 136},
        "GPT-2, context 512": {"model.kind": "gpt2", "model.context": 512},
        "GPT-2, context 128": {"model.kind": "gpt2", "model.context": 128},
    },
    "LSTM": {
        "LSTM": {"model.kind": "lstm"},
        "LSTM of 1 layer": {"model.kind": "lstm", "model.n_layer": 1, "model.n_embd": 272},
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
TUNED = 8  # so many models have their trial at every rate, the others at the first
# About what GPTB's blocks compute for S slots, in wider updates: they are still more than GPTB makes.
MORE_TOKENS, MORE_LANES = 8, 4
GRID: dict[str, Line] = {
    "window 4": {"data.window": 4, "data.lanes": 2048},
    "window 32": {"data.window": 32, "data.lanes": 256},
    "window 64": {"data.window": 64, "data.lanes": 128},
    "4 slots, 2 recent tokens": {"model.num_slots": 4, "model.recent_tokens": 2},
    "16 slots, 4 recent tokens": {"model.num_slots": 16},
    "width 96": {"model.n_embd": 96},
    "4 blocks": {"model.n_layer": 4, "model.n_embd": 136},
}


def keys_of(name: Line, args: argparse.Namespace) -> Line:
    """The dotted keys of the run of this name."""
    given = MODELS[name["model"]] | GRID.get(name.get("change", ""), {})
    keys = SHAPE | COLUMNS | RECIPE | (SMALL if args.small else {}) | given
    if args.small:
        keys |= {key: SMALL[key] for key in ("model.n_layer", "model.n_embd")}
    kind = keys.get("model.kind")
    if kind == "gpt2":  # as many tokens an update, in longer windows; it sees two of them
        if args.small:
            keys["model.context"] = 128
        window = keys["model.context"] // 2
        keys |= {"data.lanes": keys["data.lanes"] * keys["data.window"] // window, "data.window": window}
    if name.get("tokens", 0) > args.tokens and kind is not None:
        keys["data.lanes"] *= MORE_LANES
    graphs = {"train.graph": "on"} if args.device == "cuda" and kind is None else {}
    # cuDNN takes no gradient of an LSTM in eval mode, which the state's health asks for.
    health = {"run.state_health": False} if kind == "lstm" else {}
    tokens = name.get("tokens", args.tokens)
    seeds = {"optim.lr": name["lr"], "data.seed": name["seed"], "train.seed": name["seed"]}
    return keys | graphs | health | seeds | {
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
        self._models = list(MODELS)[: args.models]
        share = getattr(args, "trial_share", 4)
        self._trials = args.name if share == 1 else f"{args.name}, trials of a {share}th"
        self._trial_tokens = args.tokens // share
        self._every_rate = tuple(getattr(args, "rates", RATES))

    def cells(self) -> Iterator[Cell]:
        """The runs in the order of their worth."""
        for name in self._names():
            yield Cell(name, keys_of(name, self._args), score)

    def _names(self) -> Iterator[Line]:
        yield from (self._trial(model, self._every_rate[0]) for model in self._models)
        yield from (self._trial(model, rate) for rate in self._every_rate[1:] for model in self._models[:TUNED])
        best = {family: self.best(family) for family in FAMILIES}
        for seed in SEEDS:
            for found in best.values():
                if found is not None:
                    yield {"text": self._args.name, **found, "seed": seed}
            if seed == 0 and not getattr(self._args, "plain", False):
                for found in filter(None, (best["GPT-2"], best["LSTM"])):
                    yield {"text": self._args.name, **found, "seed": 0, "tokens": MORE_TOKENS * self._args.tokens}
        if getattr(self._args, "plain", False):
            return
        yield from self._longer(best)
        yield from self._grid(best)

    def _trial(self, model: str, rate: float) -> Line:
        """The name of a trial; one that has all tokens is a run of the headline."""
        name = {"text": self._trials, "model": model, "lr": rate, "seed": 0}
        return name if self._trials == self._args.name else name | {"tokens": self._trial_tokens}

    def best(self, family: str) -> Line | None:
        """Model and rate with the fewest bits per byte in the trials; None as long as one of them is to come."""
        models = [m for m in self._models if m in FAMILIES[family] and m not in OTHER_SLOTS]
        names = [self._trial(model, rate) for model in models for rate in self._rates(model)]
        if not all(self._results.has_ended(name) for name in names):
            return None
        bits = {
            (name["model"], name["lr"]): line["eval_bits_per_byte"]
            for name in names
            if (line := self._results.line(**name)) and "eval_bits_per_byte" in line
        }
        if not bits:
            return None
        model, rate = min(bits, key=lambda key: bits[key])
        return {"model": model, "lr": rate}

    def _rates(self, model: str) -> tuple[float, ...]:
        return self._every_rate if model in self._models[:TUNED] else self._every_rate[:1]

    def _longer(self, best: dict[str, Line | None]) -> Iterator[Line]:
        """GPTB and its twin with four times the tokens, where the time that is left lets them end."""
        for family in ("GPTB", "twin"):
            found = best[family]
            line = found and self._results.line(text=self._args.name, **found, seed=0)
            if found is None or line is None or line.get("train_seconds") is None:
                continue
            name = {"text": self._args.name, **found, "seed": 0, "tokens": 4 * self._args.tokens}
            left = getattr(self._args, "deadline", float("inf")) - time.monotonic()
            if self._results.has_ended(name) or left > 3 * line["train_seconds"]:
                yield name

    def _grid(self, best: dict[str, Line | None]) -> Iterator[Line]:
        for change in GRID:
            for family in ("GPTB", "twin"):
                if (found := best[family]) is not None:
                    yield self._trial(found["model"], found["lr"]) | {"change": change}


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
    if made.name["seed"] == 0 and "trials" not in made.name["text"] and made.keys.get("model.kind") != "lstm":
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
    parser.add_argument("--tokens", type=int, default=12_000_000, help="training tokens of each run of the headline")
    parser.add_argument("--trial-share", type=int, default=4, help="a trial has one so-manieth of the tokens")
    parser.add_argument("--eval-tokens", type=int, default=400_000)
    parser.add_argument("--models", type=int, default=len(MODELS), help="only the first so many models")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates of the trials")
    parser.add_argument("--plain", action="store_true", help="trials and headline only")
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
    args.deadline = float("inf") if left is None else time.monotonic() + left
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
