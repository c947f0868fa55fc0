"""A regression test on learning: the recipe learns parity and S3, and holds four times the length it was trained at."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptb_ds.cli import main
from gptb_ds.evaluation import EvaluateOptions, evaluate_task
from tests.harness.training import launch

LENGTH = 30


@pytest.mark.slow
@pytest.mark.parametrize(("task", "updates"), [("parity", 150), ("s3", 300)])
def test_a_task_is_learnt_and_held_at_four_times_the_training_length(task: str, updates: int, tmp_path: Path):
    store, run = tmp_path / "store", tmp_path / "run"
    source = f"task:{task}?length={LENGTH}&min_length=1&count=15000"
    assert main(["prepare", "--source", source, "--out", str(store)]) == 0
    keys = {"data.path": store, "run.dir": run, "train.updates": updates, "train.seed": 1, "data.seed": 1}
    keys |= {"optim.warmup_updates": 25, "run.state_health": "false", "run.eval_tokens": 1000}
    args = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    job = launch(["train", "--config", "state-tracking", *args], 1, tmp_path / "output")
    assert job.wait() == [0], job.text()
    score = evaluate_task(EvaluateOptions(str(run), task=task, max_length=4 * LENGTH, device="cpu"))
    assert score.longest_99 == 4 * LENGTH, score
