"""The claims about training's small parts: schedule, metrics, requests to stop, ranks, the run's folder."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gptb_ds.config import ConfigError, OptimConfig
from gptb_ds.distributed import join
from gptb_ds.distributed.error_report import report
from gptb_ds.distributed.join import find_rank
from gptb_ds.distributed.slurm import slurm_continues, slurm_end
from gptb_ds.distributed.world import World, derive_seed
from gptb_ds.training.metrics import MetricsLog, Progress, read_metrics
from gptb_ds.training.run_folder import RunFolder
from gptb_ds.training.schedule import learning_rate
from gptb_ds.training.stop_requests import SIGNALS, StopRequests


def test_schedules():
    cosine = OptimConfig(lr=2.0, warmup_updates=10, schedule="cosine")
    rates = [learning_rate(n, cosine, 100) for n in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[9:]))
    middle = 10 + (101 - 10) / 2
    assert learning_rate(int(middle) - 1, cosine, 100) == pytest.approx(1.0, abs=0.03)
    linear = OptimConfig(lr=1.0, warmup_updates=0, schedule="linear")
    assert [learning_rate(n, linear, 3) for n in range(3)] == pytest.approx([0.75, 0.5, 0.25])
    constant = OptimConfig(lr=1.0, warmup_updates=2, schedule="constant")
    assert [learning_rate(n, constant, 4) for n in range(4)] == pytest.approx([0.5, 1, 1, 1])


def test_metrics_are_cut_where_training_goes_on(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for update in (1, 2, 3):
        log.write({"update": update, "loss": float("nan") if update == 2 else 0.5})
    log.close()
    with path.open("a") as file:
        file.write('{"update": 4, "lo')  # what a kill leaves
    assert [line["update"] for line in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[1]["loss"] is None  # NaN is not JSON
    log = MetricsLog(path)
    log.cut_after(2)
    log.write({"update": 3, "loss": 0.25})
    log.close()
    assert [(line["update"], line["loss"]) for line in read_metrics(path)] == [(1, 0.5), (2, None), (3, 0.25)]
    path.write_text('{"update": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON line"):
        read_metrics(path)


def test_progress_is_plain_lines_off_a_terminal():
    said: list[str] = []
    progress = Progress(20, 0, log_every=5, write=said.append)
    for update in range(1, 21):
        line = {"update": update, "loss": 2.0, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 1234.5}
        progress.update(line, 2.0 / math.log(2))
    assert [text.split()[1] for text in said] == ["1/20", "5/20", "10/20", "15/20", "20/20"]
    assert "loss 2.0000 | bpb 2.885 | grad 0.500 | lr 1.00e-03 | 1,234 tok/s | ETA 0:00" in said[-1]


def test_signals_are_noted_and_handlers_put_back():
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = handlers[signal.SIGUSR1]
    with StopRequests() as stop:
        assert not stop.pending()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.pending() and stop.reason == "received SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before
    try:
        with StopRequests() as stop:
            stop.ignore_more()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not stop.pending()
        os.kill(os.getpid(), signal.SIGUSR1)  # the process goes out: nothing ends it but itself
    finally:
        for number in SIGNALS:
            signal.signal(number, handlers[number])


def test_clocks_and_files_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with StopRequests() as stop:
        stop.watch(tmp_path / "stop", 100, time.monotonic() - 101, margin=0)
        assert stop.pending() and "time limit" in str(stop.reason)
    with StopRequests() as stop:
        stop.watch(tmp_path / "stop", None, time.monotonic(), margin=0)
        (tmp_path / "stop").touch()
        assert stop.pending() and "exists" in str(stop.reason)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    with StopRequests() as stop:
        stop.watch(None, None, time.monotonic(), margin=30)
        assert not stop.pending()
        stop.watch(None, None, time.monotonic(), margin=61)
        assert stop.pending()


def test_slurm_end():
    assert slurm_end({"SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    assert slurm_end({"SLURM_JOB_END_TIME": "Unknown"}) is None
    assert slurm_end({}) is None


TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
STEP = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}


def test_how_ranks_are_found():
    assert find_rank({}) is None
    assert find_rank(TORCH) == TORCH
    assert find_rank(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}) == TORCH
    # A Slurm batch script, and one task alone, are single processes.
    assert find_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None
    assert find_rank(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT"):
        find_rank(STEP)
    with pytest.raises(ValueError, match="sets RANK but not WORLD_SIZE"):
        find_rank({"RANK": "0"})
    # mpirun inside a Slurm allocation: its daemons' place in Slurm is not ours.
    with pytest.raises(ValueError, match="mpirun started 8 ranks, but the environment sets WORLD_SIZE=4"):
        find_rank(TORCH | {"OMPI_COMM_WORLD_SIZE": "8"})


def test_mpi_is_asked_before_slurm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(join, "_ask_mpi", lambda env: {"RANK": "asked"})
    inside_slurm = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert find_rank(inside_slurm | {"OMPI_COMM_WORLD_SIZE": "24"}) == {"RANK": "asked"}
    assert find_rank({"PMI_SIZE": "2"}) == {"RANK": "asked"}
    assert find_rank(inside_slurm | {"PMI_SIZE": "4"}) == TORCH


def test_the_address_for_other_hosts_is_not_the_loopback_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.1.2.3")
    assert join._own_address() == "10.1.2.3"
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")  # Debian's /etc/hosts
    monkeypatch.setattr(socket, "socket", lambda *_: Probe())
    assert join._own_address() == "10.4.5.6"


class Probe:
    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def connect(self, address: tuple[str, int]) -> None:
        pass

    def getsockname(self) -> tuple[str, int]:
        return "10.4.5.6", 1


def test_random_streams_are_independent():
    seeds = {derive_seed(seed, name, rank) for seed in range(3) for name in ("dropout", "data") for rank in range(5)}
    assert len(seeds) == 30
    assert derive_seed(1, "dropout", 0) == derive_seed(1, "dropout", 0)


def test_a_folder_has_one_writer(tmp_path: Path):
    first = RunFolder(str(tmp_path / "run"), World())
    with pytest.raises(ConfigError, match="another training run is writing here"):
        RunFolder(str(tmp_path / "run"), World())
    first.release()
    RunFolder(str(tmp_path / "run"), World()).release()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(str(tmp_path / "file"), World())


def test_setting_aside_loses_nothing(tmp_path: Path):
    folder = RunFolder(str(tmp_path), World())
    for content in ("one", "two"):
        (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
        (tmp_path / "metrics.jsonl").write_text(content)
        folder.set_aside([tmp_path / "checkpoints", tmp_path / "metrics.jsonl", tmp_path / "none"])
    assert (tmp_path / "previous-001" / "metrics.jsonl").read_text() == "one"
    assert (tmp_path / "previous-002" / "metrics.jsonl").read_text() == "two"
    assert folder.set_aside([tmp_path / "none"]) is None


def test_an_echo_of_another_ranks_end_is_one_line(capsys: pytest.CaptureFixture[str]):
    world = World(rank=1, size=2, host="node7")
    report(RuntimeError("[gloo/transport/tcp/pair.cc:525] Read error [127.0.0.1]: Connection reset by peer"), world)
    report(dist.DistBackendError("NCCL error"), world)
    err = capsys.readouterr().err
    assert err.count("[rank 1 on node7] lost contact with another rank") == 2 and "Traceback" not in err
    try:
        torch.zeros(2).reshape(3)
    except RuntimeError as error:
        report(error, world)
    err = capsys.readouterr().err
    assert "Traceback" in err and all(line.startswith("[rank 1 on node7]") for line in err.splitlines())


def test_plot_draws_runs_side_by_side(tmp_path: Path):
    from gptb_ds.cli import main

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [{"update": n, "tokens": n * 10, "loss": 3.0 / n} for n in range(1, 6)]
        lines.append({"update": 5, "eval_loss": 1.0, "eval_bits_per_byte": 1.4})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "loss.png"
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(tmp_path), "--out", str(out)]) == 2
    assert main(["plot", str(tmp_path / "a"), "--out", str(tmp_path / "x.nonsense")]) == 2


def test_progress_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    progress = Progress(20_000, 9_000, log_every=5)
    line = {"update": 9_001, "loss": 12.3456, "grad_norm": 10.125, "lr": 1e-3, "tokens_per_second": 12345.6}
    progress.update(line, 12.25)
    progress.close()
    assert "bpb 12.250 grad 10.125 lr 1.00e-03 12,346 tok/s" in terminal.getvalue()


def test_lines_that_the_disk_does_not_take_are_kept(tmp_path: Path):
    """A limit on the size of files, as a full disk would be."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
        log.write({"update": 1, "loss": 0.5})
        for update in (2, 3):
            with pytest.raises(OSError, match=r"File too large: .*metrics.jsonl"):
                log.write({"update": update, "loss": 0.5})
        with pytest.raises(OSError, match=r"metrics.jsonl"):
            log.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.sync()
    assert [line["update"] for line in read_metrics(log.path)] == [1, 2, 3]


def test_when_slurm_started_a_job_before():
    assert not slurm_continues({}) and not slurm_continues({"SLURM_RESTART_COUNT": "0"})
    assert slurm_continues({"SLURM_RESTART_COUNT": "2"})
    assert not slurm_continues({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "1"})
    assert slurm_continues({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1"})
