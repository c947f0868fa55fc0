"""The public parity benchmark (lucidrains/recurrent-transformer): trained at 16 bits, tested to 128.

    python launch/experiments/parity_benchmark.py --out runs/parity-benchmark

Strings of exactly 16 bits, width 32, depth 2, 64 strings an update, 1,000 updates at 3e-3; the answer is asked after
every bit. A line of OUT/results.jsonl for each model and seed. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from side_by_side import Cell, Line, Results, parameters_of, run_cells

SEEDS = (0, 1, 2)
# A window is a whole document: its start and 16 bits.
SETTING: Line = {
    **{"model.n_embd": 32, "model.n_layer": 2, "model.n_head": 4, "model.num_slots": 3},
    **{"data.lanes": 64, "data.window": 17, "task.curriculum": "off"},
    **{
        "optim.lr": 3e-3,
        "optim.weight_decay": 0.01,
        "optim.warmup_updates": 50,
        "train.updates": 1000,
        "train.precision": "fp32",
    },
    **{"run.eval_every": 0, "run.eval_tokens": 20_000},
}
MODELS: dict[str, Line] = {
    "GPTB, shifted, weights drawn at 0.18": {"model.carry": "shift", "model.initializer_range": 0.18},
    "GPTB, the original": {},
    "LSTM": {"model.kind": "lstm"},
    "GPT-2": {"model.kind": "gpt2", "model.context": 136},
    "GPTB, shifted, 0.18, with the curriculum": {
        **{"model.carry": "shift", "model.initializer_range": 0.18, "task.curriculum": "auto"}
    },
}


def wanted(out: Path) -> Iterator[Cell]:
    """Every model, then the other seeds."""
    for seed in SEEDS:
        for model, keys in MODELS.items():
            seeds = {"data.path": str(out / "store"), "data.seed": seed, "train.seed": seed}
            yield Cell({"benchmark": "parity 16 to 128", "model": model, "seed": seed}, SETTING | keys | seeds, score)


def score(run: Path, made: Cell, device: str, left: float | None) -> Line:
    """Right answers at lengths up to 128, of 256 strings."""
    import torch

    from gptb_ds.data.tasks import parse_task
    from gptb_ds.evaluation import score_task
    from gptb_ds.loading import load_any

    model, _ = load_any(str(run))
    model.to(torch.device(device)).eval()
    found = asdict(score_task(model, parse_task("task:parity"), 128, documents=256))
    del found["task"]
    return found | parameters_of(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/parity-benchmark"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    args = parser.parse_args()
    started = time.monotonic()
    if not (args.out / "store" / "store.json").exists():
        from gptb_ds.cli import main as gptb_ds

        source = "task:parity?length=16&min_length=16&count=70000"  # no string is read twice
        if code := gptb_ds(["prepare", "--source", source, "--out", str(args.out / "store")]):
            raise SystemExit(code)
    left = None if args.seconds is None else args.seconds - (time.monotonic() - started)
    results = Results(args.out / "results.jsonl")
    run_cells(lambda _: list(wanted(args.out)), results, workers=args.workers, device=args.device, seconds=left)


if __name__ == "__main__":
    main()
