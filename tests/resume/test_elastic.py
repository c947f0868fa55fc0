"""Resuming is elastic: other ranks, other ZeRO stages, other precision, same columns and state."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptb_ds.checkpoint.format import checkpoint_folder
from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.checkpoint.writer import CheckpointWriter, assign_parameters
from gptb_ds.config import OptimConfig
from gptb_ds.distributed.world import World
from gptb_ds.export import ExportOptions, export
from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective
from tests.harness.processes import run_ranks
from tests.harness.training import losses, rewind, train

SAVED_AT, UPDATES = 4, 12
COMMON = {
    "train__updates": UPDATES,
    "run__save_every": SAVED_AT,
    "run__eval_every": 0,
    "data__window": 8,
}
# Every stage to every stage, on another number of ranks than it was saved on, and back.
PAIRS = [
    pytest.param(source, saved_on, target, ranks, id=f"zero{source}x{saved_on}-to-zero{target}x{ranks}")
    for source in (0, 1, 2, 3)
    for target in (0, 1, 2, 3)
    for saved_on, ranks in ([(2, 1), (2, 4), (4, 2), (1, 2)][(source + target) % 4],)
]
# Bytes at most in memory while a run is exported.
PEAK = """
import resource, sys
from gptb_ds.export import ExportOptions, export
export(ExportOptions(*sys.argv[1:]))
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
OFFLOAD = {"stage": 2, "overlap_comm": False, "offload_optimizer": {"device": "cpu"}}


@pytest.fixture(scope="module")
def saved(store, tmp_path_factory: pytest.TempPathFactory):
    """Runs by (stage, ranks, precision), trained once to the end with checkpoints on the way."""
    folder = tmp_path_factory.mktemp("saved")

    def get(stage: int, ranks: int, precision: str = "fp32") -> Path:
        run = folder / f"{stage}-{ranks}-{precision}"
        if not run.exists():
            train(run, store, stage=stage, ranks=ranks, train__precision=precision, **COMMON)
        return run

    return get


def lanes_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return CheckpointReader(checkpoint_folder(run, step)).lanes(0, 8, (3, 16))


@pytest.mark.slow
@pytest.mark.parametrize(("source", "saved_on", "target", "ranks"), PAIRS)
def test_other_stage_and_ranks(source, saved_on, target, ranks, saved, store, tmp_path: Path, record_property):
    straight = saved(source, saved_on)
    resumed = rewind(straight, tmp_path / "resumed", SAVED_AT)
    job = train(resumed, store, stage=target, ranks=ranks, **COMMON)
    assert f"world_size {saved_on} -> {ranks}" in job.text(0)
    if source != target:
        assert f"zero_stage {source} -> {target}" in job.text(0)
    want, got = losses(straight), losses(resumed)
    assert got.keys() == want.keys() == set(range(1, UPDATES + 1))
    worst = max(abs(got[u] - want[u]) / abs(want[u]) for u in want)
    record_property("largest_relative_loss_difference", worst)
    print(f"zero {source} on {saved_on} -> zero {target} on {ranks}: largest relative loss difference {worst:.1e}")
    assert worst < 1e-5
    ours, theirs = lanes_of(resumed, UPDATES), lanes_of(straight, UPDATES)
    assert torch.equal(ours["ordinal"], theirs["ordinal"]) and torch.equal(ours["offset"], theirs["offset"])


def _load_and_save(world: World, folder: Path, copy: Path, stage: int, precision: str) -> None:
    """Takes a checkpoint into an engine and writes what the engine then holds, without an update between."""
    reader = CheckpointReader(folder)
    engine = build_engine(world, stage, precision)
    reader.check_model(engine.fp32_state.shapes())
    engine.fp32_state.load(reader.fetch, reader.manifest.progress["adam_steps"])
    share = 8 // world.size
    lanes = reader.lanes(world.rank * share, (world.rank + 1) * share, (3, 16))
    saver = CheckpointWriter(copy, world, keep=1)
    owner = assign_parameters(engine.fp32_state.shapes(), saver.writers)
    manifest = dataclasses.replace(reader.manifest, world_size=world.size)
    saver.begin(manifest, engine.fp32_state.export(lambda name: owner[name] == world.rank), lanes, {})
    saver.finish()


def build_engine(world: World, stage: int, precision: str):
    from gptb_ds.training.engine import Engine

    config = GPTBConfig(vocab_size=259, n_positions=4, num_slots=4, n_layer=1, n_head=2, n_embd=16)
    return Engine(
        WindowObjective(GPTBLMHeadModel(config)),
        world,
        lanes=8 // world.size,
        lane_groups=1,
        precision=precision,
        optim=OptimConfig(),
        policy={"zero_optimization": {"stage": stage, "overlap_comm": False}},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "precision"), [(1, 0, "fp32"), (4, 2, "fp32"), (2, 3, "bf16"), (2, 0, "bf16"), (4, 1, "bf16")]
)
def test_restored_bitwise_on_other_ranks(ranks, stage, precision, saved, tmp_path: Path):
    """Weights, moments, state and position: loaded on other ranks and saved again, not one bit has changed."""
    folder = checkpoint_folder(saved(3, 2), SAVED_AT)
    run_ranks(_load_and_save, ranks, folder, tmp_path / "copy", stage, precision)
    before, after = CheckpointReader(folder), CheckpointReader(checkpoint_folder(tmp_path / "copy", SAVED_AT))
    for name in before.shapes():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(before.fetch(kind, name), after.fetch(kind, name)), f"{kind} of {name}"
    for key, tensor in before.lanes(0, 8, (3, 16)).items():
        assert torch.equal(tensor, after.lanes(0, 8, (3, 16))[key]), key


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), sorted({pair.values[:2] for pair in PAIRS}))
def test_a_checkpoint_of_any_stage_and_ranks_is_exported_on_one_cpu(stage, ranks, saved, tmp_path: Path):
    folder = checkpoint_folder(saved(stage, ranks), SAVED_AT)
    model = AutoModelForCausalLM.from_pretrained(export(ExportOptions(str(folder), str(tmp_path / "out"))))
    reader = CheckpointReader(folder)
    assert set(reader.shapes()) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.fetch("weight", name), parameter), name


@pytest.mark.slow
def test_an_export_takes_the_memory_of_the_model(store, tmp_path: Path):
    """From a run on two ranks at stage 3: the most that the process held, beyond what a tiny model needs.

    The pages of the file that is being read count, though the kernel could take them back.
    """
    shapes = {"tiny": {}, "large": {"model__n_embd": 512, "model__n_layer": 4}}
    most = {}
    for name, shape in shapes.items():
        once = {"train__updates": 1, "optim__warmup_updates": 1, "run__eval_every": 0}
        train(tmp_path / name, store, stage=3, ranks=2, **once, **shape)
        command = [sys.executable, "-c", PEAK, str(tmp_path / name), str(tmp_path / f"{name}-out")]
        most[name] = int(subprocess.run(command, capture_output=True, check=True).stdout.split()[-1])
    reader = CheckpointReader(checkpoint_folder(tmp_path / "large", 1))
    size = 4 * sum(math.prod(shape) for shape in reader.shapes().values())
    print(f"{(most['large'] - most['tiny']) / size:.2f} x the model's {size / 2**20:.0f} MiB")
    shard = max(path.stat().st_size for path in (tmp_path / "large").rglob("model-*.safetensors"))
    assert shard < 0.7 * size and most["large"] - most["tiny"] < 1.5 * size + shard


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_other_precision(source, target, saved, store, tmp_path: Path):
    straight = saved(2, 2, source)
    resumed = rewind(straight, tmp_path / "resumed", SAVED_AT)
    job = train(resumed, store, stage=1, ranks=1, train__precision=target, **COMMON)
    assert f"train.precision '{source}' -> '{target}'" in job.text(0)
    want, got = losses(straight), losses(resumed)
    for update in want:
        assert got[update] == pytest.approx(want[update], rel=1e-2)


@pytest.mark.slow
def test_offload_and_back(saved, store, tmp_path: Path):
    straight = saved(2, 2)
    resumed = rewind(straight, tmp_path / "resumed", SAVED_AT)
    train(resumed, store, policy={"zero_optimization": OFFLOAD}, ranks=2, **COMMON)
    back = rewind(resumed, tmp_path / "back", SAVED_AT * 2)
    train(back, store, stage=2, ranks=2, **COMMON)
    want = losses(straight)
    for run in (resumed, back):
        got = losses(run)
        assert max(abs(got[u] - want[u]) / want[u] for u in want) < 1e-5


@pytest.mark.slow
def test_bf16_goes_on_from_its_master_weights(saved, store, tmp_path: Path):
    """Stage 0 in bf16 keeps its masters elsewhere than the other stages: to and from it, nothing is rounded."""
    straight = saved(0, 2, "bf16")
    resumed = rewind(straight, tmp_path / "resumed", SAVED_AT)
    train(resumed, store, stage=3, ranks=2, train__precision="bf16", **COMMON)
    want, got = losses(straight), losses(resumed)
    for update in want:
        assert got[update] == pytest.approx(want[update], rel=2e-3)


@pytest.mark.slow
def test_what_must_not_change_is_refused(saved, store, tmp_path: Path):
    straight = saved(1, 1)
    for key, value, words in (
        ("data__lanes", 16, "data.lanes was 8 when this was saved and is 16 now"),
        ("data__window", 4, "data.window was 8 when this was saved and is 4 now"),
        ("model__n_embd", 32, "model.n_embd was 16 when this was saved and is 32 now"),
        ("train__seed", 9, "train.seed was 0 when this was saved and is 9 now"),
        ("data__seed", 9, "data.seed was 0 when this was saved and is 9 now"),
    ):
        run = rewind(straight, tmp_path / key, SAVED_AT)
        job = train(run, store, expect=2, **COMMON | {key: value})
        assert words in job.text(0)
        assert "--run.resume never" in job.text(0)
        assert "Traceback" not in job.text()


@pytest.mark.slow
def test_another_corpus_is_refused_and_never_starts_anew(saved, store, tmp_path: Path):
    from gptb_ds.cli import main
    from tests.harness.training import write_corpus

    other = tmp_path / "other"
    texts = write_corpus(tmp_path / "texts", seed=4)
    assert main(["prepare", "--source", str(texts), "--out", str(other), "--holdout", "0.2"]) == 0
    run = rewind(saved(1, 1), tmp_path / "run", SAVED_AT)
    job = train(run, other, expect=2, **COMMON)
    assert "data was '" in job.text(0)
    train(run, other, run__resume="never", **COMMON)
    assert checkpoint_folder(run / "previous-001", SAVED_AT).is_dir()
    assert (run / "previous-001" / "metrics.jsonl").is_file()
    assert losses(run).keys() == set(range(1, UPDATES + 1))


@pytest.mark.slow
def test_a_named_checkpoint_goes_back_and_sets_newer_ones_aside(saved, store, tmp_path: Path):
    straight = saved(1, 1)
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    train(run, store, run__resume=str(checkpoint_folder(run, 8)), optim__lr=0.001, **COMMON)
    assert checkpoint_folder(run / "previous-001", UPDATES).is_dir()
    assert losses(run)[8] == losses(straight)[8]
    assert losses(run)[UPDATES] != losses(straight)[UPDATES]
    manifest = json.loads((checkpoint_folder(run, UPDATES) / "manifest.json").read_text())
    assert manifest["settings"]["optim.lr"] == 0.001
