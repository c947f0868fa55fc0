"""The experiments' commands: every cell is a configuration that `train` takes, and a run leaves its line, once."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptb_ds.config import load_config

FOLDER = Path(__file__).parents[2] / "launch" / "experiments"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_cell_of_state_tracking_is_a_run_of_its_own(tmp_path: Path, device: str):
    import state_tracking

    results = state_tracking.Results(tmp_path / "results.jsonl")
    groups = ["recipe", "baselines", "ablations", "longer", "groups", "language"]
    cells = state_tracking.wanted(groups, tmp_path / "stores", results, device)
    assert len(cells) > 100
    assert len({json.dumps(cell.name) for cell in cells}) == len(cells)
    for cell in cells:
        load_config(cell.recipe, cell.keys)


def test_every_model_of_text_is_a_run(tmp_path: Path):
    import text

    for small in (False, True):
        args = argparse.Namespace(
            name="x", small=small, out=tmp_path, tokens=1_000_000, eval_tokens=1000, device="cuda", models=99
        )
        cells = list(text.wanted(text.Results(tmp_path / "results.jsonl"), args))
        assert {cell.name["model"] for cell in cells} == set(text.MODELS)
        for cell in cells:
            config = load_config(cell.recipe, cell.keys)
            assert config.data.lanes * config.data.window == (1024 if small else 8192)


@pytest.mark.slow
def test_a_run_leaves_its_line_and_is_not_made_again(tmp_path: Path):
    command = [sys.executable, str(FOLDER / "state_tracking.py"), "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    for _ in range(2):
        subprocess.run([*command, "--first", "1", "--updates", "60"], check=True, env=environment, timeout=600)
    (line,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert line["name"] == {"task": "s3", "model": "gptb", "change": "", "seed": 0}
    assert (line["updates"], line["tokens"], line["stopped"]) == (60, 60 * 1024, False)
    assert 0.1 < line["accuracy"]["10"] < 1
    assert line["health"]["state_norm"] > 0
    assert line["parameters"] == 26_080


def test_every_model_of_the_parity_benchmark_is_a_run(tmp_path: Path):
    import parity_benchmark

    cells = list(parity_benchmark.wanted(tmp_path))
    assert len(cells) == 3 * len(parity_benchmark.MODELS)
    for cell in cells:
        config = load_config(cell.recipe, cell.keys)
        assert (config.data.lanes, config.data.window, config.train.updates, config.optim.lr) == (64, 17, 1000, 3e-3)


def test_the_tables_in_the_docs_are_those_of_the_recorded_runs():
    import tables

    lines = tables.read_lines(tables.DATA)
    assert len(lines) > 50
    for page in tables.PAGES:
        text = page.read_text()
        assert "<!-- summary -->" in text
        assert tables.filled(text, lines) == text, "run python launch/experiments/tables.py"
