"""A GPU whose memory does not suffice ends a run with one line that says what would need less."""

from __future__ import annotations

import pytest
import torch

from tests.harness import faults
from tests.harness.training import start


@pytest.mark.slow
def test_a_rank_without_memory_says_what_would_fit(store, tmp_path):
    fault = faults.raises_in_update(torch.OutOfMemoryError, 3)
    job = start(tmp_path / "run", store, ranks=2, fault=fault, data__window=6, data__lanes=8)
    codes = job.wait()
    assert codes[1] == 1, job.text()
    (line,) = [line for line in job.text(1).splitlines() if "the fault of rank 1" in line]
    assert "holds 6 of the window's 6 columns for 4 lanes" in line
    assert "--train.recompute_every 2 keeps 2 columns" in line
    assert "--train.lane_groups 2 keeps 1/2 of the lanes" in line
    assert "Traceback" not in job.text(1)
