"""tokens/s over the number of lanes, and over ranks: `python tests/benchmarks/bench_width.py --help`.

Width: a window's forward and backward for 1, 2, 4, ... lanes on `--threads` threads, and the knee: the fewest lanes
that reach 90% of the best rate. Scaling: whole updates of the command on one rank, and on two of one thread each with
twice the lanes (weak scaling), in turn; 1.00 is what one rank alone reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gptb_ds import GPTBConfig, GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    shape = {name: getattr(args, name) for name in ("embd", "layers", "heads", "slots", "window", "vocab")}
    facts = {"device": args.device, "threads": args.threads, "precision": args.precision} | shape
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows = [facts | row for row in (width(args) + (scaling(args) if args.ranks > 1 else []))]
    if args.out:
        with open(args.out, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = {"embd": 128, "layers": 2, "heads": 4, "slots": 8, "window": 16, "vocab": 257}
    for name, default in (shapes | {"rounds": 5, "threads": 1, "most-lanes": 1024, "ranks": 2, "updates": 40}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="append lines of JSON to this file")
    return parser.parse_args()


def width(args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each number of lanes."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    shape = {"n_embd": args.embd, "n_layer": args.layers, "n_head": args.heads, "n_positions": args.slots}
    config = GPTBConfig(vocab_size=args.vocab, num_slots=args.slots, dropout=0.0, **shape)
    model = GPTBLMHeadModel(config).to(device, DTYPES[args.precision]).train()
    objective, rates, lanes = WindowObjective(model), {}, 1
    while lanes <= args.most_lanes:
        ids, targets = torch.randint(args.vocab, (2, args.window, lanes), device=device)
        inputs = ids, targets, torch.zeros_like(ids, dtype=torch.bool), model.empty_state(lanes)
        best = float("inf")
        for number in range(args.rounds + 1):
            start = time.perf_counter()
            model.zero_grad(set_to_none=True)
            objective(*inputs)[0].backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start) if number else best
        rates[lanes] = lanes * args.window / best
        lanes *= 2
    most = max(rates.values())
    knee = next(lanes for lanes, rate in rates.items() if rate >= 0.9 * most)
    for lanes, rate in rates.items():
        print(f"{lanes:6d} lanes {rate:12,.0f} tokens/s  x{rate / most:.2f} of the best", flush=True)
    print(f"knee: {knee} lanes")
    return [{"benchmark": "width", "lanes": n, "tokens_per_second": rate, "knee": knee} for n, rate in rates.items()]


def scaling(args: argparse.Namespace) -> list[dict[str, object]]:
    """One row: the rate of all ranks together over that of one, by the number of ranks, from the command's metrics."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("state slot lane column window reset update token step " * 3000)
        _run([*_GPTB, "prepare", "--source", folder / "text.txt", "--out", folder / "store", "--holdout", "0"])
        rates: dict[int, list[float]] = {1: [], args.ranks: []}
        for turn in range(2):
            for ranks, found in rates.items():
                found.append(_rate(args, folder, ranks, turn))
    alone, together = max(rates[1]), max(rates[args.ranks])
    share = together / args.ranks / alone
    print(f"1 rank {alone:,.0f} tokens/s, {args.ranks} ranks {together:,.0f}: x{share:.3f} of one rank's rate, each")
    return [{"benchmark": "scaling", "ranks": args.ranks, "alone": alone, "together": together, "share": share}]


_GPTB = [sys.executable, "-m", "gptb_ds"]


def _rate(args: argparse.Namespace, folder: Path, ranks: int, turn: int) -> float:
    """The median tokens/s of the second half of a run's updates."""
    run = folder / f"{ranks}-{turn}"
    values = {"run.dir": run, "data.path": folder / "store", "data.lanes": 64 * ranks, "data.window": args.window}
    values |= {"model.num_slots": args.slots, "model.n_layer": args.layers, "model.n_head": args.heads}
    values |= {"model.n_embd": args.embd, "train.precision": args.precision, "train.updates": args.updates}
    values |= {"run.eval_every": 0, "run.save_every": 0, "run.log_every": 1000, "optim.warmup_updates": 0}
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    _run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            "-m",
            "gptb_ds",
            "train",
            *words,
        ]
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return statistics.median(speeds[len(speeds) // 2 :])


def _run(command: list[object]) -> None:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main()
