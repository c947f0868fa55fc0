"""A rank's end is reported once, and an echo of another's is one line."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from gptb_ds.distributed.error_report import report_error
from gptb_ds.distributed.heartbeat import _Process
from gptb_ds.distributed.links import Loss
from gptb_ds.distributed.world import World
from gptb_ds.exit_codes import FAULT, HUNG


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


@pytest.mark.parametrize(("silent", "code"), [(True, HUNG), (False, FAULT)])
def test_the_exit_code_after_a_loss_does_not_depend_on_who_says_it(
    silent: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The heartbeats, or the backend that raises first because a third rank has ended."""
    monkeypatch.setattr(_Process, "loss", Loss(2, "node8", "is lost", silent))
    monkeypatch.setattr(_Process, "said", False)
    assert report_error(dist.DistBackendError("NCCL error"), World(rank=1, size=3, host="node7")) == code
    assert "stopping: rank 2 on node8 is lost" in capsys.readouterr().err
