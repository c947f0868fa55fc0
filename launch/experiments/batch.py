"""How much a token teaches at 512, 4,096 and 32,768 tokens an update: today's AdamW and what is to keep it useful.

    python launch/experiments/batch.py --store data/stdlib --out runs/batch

trains small models for the same number of tokens each, and appends a line to OUT/results.jsonl for every run; started
again, it goes on where it stopped. Each contender's learning rate is found alike, at every size and with seed 0: from
0.016 on (0.008 at 512 tokens) twice and half the rate are tried until neither is better. The best rate is then run with
the other seeds. The runs are those of `gptb-ds train`, on one process; docs/batch.md shows what came out (`--table`
prints it, `--picture FILE` draws it).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZES = {512: 64, 4096: 512, 32768: 4096}  # tokens an update: lanes, of 8 columns each
SMALL = 512
FIRST_RATE = {512: 8e-3, 4096: 16e-3, 32768: 16e-3}
RATES = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3)
LABELS = {
    "adamw": "AdamW",
    "half-life": "AdamW, half-lives in tokens",
    "warm-up": "AdamW, batch warm-up",
    "muon": "Muon",
    "both": "Muon, batch warm-up",
}


def settings(contender: str, size: int, tokens: int) -> dict[str, Any]:
    """What a contender sets."""
    over: dict[str, Any] = {}
    if contender == "half-life":
        # AdamW's 0.95 as it is at 1,024 tokens an update. 0.9 stays, as 2507.07101 has it.
        over["optim.beta2_half_life"] = 14_000
    if contender in ("muon", "both"):
        over["optim.name"] = "muon"
    if contender in ("warm-up", "both"):
        # Updates of 512 tokens for two fifths of the run, then in three steps the whole window.
        most = size // SMALL
        phases = [(most, 0.4), (max(1, most // 4), 0.6), (max(1, most // 16), 0.8)]
        kept = [f"{n}:{int(share * tokens)}" for n, share in phases if n > 1]
        over["train.updates_per_window"] = [*kept, "1"]
    return over


def configuration(run: dict[str, Any], store: str, folder: Path, tokens: int) -> dict[str, Any]:
    """The dotted keys of one run."""
    return {
        "model.num_slots": 4,
        "model.n_layer": 2,
        "model.n_head": 2,
        "model.n_embd": 64,
        "data.path": store,
        "data.lanes": SIZES[run["size"]],
        "data.window": 8,
        "data.seed": run["seed"],
        "data.max_document_tokens": 128,  # so that 4,096 lanes read whole pieces within the budget
        "optim.lr": run["lr"],
        "optim.warmup_tokens": tokens // 20,
        "train.tokens": tokens,
        "train.seed": run["seed"],
        "run.dir": str(folder),
        "run.save_every": 0,
        "run.eval_every": 0,
        "run.eval_tokens": 65_536,
        "run.log_every": 10_000,
    } | settings(run["contender"], run["size"], tokens)


def train(keys: dict[str, Any], output: Path) -> None:
    """One run, in a process of its own; what it prints goes to `output`."""
    import torch

    from gptb_ds.config import load_config
    from gptb_ds.training.setup import train as train_run
    from gptb_ds.training.stop_requests import StopRequests

    torch.set_num_threads(1)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with StopRequests() as stop:
        os._exit(train_run(load_config(None, keys), stop))


def measure(run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Trains and returns the run's line."""
    folder, output = args.out / "run", args.out / "output.txt"
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    tokens = run.get("tokens", args.tokens)
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(configuration(run, args.store, folder, tokens), output)
    )
    process.start()
    process.join()
    seconds = time.monotonic() - started
    if process.exitcode != 0:
        if "not finite" in output.read_text():
            return run | {"bits_per_byte": None, "seconds": round(seconds, 1)}
        sys.exit(f"a run failed, {run}:\n{output.read_text()}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    return run | {
        "updates": len(updates),
        "tokens": updates[-1]["tokens"],
        "bits_per_byte": lines[-1]["eval_bits_per_byte"],
        "seconds": round(seconds, 1),
    }


class Results:
    """The lines of the runs made so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def bits(self, **wanted: Any) -> float | None:
        """Of the run with these keys; None when there is none, infinity when it diverged."""
        for line in self.lines:
            if all(line.get(key) == value for key, value in wanted.items()):
                return float("inf") if line["bits_per_byte"] is None else line["bits_per_byte"]
        return None

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def best_rate(self, contender: str, size: int, tokens: int) -> float | None:
        found = {
            lr: bits
            for lr in RATES
            if (bits := self.bits(contender=contender, size=size, lr=lr, seed=0, tokens=tokens)) is not None
        }
        return min(found, key=lambda lr: found[lr]) if found else None


def cells() -> list[tuple[str, int]]:
    """(contender, size) in the order that answers the most first; at 512 tokens a warm-up has nothing to do."""
    order = [(c, s) for s in (32768, 512, 4096) for c in ("adamw", "muon", "warm-up", "both", "half-life")]
    return [(c, s) for c, s in order if not (s == SMALL and c in ("warm-up", "both"))]


def runs_to_make(results: Results, seeds: int, tokens: int) -> Iterator[dict[str, Any]]:
    """The runs that are still to be made, each chosen by what came before: a first one of each cell, then the rest.

    The cells that answer the question at its two ends come before the others.
    """
    for contender, size in cells():
        yield from _climb(results, contender, size, tokens, first_only=True)
    ends = [(c, s) for c, s in cells() if s != 4096 and c != "half-life"]
    for chosen in (ends, [cell for cell in cells() if cell not in ends]):
        for contender, size in chosen:
            yield from _climb(results, contender, size, tokens)
        for seed in range(1, seeds):
            for contender, size in chosen:
                rate = results.best_rate(contender, size, tokens)
                run = {"contender": contender, "size": size, "lr": rate, "seed": seed, "tokens": tokens}
                if results.bits(**run) is None:
                    yield run


def _climb(
    results: Results, contender: str, size: int, tokens: int, first_only: bool = False
) -> Iterator[dict[str, Any]]:
    """Runs with seed 0 until neither twice nor half the best learning rate is better."""
    rate: float | None = FIRST_RATE[size]
    while rate is not None:
        run = {"contender": contender, "size": size, "lr": rate, "seed": 0, "tokens": tokens}
        if results.bits(**run) is None:
            yield run
        best = RATES.index(results.best_rate(contender, size, tokens) or rate)
        near = [RATES[i] for i in (best + 1, best - 1) if 0 <= i < len(RATES)]
        untried = [lr for lr in near if results.bits(**(run | {"lr": lr})) is None]
        rate = untried[0] if untried and not first_only else None


def summary(results: Results, tokens: int) -> dict[tuple[str, int], dict[str, Any]]:
    """By contender and size: the best rate, how many were tried, the bits of its seeds, and the updates of a run."""
    found = {}
    for contender, size in cells():
        lr = results.best_rate(contender, size, tokens)
        same = [
            line
            for line in results.lines
            if (line["contender"], line["size"], line["lr"], line["tokens"]) == (contender, size, lr, tokens)
            and line["bits_per_byte"] is not None
        ]
        if same:
            bits = [line["bits_per_byte"] for line in same]
            first = [x for x in results.lines if (x["contender"], x["size"], x["seed"]) == (contender, size, 0)]
            found[contender, size] = {"lr": lr, "tried": len(first), "bits": bits, "updates": same[0]["updates"]}
    return found


def table(results: Results, tokens: int) -> str:
    """Markdown: mean bits per byte over the seeds, half their range, the updates made and the best rate."""
    rows = ["| | " + " | ".join(f"{size:,} tokens an update" for size in SIZES) + " |", "| --- " * 4 + "|"]
    found = summary(results, tokens)
    for contender, label in LABELS.items():
        row = [label]
        for size in SIZES:
            cell = found.get((contender, size))
            if cell is None:
                row.append("")
                continue
            bits, half = cell["bits"], (max(cell["bits"]) - min(cell["bits"])) / 2
            seeds = f" ±{half:.3f} ({len(bits)} seeds)" if len(bits) > 1 else ""
            tried = f"{cell['lr']:g} of {cell['tried']}"
            row.append(f"**{statistics.mean(bits):.2f}**{seeds}; {cell['updates']:,} updates; {tried}")
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows)


def picture(results: Results, tokens: int, path: Path) -> None:
    """Bits per byte over the tokens of an update, a line for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    found = summary(results, tokens)
    for contender, label in LABELS.items():
        sizes = [size for size in SIZES if (contender, size) in found]
        means = [statistics.mean(found[contender, size]["bits"]) for size in sizes]
        axes.plot(sizes, means, marker="o", label=label)
        for size in sizes:
            axes.plot([size] * len(found[contender, size]["bits"]), found[contender, size]["bits"], "k_", markersize=6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(SIZES), [f"{size:,}" for size in SIZES])
    axes.set_xlabel("tokens an update (of a whole window)")
    axes.set_ylabel("held-out bits per byte")
    axes.set_title(f"{tokens / 1e6:.2f} M training tokens each, best learning rate of each")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="data/stdlib", help="made by `gptb-ds prepare --source stdlib`")
    parser.add_argument("--out", type=Path, default=Path("runs/batch"))
    parser.add_argument("--tokens", type=int, default=655_360, help="training tokens of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, train nothing")
    parser.add_argument("--picture", type=Path, help="draw what is there, train nothing")
    args = parser.parse_args()
    results = Results(args.out / "results.jsonl")
    if args.table or args.picture:
        print(table(results, args.tokens))
        if args.picture:
            picture(results, args.tokens, args.picture)
        return
    import gptb_ds.training.setup  # noqa: F401 - once, for all the processes that are forked from this one

    for run in runs_to_make(results, args.seeds, args.tokens):
        results.add(measure(run, args))


if __name__ == "__main__":
    main()
