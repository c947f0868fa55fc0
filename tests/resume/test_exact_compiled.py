"""A compiled run on CPUs repeats bit by bit too, when it is resumed and when its step is compiled anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import faults
from tests.harness.training import file_checksums, metrics, rewind, train

COMPILED = {"train__compile": "on", "run__eval_every": 0, "run__save_every": 4, "train__updates": 8}


@pytest.mark.slow
def test_a_compiled_run_that_is_resumed_equals_a_straight_one(store: Path, tmp_path: Path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    job = train(straight, store, fault=faults.empty_compile_cache(tmp_path / "cache-1"), **COMPILED)
    assert job.text().count("the step is compiled") == 1  # for training alone, not for what is measured before it
    rewind(straight, resumed, 4)
    train(resumed, store, fault=faults.empty_compile_cache(tmp_path / "cache-2"), **COMPILED)
    assert metrics(resumed) == metrics(straight)
    assert file_checksums(resumed, 8) == file_checksums(straight, 8)
