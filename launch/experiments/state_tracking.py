"""Can it track a state? GPTB, GPT-2 and an LSTM on the generated tasks, and what the recipe's pieces are worth.

    python launch/experiments/state_tracking.py --out runs/state-tracking

trains a small model for every cell (task, model, what differs from `--config state-tracking`, seed) through
`gptb-ds train`, scores it on documents up to 10,000 inputs long, and appends a line to OUT/results.jsonl; started
again, it goes on where it stopped. Cells come in the order of their worth; `--cells` names the groups of cells to run.

    ... --cells recipe baselines ablations   (the default) small models, one core each: --workers 8
    ... --cells groups                       A5 and S5: A5 takes minutes of a core, S5 a GPU (--device cuda)
    ... --seconds 200                        stop after so long; what is under way is scored as it is
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from side_by_side import Cell, Line, Results, parameters_of, run_cells

SEEDS = (0, 1, 2)
TASKS = ("s3", "cycle6", "parity", "cycle5")
CHANCE = {"parity": 1 / 2, "cycle5": 1 / 5, "cycle6": 1 / 6, "s3": 1 / 6, "a5": 1 / 60, "s5": 1 / 120}
LENGTHS = {"a5": 32, "s5": 32, "programs3": 100, "programs5": 100, "copy": 10, "recall": 8}
SOURCES = {
    "a5": "task:a5?length=32&min_length=16&count=300000",
    "s5": "task:s5?length=32&min_length=16&count=400000",
    "programs3": "task:programs3?length=20&min_length=5&count=40000",
    "copy": "task:copy?length=5&min_length=5&distance=5&count=40000",
    "recall": "task:recall?length=4&min_length=4&distance=5&count=40000",
}
MOST, FIRST = 10_000, 1_000
GPTB = "gptb"
BASELINES: dict[str, Line] = {
    "lstm": {"model.kind": "lstm", "model.carry": "outputs"},
    # Two windows of context, so that each prediction sees the whole of a training document.
    "gpt2": {"model.kind": "gpt2", "model.carry": "outputs", "data.window": 64, "data.lanes": 16, "model.context": 128},
}
RATES = (3e-3, 1e-2, 1e-3)
ABLATIONS: dict[str, Line] = {
    "without curriculum": {"task.curriculum": "off"},
    "outputs carried, not shifted": {"model.carry": "outputs"},
    "weights drawn at 0.02": {"model.initializer_range": 0.02},
    "none of these three": {"task.curriculum": "off", "model.carry": "outputs", "model.initializer_range": 0.02},
    "resets left out, 0.1": {"data.keep_state_probability": 0.1},
    "constant rate": {"optim.schedule": "constant"},
    "Muon": {"optim.name": "muon"},
    "2 slots": {"model.num_slots": 2},
    "5 slots": {"model.num_slots": 5},
    "1 layer": {"model.n_layer": 1},
    "window 8": {"data.window": 8, "data.lanes": 128},
    "window 32": {"data.window": 32, "data.lanes": 32},
    "resets left out, 0.5": {"data.keep_state_probability": 0.5},
    "1 of 4 slots a recent token": {"model.num_slots": 4, "model.recent_tokens": 1},
    "beta2 0.95": {"optim.beta2": 0.95},
    "growth at 0.8": {"task.grow_at": 0.8},
}
MAIN_ABLATIONS = 6  # the first ones, which get all their seeds first
# Muon learns a group's table of products in a third of AdamW's updates; of wider updates there is no need.
GROUPS: dict[str, Line] = {
    "a5": {
        **{"model.num_slots": 2, "model.n_embd": 64, "optim.name": "muon"},
        **{"data.lanes": 128, "train.updates": 6000},
    },
    "s5": {
        **{"model.num_slots": 2, "model.n_embd": 128, "model.initializer_range": 0.125, "optim.name": "muon"},
        **{"data.lanes": 512, "train.updates": 3000},
    },
}


# A window as long as a document: with 16 columns and AdamW GPTB learnt nothing.
LANGUAGE: Line = {"optim.name": "muon", "data.window": 64, "data.lanes": 16, "train.updates": 2000}
# What else was tried on the groups.
GROUP_CHANGES: dict[str, dict[str, Line]] = {"a5": {"4,000 updates": {"train.updates": 4000}}, "s5": {}}


def cell(stores: Path, task: str, model: str, change: str, seed: int, keys: Line) -> Cell:
    """One cell of the experiment. `change` says what differs from the recipe, or which rate a model to compare has."""
    seeds = {"data.path": str(stores / task), "data.seed": seed, "train.seed": seed}
    name = {"task": task, "model": model, "change": change, "seed": seed}
    return Cell(name, keys | seeds, score, "state-tracking")


def wanted(groups: Sequence[str], stores: Path, results: Results, device: str) -> list[Cell]:
    """The cells of these groups, the first ones first. Which rate a model gets is known after its runs of seed 0."""
    found: list[Cell] = []
    if "recipe" in groups:
        found += [cell(stores, task, GPTB, "", seed, {}) for seed in SEEDS for task in TASKS]
    if "groups" in groups:
        graph = {"train.graph": "on"} if device == "cuda" else {}
        found += [cell(stores, t, GPTB, "", s, GROUPS[t] | graph) for s in SEEDS for t in GROUPS]
    if "group-baselines" in groups:
        found += _group_baselines(stores)
    if "baselines" in groups:
        found += _baselines(stores, results)
    if "ablations" in groups:
        for changes in (list(ABLATIONS)[:MAIN_ABLATIONS], list(ABLATIONS)[MAIN_ABLATIONS:]):
            pairs = [(change, task) for change in changes for task in ("cycle6", "s3")]
            found += [cell(stores, task, GPTB, change, s, ABLATIONS[change]) for s in SEEDS for change, task in pairs]
    if "longer" in groups:
        longer, change = {"train.updates": 2400, "optim.lr": 3e-3}, "lr 0.003, 2,400 updates"
        trials = [(task, model) for model in BASELINES for task in ("s3", "cycle6")]
        found += [cell(stores, t, m, change, s, BASELINES[m] | longer) for s in SEEDS for t, m in trials]
    if "language" in groups:
        tasks, models = ("copy", "recall", "programs3"), {GPTB: {"model.num_slots": 8}} | BASELINES
        found += [
            cell(stores, task, model, "", seed, models[model] | LANGUAGE)
            for seed in SEEDS
            for task in tasks
            for model in models
        ]
    return found


def _group_baselines(stores: Path) -> Iterator[Cell]:
    """A5 and S5 with the models to compare with, for as many tokens, and with AdamW."""
    for task, keys in GROUPS.items():
        for rate in RATES[:2]:
            for model, own in BASELINES.items():
                window = own.get("data.window", 16)
                lanes = {"data.lanes": keys["data.lanes"] * 16 // window}
                yield cell(stores, task, model, f"lr {rate:g}", 0, keys | own | lanes | {"optim.lr": rate})
        yield cell(stores, task, GPTB, "AdamW", 0, keys | {"optim.name": "adamw"})
        for change, other in GROUP_CHANGES[task].items():
            yield from (cell(stores, task, GPTB, change, seed, keys | other) for seed in SEEDS)


def _baselines(stores: Path, results: Results) -> Iterator[Cell]:
    """Each model to compare with at three rates with seed 0, and at its best one with the others; GPTB's rates, too."""
    models = {GPTB: {}} | BASELINES

    def at(task: str, model: str, rate: float, seed: int) -> Cell:
        return cell(stores, task, model, f"lr {rate:g}", seed, models[model] | {"optim.lr": rate})

    for rate in RATES:
        for model in BASELINES:
            yield from (at(task, model, rate, 0) for task in TASKS)
    for seed in SEEDS[1:]:
        for model in BASELINES:
            for task in TASKS:
                rate = best_rate(results, task, model)
                if rate is not None:
                    yield at(task, model, rate, seed)
    for rate in RATES[1:]:
        yield from (at(task, GPTB, rate, 0) for task in TASKS)


def best_rate(results: Results, task: str, model: str) -> float | None:
    """The rate whose run of seed 0 holds longest, then learns soonest; None: not all rates have been tried."""
    found = {rate: results.line(task=task, model=model, change=f"lr {rate:g}", seed=0) for rate in RATES}
    if any(line is None for line in found.values()):
        return None

    def worth(rate: float) -> tuple[float, ...]:
        line = found[rate] or {}
        if "accuracy" not in line:
            return (-1, 0, 0, 0)
        shares = line["accuracy"].values()
        return (line["longest_99"], line["longest_90"], -(line["tokens_to_99"] or 1e12), sum(shares) / len(shares))

    return max(RATES, key=worth)


def score(run: Path, made: Cell, device: str, left: float | None) -> Line:
    """Right answers on new documents of up to 1,000 inputs, and of up to 10,000 where it holds that."""
    import torch

    from gptb_ds.data.tasks import parse_task
    from gptb_ds.evaluation import score_task
    from gptb_ds.loading import load_any

    model, _ = load_any(str(run))
    model.to(torch.device(device)).eval()
    task = parse_task(SOURCES.get(made.name["task"], f"task:{made.name['task']}"))
    is_group = task.is_automaton
    found = score_task(model, task, FIRST if is_group else 200)
    if is_group and found.longest_90 >= FIRST and (left is None or left > LEAST_FOR_ALL):
        found = score_task(model, task, MOST)
    line = asdict(found)
    del line["task"]
    return line | parameters_of(run) | learning_line(run, LENGTHS.get(made.name["task"], 60))


LEAST_FOR_ALL = 15.0  # seconds that are left for documents of 10,000 inputs


def learning_line(run: Path, longest: int) -> Line:
    """Tokens until the running accuracy is 99% on documents of full length (None: never), and the length at the end."""
    share, to_99, length = 0.0, None, longest
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if "accuracy" not in line or "loss" not in line:
            continue
        share = 0.9 * share + 0.1 * line["accuracy"]
        length = line.get("document_tokens", longest)
        if to_99 is None and share >= 0.99 and length >= longest:
            to_99 = line["tokens"]
    return {"tokens_to_99": to_99, "document_tokens": length, "running_accuracy": round(share, 4)}


def prepare_stores(stores: Path, tasks: Sequence[str]) -> None:
    """The stores that are not there yet, made as `gptb-ds prepare` makes them."""
    from gptb_ds.cli import main as gptb_ds

    for task in tasks:
        if not (stores / task / "store.json").exists():
            source = SOURCES.get(task, f"task:{task}?length=60&min_length=1&count=30000")
            code = gptb_ds(["prepare", "--source", source, "--out", str(stores / task)])
            if code:
                raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/state-tracking"))
    parser.add_argument(
        "--cells",
        nargs="+",
        default=["recipe", "baselines", "ablations"],
        choices=["recipe", "baselines", "ablations", "longer", "groups", "group-baselines", "language"],
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--tasks", nargs="+", help="only these tasks' cells")
    parser.add_argument("--first", type=int, help="only the first so many cells")
    parser.add_argument("--updates", type=int, help="of every run, instead of what its cell says (to try it out)")
    args = parser.parse_args()
    started = time.monotonic()
    results, stores = Results(args.out / "results.jsonl"), args.out / "stores"

    def cells(results: Results) -> list[Cell]:
        found = wanted(args.cells, stores, results, args.device)
        found = [cell for cell in found if args.tasks is None or cell.name["task"] in args.tasks][: args.first]
        shorter = {} if args.updates is None else {"train.updates": args.updates}
        return [replace(cell, keys=cell.keys | shorter) for cell in found]

    prepare_stores(stores, sorted({cell.name["task"] for cell in cells(results)}))
    left = None if args.seconds is None else args.seconds - (time.monotonic() - started)
    run_cells(cells, results, workers=args.workers, device=args.device, seconds=left)


if __name__ == "__main__":
    main()
