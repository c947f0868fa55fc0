"""A rank's end is reported once, and an echo of another's is one line."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from gptb_ds.distributed.error_report import report_error
from gptb_ds.distributed.world import World


def test_an_echo_of_another_ranks_end_is_one_line(capsys: pytest.CaptureFixture[str]):
    world = World(rank=1, size=2, host="node7")
    report_error(
        RuntimeError("[gloo/transport/tcp/pair.cc:525] Read error [127.0.0.1]: Connection reset by peer"), world
    )
    report_error(dist.DistBackendError("NCCL error"), world)
    err = capsys.readouterr().err
    assert err.count("[rank 1 on node7] lost contact with another rank") == 2 and "Traceback" not in err
    try:
        torch.zeros(2).reshape(3)
    except RuntimeError as error:
        report_error(error, world)
    err = capsys.readouterr().err
    assert "Traceback" in err and all(line.startswith("[rank 1 on node7]") for line in err.splitlines())
