"""How much a token teaches at 512 to 32,768 tokens an update: today's AdamW and what is to keep a wide update useful.

    python launch/experiments/batch.py --store data/stdlib --out runs/batch

trains models for the same number of tokens each through `gptb-ds train`, and appends a line to OUT/results.jsonl as
each run ends; started again, it goes on where it stopped. Each contender's learning rate is found alike, at every size
and with seed 0: twice and half the best rate so far are tried until neither is better. The best rate is then run with
the other seeds. docs/batch.md shows what came out (`--table` prints it, `--picture FILE` draws it).

    ... --model large --device cuda --workers 8      a model with ten times the weights of the demo's blocks
    ... --one-rate                                   no search: the other seeds at the first rate, or the best known
    ... --seconds 200                                stop after so long
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from side_by_side import Cell, Line, Results, run_cells

SMALL, WINDOW = 512, 8
SIZES = (512, 4096, 16384, 32768)  # tokens an update: 64 to 4,096 lanes of 8 columns
MODELS: dict[str, Line] = {
    "small": {"model.num_slots": 4, "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 64},
    "large": {"model.num_slots": 8, "model.n_layer": 3, "model.n_head": 11, "model.n_embd": 352},
}
# A first guess; the search goes on from there.
FIRST_RATE = {"small": {512: 8e-3, 4096: 16e-3, 16384: 16e-3, 32768: 16e-3}}
FIRST_RATE["large"] = {size: rate / 4 for size, rate in FIRST_RATE["small"].items()}
RATES = tuple(1e-3 * 2**power for power in range(-2, 7))
LABELS = {
    "adamw": "AdamW",
    "half-life": "AdamW, half-lives in tokens",
    "warm-up": "AdamW, batch warm-up",
    "muon": "Muon",
    "both": "Muon, batch warm-up",
    "stagger": "AdamW, lanes out of step",
    "late": "Muon, merging late, rate by root, lanes out of step",
}
# The last updates of a phase, as shares of the run; the phases make updates of 512, then 2,048, then 8,192 tokens.
MERGES = {"warm-up": (0.4, 0.6, 0.8), "both": (0.4, 0.6, 0.8), "late": (0.6, 0.8, 0.9)}


def settings(contender: str, size: int) -> Line:
    """What a contender sets."""
    over: Line = {"data.stagger": "off"}
    if contender == "half-life":
        # AdamW's 0.95 as it is at 1,024 tokens an update. 0.9 stays, as 2507.07101 has it.
        over["optim.beta2_half_life"] = 14_000
    if contender in ("muon", "both", "late"):
        over["optim.name"] = "muon"
    if contender == "stagger":
        over["data.stagger"] = "on"
    if contender == "late":
        # The narrow run's rate, which grows with the root of an update's tokens.
        over |= {"data.stagger": "on", "optim.lr_scaling": "sqrt", "optim.lr_tokens": SMALL}
    if contender in MERGES and size > SMALL:
        most = size // SMALL
        phases = zip((most, max(1, most // 4), max(1, most // 16)), MERGES[contender], strict=True)
        over["train.updates_per_window"] = [*(f"{n}:{share:.0%}" for n, share in phases if n > 1), "1"]
    return over


def keys(name: Line, store: str) -> Line:
    """The dotted keys of one run."""
    tokens = name["tokens"]
    return {
        **MODELS[name["model"]],
        "data.path": store,
        "data.lanes": name["size"] // WINDOW,
        "data.window": WINDOW,
        "train.precision": "fp32",
        "data.seed": name["seed"],
        "data.max_document_tokens": 128,  # so that 4,096 lanes read whole pieces within the budget
        "optim.lr": name["lr"],
        "optim.warmup_tokens": tokens // 20,
        "train.tokens": tokens,
        "train.seed": name["seed"],
        "run.eval_every": 0,
        "run.eval_tokens": 65_536,
    } | settings(name["contender"], name["size"])


def score(run: Path, made: Cell, device: str, left: float | None) -> Line:
    """Seconds of the updates alone, and of this process on its processor, which other processes don't prolong."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    spent, before = 0.0, 0
    for line in lines:
        if "loss" in line:
            spent += (line["tokens"] - before) / line["tokens_per_second"]
            before = line["tokens"]
    return {"update_seconds": round(spent, 1), "cpu_seconds": round(time.process_time(), 1)}


class Cells:
    """The runs of one model and number of tokens: which are wanted, and what those that were made have shown."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self._args, self._results = args, results
        self.title = f"{args.model} model, {args.tokens / 1e6:.2f} M tokens each, best rate of each"
        self._sizes = [size for size in (32768, 512, 4096, 16384) if size in args.sizes]

    def wanted(self) -> list[Cell]:
        """The runs to make, the first ones first: those that answer the question at its two ends before the others."""
        return [
            Cell(name, keys(name, self._args.store), score)
            for name in self._names()
            if name["contender"] in self._args.contenders
        ]

    def _names(self) -> Iterator[Line]:
        pairs = self.pairs()
        ends = [pair for pair in pairs if pair[1] in (SMALL, 32768) and pair[0] not in ("half-life", "stagger")]
        rest = [pair for pair in pairs if pair not in ends]
        middle = [pair for pair in rest if pair[1] == 16384]
        yield from self._first_rates(ends)
        yield from self._first_rates([pair for pair in rest if pair not in middle])
        for pair in ends:
            yield from self._near_the_best(*pair)
        yield from self._other_seeds(ends)
        yield from self._first_rates(middle)
        for pair in rest:
            yield from self._near_the_best(*pair)
        yield from self._other_seeds(rest)

    def _first_rates(self, pairs: list[tuple[str, int]]) -> Iterator[Line]:
        for contender, size in pairs:
            rate = FIRST_RATE[self._args.model][SMALL if contender == "late" else size]
            yield self._name(contender, size, rate, 0)

    def _other_seeds(self, pairs: list[tuple[str, int]]) -> Iterator[Line]:
        for seed in range(1, self._args.seeds):
            for contender, size in pairs:
                settled = self.settled_rate(contender, size)
                if settled is not None:
                    yield self._name(contender, size, settled, seed)

    def pairs(self) -> list[tuple[str, int]]:
        """(contender, size) in the order of their worth; at 512 tokens there is nothing to merge."""
        order = [(contender, size) for size in self._sizes for contender in LABELS]
        return [pair for pair in order if not (pair[1] == SMALL and pair[0] in ("warm-up", "both"))]

    def _name(self, contender: str, size: int, lr: float, seed: int) -> Line:
        name = {"model": self._args.model, "contender": contender, "size": size, "lr": lr, "seed": seed}
        return name | {"tokens": self._args.tokens}

    def rates(self, contender: str, size: int) -> dict[float, float]:
        """Bits per byte by the rates that were tried with seed 0; infinity where the run diverged."""
        found = {}
        for rate in RATES:
            line = self._results.line(**self._name(contender, size, rate, 0))
            if line is not None:
                found[rate] = line.get("eval_bits_per_byte") or float("inf")
        return found

    def best_rate(self, contender: str, size: int) -> float | None:
        """Of those that were tried; None: none was."""
        found = self.rates(contender, size)
        return min(found, key=lambda rate: found[rate]) if found else None

    def settled_rate(self, contender: str, size: int) -> float | None:
        """The best rate, once its neighbours were tried too (`--one-rate`: the best of those that were)."""
        if not self._args.one_rate and list(self._near_the_best(contender, size)):
            return None
        return self.best_rate(contender, size)

    def _near_the_best(self, contender: str, size: int) -> Iterator[Line]:
        best = self.best_rate(contender, size)
        if best is None or self._args.one_rate:
            return
        at = RATES.index(best)
        for rate in RATES[max(0, at - 1) : at + 2]:
            if rate not in self.rates(contender, size):
                yield self._name(contender, size, rate, 0)

    def lines(self, contender: str, size: int) -> list[Line]:
        """The lines of the best rate, one for each seed."""
        rate = self.best_rate(contender, size)
        if rate is None:
            return []
        names = [self._name(contender, size, rate, seed) for seed in range(self._args.seeds)]
        lines = [line for name in names if (line := self._results.line(**name)) is not None]
        return [line for line in lines if line.get("eval_bits_per_byte") is not None]

    def table(self) -> str:
        """Markdown: mean bits per byte over the seeds, half their range, updates made, seconds, and the best rate."""
        rows = ["| | " + " | ".join(f"{size:,} tokens an update" for size in SIZES) + " |", "| --- " * 5 + "|"]
        for contender, label in LABELS.items():
            row = [self._entry(contender, size) for size in SIZES]
            if any(row):
                rows.append("| " + " | ".join([label, *row]) + " |")
        return "\n".join(rows)

    def _entry(self, contender: str, size: int) -> str:
        lines = self.lines(contender, size)
        if not lines:
            return ""
        bits = [line["eval_bits_per_byte"] for line in lines]
        half = f" ±{(max(bits) - min(bits)) / 2:.3f} ({len(bits)} seeds)" if len(bits) > 1 else ""
        key = {"cpu": "cpu_seconds", "cuda": "update_seconds"}
        spent = [line[key[line["device"]]] for line in lines if key[line["device"]] in line]
        seconds = f" {statistics.median(spent):.0f} s;" if spent else ""
        rate = f"{lines[0]['name']['lr']:g} of {len(self.rates(contender, size))}"
        return f"**{statistics.mean(bits):.2f}**{half}; {lines[0]['updates']:,} updates;{seconds} {rate}"


def picture(cells: list[Cells], path: Path) -> None:
    """Bits per byte over the tokens of an update, a line for each contender, side by side for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, parts = pyplot.subplots(1, len(cells), figsize=(6.4 * len(cells), 4.8), squeeze=False)
    for axes, one in zip(parts[0], cells, strict=True):
        for number, (contender, label) in enumerate(LABELS.items()):
            found = {size: [line["eval_bits_per_byte"] for line in one.lines(contender, size)] for size in SIZES}
            sizes = [size for size in SIZES if found[size]]
            if not sizes:
                continue
            axes.plot(
                sizes,
                [statistics.mean(found[size]) for size in sizes],
                marker="osD^vPX"[number],
                label=label,
                color=f"C{number}",
            )
            for size in sizes:
                axes.plot([size] * len(found[size]), found[size], "k_", markersize=6)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(SIZES), [f"{size:,}" for size in SIZES])
        axes.set_xlabel("tokens an update (of a whole window)")
        axes.set_ylabel("held-out bits per byte")
        axes.set_title(one.title)
        axes.grid(alpha=0.3)
    handles, labels = parts[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=100)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="data/stdlib", help="made by `gptb-ds prepare --source stdlib`")
    parser.add_argument("--out", type=Path, default=Path("runs/batch"))
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--tokens", type=int, default=655_360, help="training tokens of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--one-rate", action="store_true", help="search no rates: seeds of the first one, or of the best so far"
    )
    parser.add_argument("--contenders", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=list(SIZES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, train nothing")
    parser.add_argument("--picture", type=Path, help="draw what is there of all models, train nothing")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    results = Results(args.out / "results.jsonl")
    cells = Cells(args, results)
    if args.picture:
        all_args = [argparse.Namespace(**vars(args) | {"model": model}) for model in MODELS]
        models = [one for one in (Cells(a, results) for a in all_args) if any(one.lines(*p) for p in one.pairs())]
        picture(models, args.picture)
    elif not args.table:
        run_cells(lambda _: cells.wanted(), results, workers=args.workers, device=args.device, seconds=args.seconds)
    print(cells.table())


if __name__ == "__main__":
    main()
