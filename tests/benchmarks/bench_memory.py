"""What recomputation through time costs and saves: `python tests/benchmarks/bench_memory.py --help`.

A window of many columns, forward and backward, with the states of every c-th column kept, or ("cheap") without norms
and
activations: peak memory beyond what was there before, and time, each as a ratio to keeping everything (c = 0). Each
figure has a process of its own.

Axes: K steps, c columns between two states that are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from gptb_ds import GPTBConfig, GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective

CHEAP = "cheap"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    args = parse()
    if args.every is not None:
        print(json.dumps(measure(args, args.every)))
        return
    shape = {name: getattr(args, name) for name in ("embd", "layers", "heads", "slots", "lanes", "window", "vocab")}
    print(
        f"{args.device}, {args.precision}, {args.threads} threads, " + ", ".join(f"{n} {v}" for n, v in shape.items())
    )
    kept: dict[str, float] = {}
    for every in args.choices:
        found = {
            "peak_bytes": own_process(every, MALLOC_MMAP_THRESHOLD_="4096", MALLOC_TRIM_THRESHOLD_="0")["peak_bytes"],
            "seconds": own_process(every)["seconds"],
        }
        kept = kept or found
        less, longer = kept["peak_bytes"] / found["peak_bytes"], found["seconds"] / kept["seconds"]
        print(
            f"c = {every:>5}: {found['peak_bytes'] / 2**20:9.1f} MiB, 1/{less:.0f} of keeping everything;"
            f" {found['seconds']:6.2f} s, x{longer:.2f}",
            flush=True,
        )
        if args.out:
            facts = {"benchmark": "memory", "device": args.device, "threads": args.threads, "precision": args.precision}
            with open(args.out, "a") as file:
                row = facts | shape | {"recompute_every": every, "times_less": less, "times_longer": longer} | found
                file.write(json.dumps(row) + "\n")


def own_process(every: str, **variables: str) -> dict[str, float]:
    """`measure` in a new process. With those variables glibc gives back what is freed at once, which takes time."""
    command = [sys.executable, __file__, "--every", every, *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = {"embd": 128, "layers": 12, "heads": 4, "slots": 8, "lanes": 4, "window": 1024, "vocab": 257}
    for name, default in (shapes | {"rounds": 2, "threads": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    choices = ["0", CHEAP, "2", "4", "8", "32"]
    parser.add_argument("--choices", nargs="+", default=choices, help=f"values of c or {CHEAP}; ratios to the first")
    parser.add_argument("--precision", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="append a line of JSON for each c to this file")
    parser.add_argument("--every", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace, choice: str) -> dict[str, float]:
    """Peak bytes beyond those before the window, and the least seconds of a window."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.manual_seed(0)
    shape = {"n_embd": args.embd, "n_layer": args.layers, "n_head": args.heads, "n_positions": args.slots}
    config = GPTBConfig(vocab_size=args.vocab, num_slots=args.slots, dropout=0.0, **shape)
    model = GPTBLMHeadModel(config).to(device, DTYPES[args.precision]).train()
    every = 0 if choice == CHEAP else int(choice)
    objective = WindowObjective(model, every, recompute_cheap=choice == CHEAP)
    state_BSE = model.empty_state(args.lanes)

    def window(steps: int) -> None:
        ids, targets = torch.randint(args.vocab, (2, steps, args.lanes), device=device)
        objective(ids, targets, torch.zeros_like(ids, dtype=torch.bool), state_BSE)[0].backward()

    window(2 * every + 2)  # afterwards gradients are there and libraries loaded, those of recomputation too
    before = _now_and_peak(device, reset=True)[0]
    # One thread's own time does not count what else runs on the machine.
    clock = time.process_time if device.type == "cpu" and args.threads == 1 else time.perf_counter
    seconds = []
    for _ in range(args.rounds):
        start = clock()
        window(args.window)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return {"peak_bytes": _now_and_peak(device)[1] - before, "seconds": min(seconds)}


def _now_and_peak(device: torch.device, *, reset: bool = False) -> tuple[int, int]:
    """Bytes now, and the most since the last reset. On a CPU those of the process (Linux)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()  # ru_maxrss can't be reset
    now, peak = (int(status.split(f"{name}:")[1].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


if __name__ == "__main__":
    main()
