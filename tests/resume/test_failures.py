"""A failure ends a job promptly and says why, and that requests to stop are heard."""

from __future__ import annotations

import functools
import json
import math
import os
import resource
import signal
import time
from pathlib import Path

import pytest

import tests.training_runs
from gptb_ds.checkpoint.format import checkpoint_folders, verify
from tests.training_runs import losses, metrics, start, train, with_environment

LONG = {"train__updates": 100000, "run__save_every": 0, "run__eval_every": 0}


def wait_for_update(run: Path, update: int, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < update:
        assert time.monotonic() < end, "training did not get that far"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(number, store, tmp_path: Path):
    run = tmp_path / "run"
    job = start(run, store, ranks=2, **LONG)
    wait_for_update(run, 5)
    job.signal(number, 1)
    assert job.wait(30) == [85, 85], job.text()
    (only,) = checkpoint_folders(run)
    assert verify(only).step == len(metrics(run))


@pytest.mark.slow
def test_a_stop_file_and_a_time_limit(store, tmp_path: Path):
    run = tmp_path / "file"
    job = start(run, store, ranks=2, **LONG)
    wait_for_update(run, 5)
    (run / "stop").touch()
    assert job.wait(30) == [85, 85], job.text()
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
    wait_for_update(run, 5)
    job.kill(rank)
    codes = job.wait(30)
    assert codes[rank] == -9 and codes[1 - rank] not in (0, 85), codes
    assert "lost contact with another rank" in job.text(1 - rank)
    assert "Traceback" not in job.text()


FAULTS = {"ZeroDivisionError": ZeroDivisionError, "ValueError": ValueError, "OSError": OSError}


def _main_that_fails(args, rank, *others) -> None:
    """Rank 1 meets a fault of its own in its 8th update."""
    from gptb_ds.training.engine import Engine

    update, calls = Engine.update, []

    def failing(self, *call):
        calls.append(1)
        if rank == 1 and len(calls) == 8:
            raise FAULTS[os.environ["FAULT_OF_RANK_1"]]("the fault of rank 1")
        return update(self, *call)

    Engine.update = failing
    tests.training_runs._main(args, rank, *others)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
def test_a_rank_that_raises_is_heard_once(kind, store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tests.training_runs, "main_of_a_rank", functools.partial(with_environment, _main_that_fails))
    (tmp_path / "environment.json").write_text(json.dumps({"FAULT_OF_RANK_1": kind}))
    job = train(tmp_path / "run", store, ranks=2, expect=1, timeout=30, **LONG)
    assert job.text().count("Traceback") == 1
    assert "[rank 1 on " in job.text(1) and "the fault of rank 1" in job.text(1)
    assert "lost contact with another rank" in job.text(0)


@pytest.mark.slow
def test_a_stopped_rank_is_named(store, tmp_path: Path):
    """A hung collective: rank 1 is frozen, the others wait for it."""
    run = tmp_path / "run"
    job = start(run, store, ranks=3, data__lanes=9, **LONG, run__hang_seconds=5)
    wait_for_update(run, 5)
    job.signal(signal.SIGSTOP, 1)
    for rank in (0, 2):
        job.processes[rank].join(40)
        assert job.processes[rank].exitcode == 70, job.text()
    job.signal(signal.SIGCONT, 1)
    job.wait(60)
    assert "no progress for 5 s" in job.text(0)
    assert "ranks that do not answer" in job.text(0) and "1" in job.text(0).split("ranks that do not answer")[1]


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(store, tmp_path: Path):
    run = tmp_path / "run"
    job = start(run, store, **LONG)
    wait_for_update(run, 2)
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


def _small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_disk_that_takes_no_more(policy, store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The system refuses to write large files (a limit on their size, as a full disk would)."""
    run = tmp_path / "run"
    train(run, store, train__updates=4)
    good = checkpoint_folders(run)
    monkeypatch.setattr(tests.training_runs, "main_of_a_rank", _limited_main)
    job = train(run, store, train__updates=12, run__on_save_error=policy, expect=1)
    assert "could not be written" in job.text(0) and "the last good checkpoint is after update 4" in job.text(0)
    assert "Traceback" not in job.text()
    assert [p for p in checkpoint_folders(run) if (p / "manifest.json").exists()] == good
    verify(good[0])
    assert losses(run).keys() >= ({*range(1, 13)} if policy == "continue" else {*range(1, 9)})


def _limited_main(*args) -> None:
    _small_files_only()
    tests.training_runs._main(*args)


def _main_with_small_metrics(*args) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    tests.training_runs._main(*args)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_disk_that_takes_no_more_metrics(policy, store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "run"
    monkeypatch.setattr(tests.training_runs, "main_of_a_rank", _main_with_small_metrics)
    options = {
        "model__n_embd": 4,
        "train__updates": 400,
        "run__save_every": 50,
        "run__eval_every": 0,
        "run__log_every": 50,
    }
    job = train(run, store, ranks=2, expect=1, run__on_save_error=policy, **options)
    assert f"{run}/metrics.jsonl" in job.text(0) and "the last good checkpoint is after update" in job.text(0)
    assert "Traceback" not in job.text()
    assert ("training goes on" in job.text(0)) == (policy == "continue")
    assert ("update 400/400" in job.text(0)) == (policy == "continue")
    newest = verify(next(folder for folder in checkpoint_folders(run) if (folder / "manifest.json").exists()))
    assert newest.step in losses_so_far(run), "no checkpoint claims lines that are not there"


def losses_so_far(run: Path) -> set[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return {json.loads(line)["update"] for line in lines if line.endswith("\n")}


def _main_with_infinite_losses(*args) -> None:
    """The loss of rank 0 is infinite in updates 5 and 6, its gradients are not."""
    from gptb_ds.model.objective import WindowObjective

    forward, calls = WindowObjective.forward, []

    def infinite(self, *call):
        loss, state = forward(self, *call)
        calls.append(1)
        return loss + (math.inf if len(calls) in (5, 6) and os.environ.get("RANK", "0") == "0" else 0.0), state

    WindowObjective.forward = infinite
    tests.training_runs._main(*args)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_is_skipped(stage, store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "run"
    monkeypatch.setattr(tests.training_runs, "main_of_a_rank", _main_with_infinite_losses)
    train(run, store, stage=stage, ranks=2, run__eval_every=0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if line.get("skipped")] == [5, 6]
    assert lines[11]["loss"] < lines[0]["loss"]


def _main_with_slow_reading(*args) -> None:
    from gptb_ds.checkpoint.reader import CheckpointReader

    fetch = CheckpointReader.fetch

    def slow(self, kind, name):
        time.sleep(0.15)
        return fetch(self, kind, name)

    CheckpointReader.fetch = slow
    tests.training_runs._main(*args)


@pytest.mark.slow
def test_a_slow_resume_is_no_hang(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "run"
    train(run, store, ranks=2, train__updates=4)
    monkeypatch.setattr(tests.training_runs, "main_of_a_rank", _main_with_slow_reading)
    began = time.monotonic()
    train(run, store, ranks=2, train__updates=6, run__hang_seconds=4)
    assert time.monotonic() - began > 5, "else it showed nothing"


def _main_that_hangs_in_reading(args, rank, *others) -> None:
    import gptb_ds.training.setup as run

    if rank == 1:
        run.read_inputs = lambda *_: time.sleep(120)
    tests.training_runs._main(args, rank, *others)


@pytest.mark.slow
def test_a_rank_that_hangs_before_training_is_named(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tests.training_runs, "main_of_a_rank", _main_that_hangs_in_reading)
    job = start(tmp_path / "run", store, ranks=2, run__hang_seconds=5)
    assert job.wait(60) == [70, 70], job.text()
    assert "no progress for 5 s since start" in job.text(1) and "test_failures.py" not in job.text(0)
