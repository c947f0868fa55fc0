"""A run with Muon is resumed exactly, on other ranks too; its optimizer changes only when that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptb_ds.checkpoint.format import checkpoint_folder
from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.loading import load_any
from tests.harness.training import file_checksums, losses, metrics, rewind, train

MUON = {"optim__name": "muon", "run__eval_every": 0, "optim__lr": 5e-3}


@pytest.fixture(scope="module")
def saved(store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("muon") / "straight"
    train(run, store, ranks=2, stage=2, **MUON)
    return run


@pytest.mark.slow
def test_resumed_equals_straight(saved: Path, store, tmp_path: Path):
    resumed = rewind(saved, tmp_path / "resumed", 4)
    train(resumed, store, ranks=2, stage=2, **MUON)
    assert metrics(resumed) == metrics(saved)
    assert file_checksums(resumed, 12) == file_checksums(saved, 12)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (4, 1), (4, 3)])
def test_other_ranks_and_stages_go_on_alike(saved: Path, ranks, stage, store, tmp_path: Path):
    resumed = rewind(saved, tmp_path / "resumed", 4)
    train(resumed, store, ranks=ranks, stage=stage, **MUON)
    for update, loss in losses(saved).items():
        assert losses(resumed)[update] == pytest.approx(loss, rel=2e-5)


@pytest.mark.slow
def test_a_checkpoint_has_each_parameters_own_moments_by_name(saved: Path):
    reader = CheckpointReader(checkpoint_folder(saved, 12))
    for name, shape in reader.shapes().items():
        taken = ".h." in name and len(shape) == 2
        for kind in ("momentum_buffer",) if taken else ("exp_avg", "exp_avg_sq"):
            moment = reader.fetch(kind, name)
            assert moment.shape == shape and moment.dtype == torch.float32 and moment.abs().max() > 0
        with pytest.raises(KeyError):
            reader.fetch("exp_avg" if taken else "momentum_buffer", name)


@pytest.mark.slow
def test_the_model_of_its_checkpoint_loads(saved: Path):
    model, _ = load_any(str(saved))
    reader = CheckpointReader(checkpoint_folder(saved, 12))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reader.fetch("weight", name)), name


@pytest.mark.slow
def test_another_optimizer_is_refused_or_starts_its_moments_anew_once(saved: Path, store, tmp_path: Path):
    back = MUON | {"optim__name": "adamw"}
    resumed = rewind(saved, tmp_path / "resumed", 4)
    job = train(resumed, store, expect=2, **back)
    assert "optim.name was 'muon'" in job.text() and "--run.resume_optimizer switch" in job.text()
    switched = back | {"run__resume_optimizer": "switch"}
    train(resumed, store, **switched)
    found = losses(resumed)
    assert found.keys() == losses(saved).keys()
    assert found[5] == pytest.approx(losses(saved)[5], rel=1e-5), "the weights are the checkpoint's"
    # The same command again goes on from the new moments.
    again = rewind(resumed, tmp_path / "again", 8)
    train(again, store, **switched)
    assert metrics(again) == metrics(resumed)
    assert file_checksums(again, 12) == file_checksums(resumed, 12)
