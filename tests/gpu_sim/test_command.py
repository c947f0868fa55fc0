"""The whole command on the make-believe device: evaluation, samples, saves, resume, and two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.processes import free_port
from tests.harness.training import TINY

from .conftest import Start


def train(device: Start, run: Path, store: Path, *options: str, ranks: int = 1, **variables: str) -> list[tuple]:
    """(exit code, standard output, standard error) of each rank. Each sees one GPU, whatever its local rank."""
    values = TINY | {"run.dir": run, "data.path": store, "run.hang_seconds": 120}
    args = ["train", *(str(word) for key, value in values.items() for word in (f"--{key}", value)), *options]
    port = str(free_port())
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
    started = []
    for rank in range(ranks):
        own = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        started.append(device("tests.gpu_sim.command", *args, **own, **variables))
    ended = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, ended, strict=True)]


@pytest.mark.slow
def test_train_evaluate_sample_save_and_resume(device, store, tmp_path):
    run = tmp_path / "run"
    options = ["--train.precision", "bf16", "--run.sample_every", "4", "--run.sample_tokens", "5"]
    ((code, output, errors),) = train(device, run, store, *options, "--train.updates", "6")
    assert code == 0, errors
    assert "on cuda, ZeRO 1, bf16" in output
    assert "sample after 4 updates" in output
    ((code, output, errors),) = train(device, run, store, *options, "--train.updates", "8")
    assert code == 0, errors
    assert "resuming from" in output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if "loss" in line] == list(range(1, 9))
    assert any("eval_loss" in line for line in lines)
    process = device("tests.gpu_sim.command", "evaluate", str(run), "--data", str(store), "--precision", "bf16")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "bits per byte" in output


@pytest.mark.slow
def test_two_ranks_that_each_see_one_gpu_train(device, store, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    options = ["--train.precision", "bf16", "--train.lane_groups", "2", "--train.recompute_every", "2"]
    options += ["--train.updates", "3", "--run.eval_every", "0", "--deepspeed_config", str(policy)]
    ended = train(device, tmp_path / "run", store, *options, "--optim.warmup_updates", "0", ranks=2)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "2 rank(s) on cuda, ZeRO 3, bf16" in ended[0][1]


@pytest.mark.slow
def test_two_ranks_on_one_gpu_are_refused_by_name(device, store, tmp_path):
    ended = train(device, tmp_path / "run", store, ranks=2, FAKE_CUDA_UUID="GPU-17")
    assert [code for code, *_ in ended] == [2, 2], ended
    assert "ranks 0 and 1 have the same GPU, GPU-17" in ended[0][2]


@pytest.mark.slow
def test_fp16_at_stage_0_is_refused(device, store, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    options = ["--train.precision", "fp16", "--deepspeed_config", str(policy)]
    ((code, _, errors),) = train(device, tmp_path / "run", store, *options)
    assert code == 2
    assert "fp16 at ZeRO stage 0" in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (
            "memory",
            ["CUDA out of memory. Tried to allocate 20.00 MiB", "holds 6 of the window's 6 columns for 8 lanes"],
        ),
        ("assert", ["CUDA error: device-side assert triggered (data.lanes 8 on 1 rank(s)", "CUDA_LAUNCH_BLOCKING=1"]),
    ],
)
def test_a_failure_of_the_gpu_is_one_line(failure, says, device, store, tmp_path):
    options = ["--run.eval_every", "0"]
    ((code, _, errors),) = train(device, tmp_path / "run", store, *options, FAKE_CUDA_FAILURE=failure)
    assert code == 1
    (line,) = [line for line in errors.splitlines() if "CUDA" in line]
    assert all(text in line for text in says), line
    assert "Traceback" not in errors
    if failure == "memory":
        assert "GiB that weights and optimizer leave of the GPU's 80.00 GiB" in line
        assert "--train.recompute_every 2 keeps 2 columns" in line and "--train.lane_groups 2 keeps 1/2" in line
