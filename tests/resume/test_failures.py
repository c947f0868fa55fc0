"""A failure ends a job promptly and says why, and that requests to stop are heard."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import pytest

from gptb_ds.checkpoint.format import checkpoint_folders, verify
from tests.harness import faults
from tests.harness.processes import HANG_SECONDS, PATIENCE
from tests.harness.training import losses, metrics, start, train, wait_for_lines

LONG = {"train__updates": 100000, "run__save_every": 0, "run__eval_every": 0}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(number, store, tmp_path: Path):
    run = tmp_path / "run"
    job = start(run, store, ranks=2, **LONG)
    wait_for_lines(run, 5, job)
    job.signal(number, 1)
    assert job.wait() == [85, 85], job.text()
    (only,) = checkpoint_folders(run)
    assert verify(only).step == len(metrics(run))


@pytest.mark.slow
def test_a_stop_file_and_a_time_limit(store, tmp_path: Path):
    run = tmp_path / "file"
    job = start(run, store, ranks=2, **LONG)
    wait_for_lines(run, 5, job)
    (run / "stop").touch()
    assert job.wait() == [85, 85], job.text()
    assert "stop exists" in job.text(0)
    assert not (run / "stop").exists(), "obeyed, it must not stop the run again"
    run = tmp_path / "limit"
    job = train(run, store, expect=85, run__max_seconds=3, **LONG)
    assert "time limit" in job.text(0)
    assert verify(checkpoint_folders(run)[0]).step == len(metrics(run))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other(rank, store, tmp_path: Path):
    run = tmp_path / "run"
    job = start(run, store, ranks=2, **LONG)
    wait_for_lines(run, 5, job)
    job.kill(rank)
    codes = job.wait()
    assert codes[rank] == -9 and codes[1 - rank] not in (0, 85), codes
    assert "lost contact with another rank" in job.text(1 - rank)
    assert "Traceback" not in job.text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ZeroDivisionError, ValueError, OSError])
def test_a_rank_that_raises_is_heard_once(kind, store, tmp_path: Path):
    job = train(tmp_path / "run", store, ranks=2, expect=1, fault=faults.raises_in_update(kind, 8), **LONG)
    assert job.text().count("Traceback") == 1
    assert "[rank 1 on " in job.text(1) and "the fault of rank 1" in job.text(1)
    assert "lost contact with another rank" in job.text(0)


@pytest.mark.slow
def test_a_stopped_rank_is_named(store, tmp_path: Path):
    """A hung collective: rank 1 is frozen, the others wait for it."""
    run = tmp_path / "run"
    job = start(run, store, ranks=3, data__lanes=9, **LONG, run__hang_seconds=HANG_SECONDS)
    wait_for_lines(run, 5, job)
    job.signal(signal.SIGSTOP, 1)
    for rank in (0, 2):
        job.processes[rank].join(PATIENCE)
        assert job.processes[rank].exitcode == 70, job.text()
    job.signal(signal.SIGCONT, 1)
    job.wait()
    assert f"no progress for {HANG_SECONDS} s" in job.text(0)
    assert "ranks that do not answer" in job.text(0) and "1" in job.text(0).split("ranks that do not answer")[1]


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(store, tmp_path: Path):
    run = tmp_path / "run"
    job = start(run, store, **LONG)
    wait_for_lines(run, 2, job)
    second = train(run, store, ranks=2, expect=2, **LONG)
    assert "another training run is writing here" in second.text(0)
    assert second.text(1).strip() == ""
    job.kill()
    job.wait()
    # A lock left by a dead run is no obstacle.
    train(run, store)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_updates_that_are_not_finite_are_skipped_and_then_end_the_run(stage, store, tmp_path: Path):
    """A learning rate that throws the weights out of what float32 can hold."""
    run = tmp_path / "run"
    job = train(run, store, stage=stage, ranks=2, expect=1, optim__lr=1e25, optim__clip=0, optim__warmup_updates=0,
                train__updates=60, train__max_bad_updates=3, run__save_every=1, run__eval_every=0)  # fmt: skip
    assert "updates in a row were not finite" in job.text(0)
    assert "Traceback" not in job.text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped", False) for line in lines[-3:]] == [True] * 3
    assert not lines[0].get("skipped", False)
    good = [line["update"] for line in lines if not line.get("skipped")]
    assert int(checkpoint_folders(run)[0].name.split("-")[1]) == good[-1], "none of those amid the bad updates"
    assert f"the last good checkpoint is after update {good[-1]}" in job.text(0)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_disk_that_takes_no_more(policy, store, tmp_path: Path):
    """The system refuses to write large files (a limit on their size, as a full disk would)."""
    run = tmp_path / "run"
    train(run, store, train__updates=4)
    good = checkpoint_folders(run)
    job = train(run, store, fault=faults.small_files, train__updates=12, run__on_save_error=policy, expect=1)
    assert "could not be written" in job.text(0) and "the last good checkpoint is after update 4" in job.text(0)
    assert "Traceback" not in job.text()
    assert [p for p in checkpoint_folders(run) if (p / "manifest.json").exists()] == good
    verify(good[0])
    assert losses(run).keys() >= ({*range(1, 13)} if policy == "continue" else {*range(1, 9)})


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_disk_that_takes_no_more_metrics(policy, store, tmp_path: Path):
    run = tmp_path / "run"
    options = {
        "model__n_embd": 4,
        "train__updates": 400,
        "run__save_every": 50,
        "run__eval_every": 0,
        "run__log_every": 50,
    }
    job = train(run, store, ranks=2, expect=1, fault=faults.smaller_files, run__on_save_error=policy, **options)
    assert f"{run}/metrics.jsonl" in job.text(0) and "the last good checkpoint is after update" in job.text(0)
    assert "Traceback" not in job.text()
    assert ("training goes on" in job.text(0)) == (policy == "continue")
    assert ("update 400/400" in job.text(0)) == (policy == "continue")
    assert policy == "continue" or f"stopping: rank 0 on {socket.gethostname()} has ended" in job.text(1)
    newest = verify(next(folder for folder in checkpoint_folders(run) if (folder / "manifest.json").exists()))
    assert newest.step in losses_so_far(run), "no checkpoint claims lines that are not there"


def losses_so_far(run: Path) -> set[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return {json.loads(line)["update"] for line in lines if line.endswith("\n")}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_is_skipped(stage, store, tmp_path: Path):
    run = tmp_path / "run"
    train(run, store, fault=faults.infinite_losses, stage=stage, ranks=2, run__eval_every=0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if line.get("skipped")] == [5, 6]
    assert lines[11]["loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_a_slow_resume_is_no_hang(store, tmp_path: Path):
    run = tmp_path / "run"
    train(run, store, ranks=2, train__updates=4)
    began = time.monotonic()
    train(run, store, ranks=2, fault=faults.slow_reading, train__updates=6, run__hang_seconds=HANG_SECONDS)
    assert time.monotonic() - began > HANG_SECONDS, "else it showed nothing"


@pytest.mark.slow
def test_a_rank_that_hangs_before_training_is_named(store, tmp_path: Path):
    job = start(tmp_path / "run", store, ranks=2, fault=faults.hangs_in_reading, run__hang_seconds=5)
    assert job.wait() == [70, 70], job.text()
    assert "no progress for 5 s since start" in job.text(1) and "faults.py" not in job.text(0)
