"""A run whose documents grow: stopped and continued, on the same ranks or others, it is the run that never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptb_ds.cli import main
from tests.harness.training import file_checksums, losses, metrics, rewind, start, train

KEYS = {
    "data__lanes": 16, "data__window": 8, "data__keep_state_probability": 0.1, "model__carry": "shift",
    "model__num_slots": 3, "model__n_embd": 32, "model__initializer_range": 0.18, "optim__lr": 0.01,
    "task__grow_at": 0.6, "task__start_length": 2, "train__updates": 60, "run__save_every": 20, "run__eval_every": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(store, run) of parity, whose documents grew on both sides of the checkpoint after update 20."""
    folder = tmp_path_factory.mktemp("grown")
    assert main(["prepare", "--source", "task:parity?length=40&count=500", "--out", str(folder / "store")]) == 0
    train(folder / "run", folder / "store", ranks=2, **KEYS)
    return folder / "store", folder / "run"


def growth(run: Path, step: int) -> list[int]:
    manifest = json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return manifest["progress"]["grown"]


def test_the_run_grows_before_and_after_the_checkpoint(grown):
    _, run = grown
    assert 0 < len(growth(run, 40)) < len(growth(run, 60)) or 0 < len(growth(run, 20)) < len(growth(run, 40))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lengths = [line["document_tokens"] for line in lines if "accuracy" in line]
    assert lengths[0] == 2
    assert lengths == sorted(lengths)
    assert lengths[-1] == min(40, 2 * 2 ** len([column for column in growth(run, 60) if column < 60 * 8]))


@pytest.mark.parametrize("step", [20, 40])
def test_on_the_same_ranks_to_the_last_bit(grown, step: int, tmp_path: Path):
    store, run = grown
    again = rewind(run, tmp_path / "again", step)
    train(again, store, ranks=2, **KEYS)
    assert metrics(again) == metrics(run)
    assert file_checksums(again, 60) == file_checksums(run, 60)


def test_on_other_ranks_with_the_same_growth(grown, tmp_path: Path):
    store, run = grown
    again = rewind(run, tmp_path / "again", 20)
    train(again, store, ranks=1, stage=0, **KEYS)
    assert growth(again, 60) == growth(run, 60)
    assert losses(again) == pytest.approx(losses(run), rel=1e-3)


def test_a_run_says_how_its_documents_grow_and_does_not_go_on_without(grown, tmp_path: Path):
    store, run = grown
    again = rewind(run, tmp_path / "again", 20)
    said = start(again, store, ranks=1, stage=0, **KEYS, task__curriculum="off")
    assert said.wait() == [2]
    assert (
        "task.curriculum was 'auto, documents of 2 tokens at first' when this was saved and is 'off' now" in said.text()
    )
    straight = start(tmp_path / "run", store, ranks=1, stage=0, **KEYS | {"train__updates": 4})
    assert straight.wait() == [0]
    assert "documents of up to 2 tokens now, 40 later (task.curriculum auto)" in straight.text()
