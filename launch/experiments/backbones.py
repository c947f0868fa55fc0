"""Each backbone in the demo's setting: the same tokens, slots, width, blocks and optimizer, blocks of one size.

    python launch/experiments/backbones.py --store data/stdlib-bpe --out runs/backbones

trains the recipe `demo` once for each backbone, one process and one thread each, and appends a line to
OUT/results.jsonl for every run that has ended; started again, it goes on where it stopped. Nothing is tuned for any of
them: learning rate, initialisation and seed are the demo's. `--jobs` trains several side by side; after `--seconds`
what still runs is stopped, and its line tells how far it came. docs/transformers.md shows what came out (`--table`
prints it).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

BACKBONES = ("gpt2", "llama", "qwen3", "gpt_neox", "gemma")
# Their MLP has three matrices instead of two: with two thirds of 4 E inside it is as large as the others'.
GATED = ("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "qwen2", "olmo2", "phi3")
DONE, STOPPED = 0, 85


def command(backbone: str, folder: Path, args: argparse.Namespace, seconds: float | None) -> list[str]:
    """The `gptb-ds train` of one run."""
    keys: dict[str, Any] = {
        "data.path": args.store,
        "model.backbone": backbone,
        "train.updates": args.updates,
        "run.dir": folder,
        "run.save_every": max(1, args.updates // 2),
        "run.keep": 1,
        "run.eval_every": max(1, args.updates // 2),
        "run.sample_every": 0,
    }
    if backbone in GATED:
        keys["model.n_inner"] = 344
    if seconds is not None:
        keys["run.max_seconds"] = max(1, int(seconds))
    dotted = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "gptb_ds", "train", "--config", "demo", *dotted]


def measure(backbone: str, args: argparse.Namespace, deadline: float | None) -> dict[str, Any] | None:
    """Trains, or goes on, and returns the run's line; None when no time is left for it."""
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left < 1:
        return None
    folder = args.out / f"{backbone}-{args.updates}"
    output = args.out / f"{backbone}-{args.updates}.txt"
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with output.open("a") as file:
        code = subprocess.run(
            command(backbone, folder, args, left), stdout=file, stderr=file, env=os.environ | threads, check=False
        ).returncode
    if code not in (DONE, STOPPED):
        sys.exit(f"{backbone}: exit code {code}; see {output}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_bits_per_byte" in line]
    return {
        "backbone": backbone,
        "wanted": args.updates,
        "updates": updates[-1]["update"],
        "tokens": updates[-1]["tokens"],
        "bits_per_byte": evaluations[-1]["eval_bits_per_byte"],
        "evaluations": [[line["update"], line["eval_bits_per_byte"]] for line in evaluations],
        "parameters": parameters(folder),
        "tokens_per_second": sorted(line["tokens_per_second"] for line in updates)[len(updates) // 2],
    }


def parameters(folder: Path) -> int:
    """Of the trained model, read as any other program of ours would read it."""
    from gptb_ds.loading import load_any

    model, _ = load_any(str(folder))
    return sum(parameter.numel() for parameter in model.parameters())


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the runs made so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]], updates: int) -> str:
    """Markdown: bits per byte of held-out text on the way, and how large the model is."""
    newest = {line["backbone"]: line for line in lines if line["wanted"] == updates}
    found = list(newest.values())
    points = sorted({update for line in found for update, _ in line["evaluations"]})
    heads = ["backbone", "parameters", *(f"update {update:,}" for update in points)]
    rows = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for line in found:
        bits = dict(line["evaluations"])
        cells = [f"{bits[update]:.2f}" if update in bits else "" for update in points]
        rows.append(f"| {line['backbone']} | {line['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--store", default="data/stdlib-bpe", help="`gptb-ds prepare --source stdlib --tokenizer bpe:2048` makes it"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/backbones"))
    parser.add_argument("--updates", type=int, default=1300, help="of 512 tokens (default: the demo's 1,300)")
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, train nothing")
    args = parser.parse_args()
    results = args.out / "results.jsonl"
    if args.table:
        print(table(read(results), args.updates))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = None if args.seconds is None else time.monotonic() + args.seconds
    done = {line["backbone"] for line in read(results) if line["wanted"] == line["updates"] == args.updates}
    with ThreadPoolExecutor(args.jobs) as pool:
        todo = [name for name in args.backbones if name not in done]
        for run in as_completed([pool.submit(measure, name, args, deadline) for name in todo]):
            line = run.result()
            if line is not None:
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
