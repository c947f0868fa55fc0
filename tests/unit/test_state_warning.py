"""When a run says that its state is being ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptb_ds.config import OptimConfig, RunConfig, TrainConfig
from gptb_ds.training.reporter import Reporter
from gptb_ds.training.train_state import RunFacts

SAID = "the state is being ignored"


@pytest.fixture
def reporter(tmp_path: Path) -> Reporter:
    """Of a run of 16 tokens an update, whose length is given in tokens: 10 updates."""
    train, run = TrainConfig(tokens=160), RunConfig(dir=str(tmp_path))
    made = Reporter(RunFacts(8, 2, OptimConfig(), train, run, None, {}, {}), speaks=True)
    made.start(0, 10)
    return made


def evaluation(update: int, swapped: float) -> dict[str, float | int | None]:
    return {"update": update, "eval_loss": 2.0, "eval_bits_per_byte": None, "state_swapped": swapped}


def test_the_last_evaluation_alone_is_enough(reporter: Reporter, capsys: pytest.CaptureFixture[str]):
    for update, swapped in ((0, 0.0), (5, 0.5), (10, 0.001)):
        reporter.evaluation(evaluation(update, swapped))
    assert capsys.readouterr().out.count(SAID) == 1


def test_one_before_the_end_is_not(reporter: Reporter, capsys: pytest.CaptureFixture[str]):
    for update, swapped in ((0, 0.0), (5, 0.001), (10, 0.5)):
        reporter.evaluation(evaluation(update, swapped))
    assert SAID not in capsys.readouterr().out
