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
    groups = ["recipe", "baselines", "ablations", "longer", "groups", "group-baselines", "language"]
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


def test_the_headline_of_text_is_the_best_of_the_trials_once_all_have_ended(tmp_path: Path):
    import text

    args = argparse.Namespace(
        name="x", small=True, out=tmp_path, tokens=1_000_000, eval_tokens=1000, device="cpu", models=99, plain=True
    )
    results = text.Results(tmp_path / "results.jsonl")
    trials = [cell.name for cell in text.wanted(results, args)]
    assert all("trials" in name["text"] and name["tokens"] == 250_000 for name in trials)
    twins = [name for name in trials if name["model"].startswith("its twin")]
    assert len(twins) == 4  # with and without wide first weights, at two rates
    for number, name in enumerate(twins[:-1]):
        results.add({"name": name, "eval_bits_per_byte": 2.5 - number})
    assert [cell.name for cell in text.wanted(results, args)] == trials
    results.add({"name": twins[-1], "error": "a crash"})
    best = {"text": "x", "model": twins[-2]["model"], "lr": twins[-2]["lr"]}
    headline = [cell.name for cell in text.wanted(results, args)][len(trials) :]
    assert headline == [best | {"seed": seed} for seed in (0, 1, 2)]


def test_behind_the_headline_of_text_come_more_tokens_and_the_grid(tmp_path: Path):
    import text

    args = argparse.Namespace(
        name="x", small=False, out=tmp_path, tokens=1_000_000, eval_tokens=1000, device="cuda", models=99
    )
    results = text.Results(tmp_path / "results.jsonl")
    for cell in list(text.wanted(results, args)):
        results.add({"name": cell.name, "eval_bits_per_byte": 2.5})
    results.add({"name": {"text": "x", "model": "GPTB, 4 recent tokens", "lr": 8e-3, "seed": 0}, "train_seconds": 9})
    cells = [cell for cell in text.wanted(results, args) if results.line(**cell.name) is None]
    assert len({json.dumps(cell.name) for cell in cells}) == len(cells)
    tokens = [cell.name["tokens"] for cell in cells if "tokens" in cell.name and "change" not in cell.name]
    assert sorted(tokens) == [4_000_000, 8_000_000, 8_000_000]  # GPTB; GPT-2 and the LSTM
    changes = [cell.name["change"] for cell in cells if "change" in cell.name]
    assert changes == [change for change in text.GRID for _ in range(2)]  # GPTB and its twin
    for cell in cells:
        config = load_config(cell.recipe, cell.keys)
        more = text.MORE_LANES if cell.name.get("tokens", 0) == 8_000_000 else 1
        assert config.data.lanes * config.data.window == more * 8192


def test_a_run_that_crashed_or_was_stopped_is_made_again_and_one_that_diverged_is_not(tmp_path: Path):
    import side_by_side

    results = side_by_side.Results(tmp_path / "results.jsonl")
    for name, line in (("whole", {}), ("crashed", {"error": "out of memory"}), ("stopped", {"stopped": True})):
        results.add({"name": {"cell": name}} | line)
    results.add({"name": {"cell": "diverged"}, "error": side_by_side.DIVERGED})
    again = side_by_side.Results(tmp_path / "results.jsonl")
    finished = [n for n in ("whole", "crashed", "stopped", "diverged") if again.line(cell=n)]
    assert finished == ["whole", "diverged"]
    assert again.has_ended({"cell": "crashed"}) and not again.has_ended({"cell": "other"})


def test_a_run_that_crashes_is_tried_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    import side_by_side

    results = side_by_side.Results(tmp_path / "results.jsonl")
    cell = side_by_side.Cell({"cell": "without data"}, {"data.path": str(tmp_path / "nothing")}, len)
    side_by_side.run_cells(lambda _: [cell], results)
    assert [line["name"] for line in results.lines if "error" in line] == [cell.name] * 2
    assert len(results.lines) == 2 and results.has_crashed(cell.name)
    assert "1 runs crashed" in capfd.readouterr().err


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
