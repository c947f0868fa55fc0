"""Tiny training runs for the launch tests: their configuration, their processes, their metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from gptb_ds.training.metrics import SPEEDS
from tests.harness.processes import PATIENCE, wait_until

CHECKOUT = Path(__file__).parents[2]
LAUNCH = CHECKOUT / "launch"
UPDATES = 300  # a few seconds: time enough to be stopped in the middle


class TinyRun:
    """A run's folder beside its configuration file; `arguments` are the same for every launcher."""

    def __init__(self, folder: Path, store: Path, updates: int = UPDATES, **run: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.dir = folder / "run"
        self.updates = updates
        self.config = folder / "tiny.yaml"
        values = {
            "model": {"num_slots": 4, "n_layer": 1, "n_head": 2, "n_embd": 16},
            "data": {"path": str(store), "lanes": 8, "window": 4},
            "optim": {"warmup_updates": 0},
            "train": {"updates": updates, "precision": "fp32"},
            "run": {"log_every": 100, "save_every": 0, "eval_every": 0, "eval_tokens": 64} | run,
        }
        self.config.write_text(yaml.safe_dump(values))
        self.arguments = ["--config", str(self.config), "--run.dir", str(self.dir)]

    def update(self) -> int:
        """The last update whose line is in metrics.jsonl."""
        return max((line["update"] for line in self.lines()), default=0)

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without the speeds: what must not depend on how the run was started."""
        path = self.dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        return [{k: v for k, v in json.loads(line).items() if k not in SPEEDS} for line in whole.splitlines()]

    def checkpoints(self) -> list[int]:
        """Updates of the complete checkpoints."""
        return sorted(int(p.parent.name.split("-")[1]) for p in self.dir.glob("checkpoints/step-*/manifest.json"))

    def ranks(self) -> list[psutil.Process]:
        """The processes that train this run, in rank order where the environment tells it."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                if (
                    str(self.dir) in words
                    and Path(words[0]).name.startswith("python")
                    and "-m gptb_ds" in " ".join(words)
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append((process.environ().get("RANK", ""), process))
            except psutil.Error:
                continue
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def wait_for_update(self, update: int, said: Callable[[], str]) -> None:
        """Returns once that update is done; `said` gives the output for the message when it is not."""
        wait_until(lambda: self.update() >= update, f"update {update}", said)


@contextmanager
def started(
    command: list[str],
    run: TinyRun,
    log: Path,
    env: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Runs `command` with the run's arguments in a session of its own; nothing of it is left afterwards."""
    with log.open("a") as out:
        process = subprocess.Popen(
            [*command, *run.arguments],
            cwd=log.parent,
            env=environment() | (env or {}),
            stdout=out,
            stderr=out,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for rank in run.ranks():
                rank.kill()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def finish(command: list[str], run: TinyRun, log: Path, env: dict[str, str] | None = None) -> int:
    """Starts it, waits for its end and returns the exit code."""
    with started(command, run, log, env) as process:
        return process.wait(PATIENCE)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. (Where nobody reaps orphans, their zombies stay.)"""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def environment() -> dict[str, str]:
    """Ours, without what a launcher around the tests may have set."""
    outer = ("SLURM_", "OMPI_", "PMI", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    env = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
