"""The experiments' commands: every cell is a configuration that `train` takes, and a run leaves its line, once."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def text_plan(folder: Path, **given: object) -> argparse.Namespace:
    import text

    asked = {"name": "x", "small": False, "tokens": 1_000_000, "models": list(text.MODELS), "parts": list(text.PARTS)}
    asked["changes"] = list(text.GRID)
    return argparse.Namespace(**asked | {"out": folder, "eval_tokens": 1000, "device": "cuda"} | given)


def names_of(cells: Iterable[Any], results: Any) -> list[dict[str, Any]]:
    """The names of the cells that have no line yet."""
    return [cell.name for cell in cells if results.line(**cell.name) is None]


@pytest.mark.parametrize("small", [False, True])
def test_every_run_of_text_has_as_many_tokens_an_update(tmp_path: Path, small: bool):
    import text

    args = text_plan(tmp_path, small=small)
    results = text.Results(tmp_path / "results.jsonl")
    for cell in list(text.wanted(results, text_plan(tmp_path, small=small, parts=["variants"]))):
        results.add({"name": cell.name, "eval_bits_per_byte": 2.5, "flops_per_token": 1e6})
    cells = list(text.wanted(results, args))
    assert {cell.name["model"] for cell in cells} == set(text.MODELS)
    assert {cell.name["change"] for cell in cells if "change" in cell.name} == set(text.GRID)
    assert len({json.dumps(cell.name) for cell in cells}) == len(cells)
    for cell in cells:
        config = load_config(cell.recipe, cell.keys)
        assert config.data.lanes * config.data.window == (1024 if small else 8192)
        assert config.model.kind != "gpt2" or config.model.context == 2 * config.data.window


def test_the_rate_of_each_contender_is_searched_until_both_its_neighbours_are_worse(tmp_path: Path):
    import text

    args = text_plan(tmp_path, models=["LSTM", "LSTM of 1 layer"], parts=["variants", "rates", "seeds"])
    results = text.Results(tmp_path / "results.jsonl")
    bits = {0.004: 2.6, 0.008: 2.5, 0.016: 2.4, 0.032: 2.3, 0.064: 2.35}
    rates: list[float] = []
    while waiting := names_of(text.wanted(results, args), results):
        name = waiting[0]
        if name["lr"] == 0.064 and 0.064 not in rates:  # a run that crashed twice holds up nothing
            results.add({"name": name, "error": "a crash"})
        else:
            more = 0.1 if name["model"] == "LSTM" else 0.0
            results.add({"name": name, "eval_bits_per_byte": bits[name["lr"]] + more, "flops_per_token": 1e6})
        rates.append(name["lr"])
    assert rates == [0.008, 0.008, 0.016, 0.032, 0.064, 0.064, 0.004, 0.032, 0.032]
    assert [line["name"]["seed"] for line in results.lines[-2:]] == [1, 2]
    assert all(line["name"]["model"] == "LSTM of 1 layer" for line in results.lines[2:])


def test_nothing_is_chosen_before_all_variants_have_ended(tmp_path: Path):
    import text

    args = text_plan(tmp_path, models=["GPT-2", "GPT-2, context 128"], parts=["variants", "rates", "seeds"])
    results = text.Results(tmp_path / "results.jsonl")
    first, second = names_of(text.wanted(results, args), results)
    results.add({"name": first, "eval_bits_per_byte": 2.0, "flops_per_token": 1e6})
    assert names_of(text.wanted(results, args), results) == [second]
    results.add({"name": second, "error": "a crash"})
    chosen = names_of(text.wanted(results, args), results)
    assert {name["model"] for name in chosen if name != second} == {"GPT-2"}


def test_with_equal_arithmetic_the_others_read_as_many_more_tokens(tmp_path: Path):
    import text

    args = text_plan(tmp_path, models=["GPTB, 4 recent tokens", "GPT-2", "LSTM"], parts=["variants", "equal", "longer"])
    results = text.Results(tmp_path / "results.jsonl")
    flops = {"GPTB, 4 recent tokens": 4.2e6, "GPT-2": 0.6e6, "LSTM": 0.5e6}
    for name in names_of(text.wanted(results, args), results):
        results.add({"name": name, "eval_bits_per_byte": 2.5, "flops_per_token": flops[name["model"]]})
    tokens = [(name["model"], name["tokens"]) for name in names_of(text.wanted(results, args), results)]
    assert tokens[:2] == [("GPT-2", 7_000_000), ("LSTM", 8_400_000)]
    assert {number for _, number in tokens[2:]} == {4_000_000} and len(tokens) == 5


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


def test_a_longer_run_takes_the_place_of_one_that_was_stopped(tmp_path: Path):
    import tables

    name, other = {"task": "s5", "seed": 0}, {"task": "s5", "seed": 1}
    lines = [{"name": name, "stopped": True, "updates": 50}, {"name": other, "stopped": False, "updates": 100}]
    for seed, updates in ((name, 40), (name, 90), (other, 120), (name, 60)):
        tables.take_in(lines, {"name": seed, "stopped": True, "updates": updates, "keys": {"data.path": "x", "a": 1}})
    assert [line["updates"] for line in lines] == [90, 100] and lines[0]["keys"] == {"a": 1}
