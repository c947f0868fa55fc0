"""A decay of the rate that starts from a checkpoint of the stable part, as if it had been planned from the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptb_ds.checkpoint.format import checkpoint_folder
from tests.harness.training import file_checksums, metrics, train

COMMON = {"optim__schedule": "wsd", "run__eval_every": 0, "ranks": 2, "stage": 1}


@pytest.mark.slow
def test_it_is_the_run_that_was_to_decay_there_from_the_start(store, tmp_path: Path):
    long, decayed, planned = (tmp_path / name for name in ("long", "decayed", "planned"))
    train(long, store, optim__decay_updates=1, train__updates=10, **COMMON)
    decay = {"optim__decay_from": 8, "train__updates": 14}
    train(decayed, store, run__resume=checkpoint_folder(long, 8), **decay, **COMMON)
    train(planned, store, **decay, **COMMON)
    rates = {line["update"]: line["lr"] for line in map(json.loads, metrics(planned)) if "lr" in line}
    assert rates[8] == rates[4] > rates[9] > rates[14]
    assert [line for line in metrics(planned) if json.loads(line)["update"] > 8] == metrics(decayed)[-7:]
    assert file_checksums(decayed, 14) == file_checksums(planned, 14)
