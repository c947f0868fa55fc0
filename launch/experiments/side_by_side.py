"""Runs of `gptb-ds train` for an experiment: several at a time, each finished one a line of a JSON Lines file."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]
POLICY = Path(__file__).resolve().parents[2] / "ds_configs" / "zero0.json"
# Below this many seconds no run is started any more, and this share of a run's time is kept for scoring it.
LEAST_SECONDS, SCORING = 15.0, 0.3
_MOST_SCORING = 40.0
MOST_TRIES = 2
DIVERGED = "not finite"  # the error of a run whose loss was none any more: a result, which a second try would repeat


@dataclass(frozen=True)
class Cell:
    """A run to make. `name` tells it from all others and is in its line; `keys` are dotted, on top of `recipe`.

    `score` is called in the run's own process after training, with the run's folder, the cell, the device and the
    seconds that are left (None: no limit), and gives what the line says besides. It must be a module's own function.
    """

    name: Line
    keys: Line
    score: Callable[[Path, Cell, str, float | None], Line]
    recipe: str | None = None


class Results:
    """The lines of the runs made so far. One that was stopped by the time limit, or that crashed, is not finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        self.lines: list[Line] = [json.loads(line) for line in text.splitlines()]

    def line(self, **name: Any) -> Line | None:
        """The last finished line of this name."""
        found = [line for line in self.lines if line["name"] == name and not line.get("stopped")]
        found = [line for line in found if not _crashed(line)]
        return found[-1] if found else None

    def has_ended(self, name: Line) -> bool:
        """Whether a run of this name is over, however it ended."""
        return any(line["name"] == name for line in self.lines)

    def has_crashed(self, name: Line) -> bool:
        """Whether that is how the last run of this name ended."""
        found = [line for line in self.lines if line["name"] == name]
        return bool(found) and _crashed(found[-1])

    def add(self, line: Line) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({k: v for k, v in line.items() if k not in ("keys", "health")}), flush=True)


def run_cells(
    wanted: Callable[[Results], list[Cell]],
    results: Results,
    *,
    workers: int = 1,
    device: str = "cpu",
    seconds: float | None = None,
    least_seconds: float = LEAST_SECONDS,
) -> None:
    """Makes the runs that `wanted` names, in its order, `workers` at a time; it is asked again after every run.

    What has a line already is not run again, but for a run that crashed (once more, when a worker is free, say for a
    device that was full) and in the next call for what crashed or was stopped.
    `device` "cpu" hides the GPUs. After `seconds` the runs that are under way stop training and are scored as they are;
    none is started when fewer than `least_seconds` are left.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import gptb_ds.training.setup  # noqa: F401 - once, for all the processes that are forked from this one
    deadline = None if seconds is None else time.monotonic() + seconds
    # A forked process can't use CUDA after its parent has asked for it.
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    revision, running, tried = _revision(), {}, []

    def may_start(name: Line) -> bool:
        times = tried.count(name)
        under_way = any(cell.name == name for _, cell, _ in running.values())
        return times == 0 or (times < MOST_TRIES and not under_way and results.has_crashed(name))

    while True:
        cell = next((c for c in wanted(results) if may_start(c.name) and results.line(**c.name) is None), None)
        late = deadline is not None and deadline - time.monotonic() < least_seconds
        if cell is not None and not late and len(running) < workers:
            tried.append(cell.name)
            number = min({*range(workers)} - {*running})
            folder = results.path.parent / f"worker-{number}"
            shutil.rmtree(folder, ignore_errors=True)  # the line of the run before is none of this one's
            process = context.Process(target=_train_and_score, args=(cell, folder, device, deadline))
            process.start()
            running[number] = (process, cell, time.monotonic())
            continue
        if not running:
            if crashed := [name for n, name in enumerate(tried) if name not in tried[:n] and results.has_crashed(name)]:
                print(f"{len(crashed)} runs crashed, the next start makes them anew: {crashed}", file=sys.stderr)
            return
        done = multiprocessing.connection.wait([process.sentinel for process, *_ in running.values()])
        for number, (process, cell, started) in list(running.items()):
            if process.sentinel in done:
                process.join()
                del running[number]
                line = _read_line(results.path.parent / f"worker-{number}")
                results.add(
                    {"name": cell.name, "recipe": cell.recipe, "keys": cell.keys}
                    | line
                    | {"seconds": round(time.monotonic() - started, 1), "device": device, "revision": revision}
                )


def _train_and_score(cell: Cell, folder: Path, device: str, deadline: float | None) -> None:
    """One run, in a process of its own: its output, its folder and its line are in `folder`."""
    folder.mkdir(parents=True)
    with (folder / "output.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from gptb_ds.config import load_config
    from gptb_ds.exit_codes import DONE, STOPPED
    from gptb_ds.training.setup import train
    from gptb_ds.training.stop_requests import StopRequests

    torch.set_num_threads(1)
    started = time.monotonic()
    left = None if deadline is None else deadline - started
    limit = None if left is None else max(1.0, left - min(_MOST_SCORING, SCORING * left))
    keys = cell.keys | {
        "run.dir": str(folder / "run"),
        "run.save_every": 0,
        "run.log_every": 50,
        "run.max_seconds": limit,
        "deepspeed_config": str(POLICY),
    }
    with StopRequests() as stop:
        code = train(load_config(cell.recipe, keys), stop)
    if code not in (DONE, STOPPED):
        os._exit(code)
    line = training_line(folder / "run") | {"stopped": code == STOPPED, "train_seconds": time.monotonic() - started}
    left = None if deadline is None else deadline - time.monotonic()
    line |= cell.score(folder / "run", cell, device, left)
    (folder / "line.json").write_text(json.dumps(line))
    sys.stdout.flush()
    os._exit(0)


def training_line(run: Path) -> Line:
    """Updates, tokens, the last loss and evaluation, and what the metrics say of the state's health."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    found: Line = {"updates": updates[-1]["update"], "tokens": updates[-1]["tokens"], "loss": updates[-1]["loss"]}
    evaluations = [line for line in lines if "eval_loss" in line]
    if evaluations:
        last = evaluations[-1]
        found |= {key: last[key] for key in ("eval_loss", "eval_bits_per_byte")}
        found["health"] = {key: value for key, value in last.items() if not key.startswith("eval_") and key != "update"}
    return found


def parameters_of(run: Path) -> Line:
    """How many weights the run's model has, and the arithmetic of a token of training."""
    from gptb_ds.loading import load_any
    from gptb_ds.training.flops import flops_per_token

    model, _ = load_any(str(run))
    return {"parameters": sum(p.numel() for p in model.parameters()), "flops_per_token": flops_per_token(model)}


def _read_line(folder: Path) -> Line:
    with contextlib.suppress(OSError):
        return json.loads((folder / "line.json").read_text())
    output = (folder / "output.txt").read_text(errors="replace")
    return {"error": DIVERGED if DIVERGED in output[-600:] else output[-600:]}


def _crashed(line: Line) -> bool:
    return line.get("error", DIVERGED) != DIVERGED


def _revision() -> str | None:
    try:
        return subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], text=True, stderr=-3).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
