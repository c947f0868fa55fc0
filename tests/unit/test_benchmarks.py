"""The benchmarks still run; what they measure is for those who read it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness.processes import run_script
from tests.harness.stores import numbered_documents, write_store

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "bench_generate": ["--positions", "20", "--embd", "8", "--heads", "1", "--layers", "1", "--new-tokens", "4"]
    + ["--rounds", "1", "--train-seconds", "1"],
    "bench_save": [
        "--n-embd",
        "64",
        "--n-layer",
        "1",
        "--lanes",
        "4",
        "--window",
        "2",
        "--vocab",
        "99",
        "--rounds",
        "1",
    ],
    "bench_step": ["--lanes", "2", "--window", "2", "--embd", "8", "--heads", "1", "--layers", "1", "--no-compile"],
    "bench_memory": ["--layers", "1", "--embd", "16", "--window", "20", "--choices", "0", "4", "--rounds", "1"],
    "bench_width": [
        "--layers",
        "1",
        "--embd",
        "16",
        "--window",
        "4",
        "--most-lanes",
        "2",
        "--ranks",
        "1",
        "--rounds",
        "1",
    ],
    "bench_resets": ["--lanes", "4", "--window", "4", "--updates", "9"],
    "bench_exchange": [
        "--lanes",
        "2",
        "--windows",
        "2",
        "--embd",
        "8",
        "--layers",
        "1",
        "--vocab",
        "29",
        "--updates",
        "1",
    ],
    "bench_collator": ["--lanes", "4", "--window", "4", "--seconds", "0.01"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_benchmark_runs(name: str, tmp_path: Path) -> None:
    arguments = list(SMALL[name])
    if name in ("bench_collator", "bench_resets"):
        arguments += ["--store", str(write_store(tmp_path, numbered_documents([50] * 40)))]
    said = tmp_path / "said"
    assert run_script(BENCHMARKS / f"{name}.py", arguments, said) == 0, said.read_text()
    assert re.search(r"\dx\b|\d x |x\d|times as fast", said.read_text()), "a ratio"
