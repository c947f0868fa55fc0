"""The experiment on wide updates: its cells are valid runs, and each contender's rate is found in the same way."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gptb_ds.config import load_config

FOLDER = Path(__file__).parents[2] / "launch" / "experiments"


@pytest.fixture(scope="module")
def batch() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("batch")
    finally:
        sys.path.remove(str(FOLDER))


def cells_of(batch: ModuleType, folder: Path, **over: object) -> tuple[argparse.Namespace, object]:
    values = {"store": "s", "model": "small", "tokens": 655_360, "seeds": 2, "device": "cpu", "one_rate": False}
    values |= {"contenders": ["muon"], "sizes": [512]} | over
    results = batch.Results(folder / "results.jsonl")
    return results, batch.Cells(argparse.Namespace(**values), results)


@pytest.mark.parametrize("model", ["small", "large"])
def test_every_cell_is_a_run(batch: ModuleType, model: str, tmp_path: Path):
    _, cells = cells_of(batch, tmp_path, model=model, contenders=list(batch.LABELS), sizes=list(batch.SIZES))
    wanted = cells.wanted()
    assert len(wanted) == len(cells.pairs()) == 26
    for cell in wanted:
        config = load_config(None, cell.keys)
        assert config.data.lanes * config.data.window == cell.name["size"]
        assert config.data.lanes // config.train.most_groups >= 64


def test_the_recipe_is_the_last_contender(batch: ModuleType, tmp_path: Path):
    _, cells = cells_of(batch, tmp_path, contenders=["late"], sizes=[32768])
    recipe, (cell,) = load_config("wide", {}), cells.wanted()
    same = {"data.path": "data/stdlib", "data.stagger": "auto", "train.graph": recipe.train.graph}
    ours = load_config(None, cell.keys | same)
    for group in ("model", "data", "optim", "train"):
        assert getattr(recipe, group) == getattr(ours, group)
    assert recipe.data.is_staggered
    assert recipe.train.batch_phases() == ((64, 393_216), (16, 524_288), (4, 589_824), (1, None))


def test_rates_are_tried_until_neither_neighbour_is_better(batch: ModuleType, tmp_path: Path):
    results, cells = cells_of(batch, tmp_path)
    bits = {4e-3: 2.6, 8e-3: 2.5, 16e-3: 2.4, 32e-3: None}
    made = []
    while todo := [cell for cell in cells.wanted() if results.line(**cell.name) is None]:
        name = todo[0].name
        made.append((name["lr"], name["seed"]))
        found = bits[name["lr"]]
        line = {"error": "not finite"} if found is None else {"eval_bits_per_byte": found + name["seed"] / 5}
        results.add({"name": name, "updates": 1280, "device": "cpu", "cpu_seconds": 9.4, **line})
    assert made == [(8e-3, 0), (4e-3, 0), (16e-3, 0), (32e-3, 0), (16e-3, 1)]
    assert "| Muon | **2.50** ±0.100 (2 seeds); 1,280 updates; 9 s; 0.016 of 4 |" in cells.table()


def test_without_a_search_the_other_seeds_take_the_best_rate_known(batch: ModuleType, tmp_path: Path):
    results, cells = cells_of(batch, tmp_path, one_rate=True)
    (first,) = cells.wanted()
    assert (first.name["lr"], first.name["seed"]) == (8e-3, 0)
    for rate, bits in ((8e-3, 2.5), (4e-3, 2.4)):
        results.add({"name": first.name | {"lr": rate}, "eval_bits_per_byte": bits})
    left = [cell.name for cell in cells.wanted() if results.line(**cell.name) is None]
    assert [(name["lr"], name["seed"]) for name in left] == [(4e-3, 1)]


def test_what_was_made_is_not_made_again(batch: ModuleType, tmp_path: Path):
    results, cells = cells_of(batch, tmp_path)
    name = cells.wanted()[0].name
    results.add({"name": name, "eval_bits_per_byte": 2.5})
    again = batch.Results(tmp_path / "results.jsonl")
    assert again.line(**name) == {"name": name, "eval_bits_per_byte": 2.5}


def test_the_published_runs_make_the_published_table_and_a_picture(batch: ModuleType, tmp_path: Path):
    docs = Path(__file__).parents[2] / "docs"
    (tmp_path / "results.jsonl").write_text((docs / "batch.jsonl").read_text())
    page = (docs / "batch.md").read_text()
    both = [cells_of(batch, tmp_path, model=model, seeds=3)[1] for model in ("small", "large")]
    for cells in both:
        assert cells.table() in page
    batch.picture(both, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
