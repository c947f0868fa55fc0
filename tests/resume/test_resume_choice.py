"""A run continues from the right checkpoint, and loses nothing that it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptb_ds.checkpoint.format import Manifest, checkpoint_folder, checkpoint_folders, read_manifest, verify
from gptb_ds.loading import load_any
from tests.harness import faults
from tests.harness.training import losses, metrics, rewind, train

pytestmark = pytest.mark.slow


def files_of(run: Path) -> dict[str, bytes]:
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"}


def steps(run: Path) -> list[int]:
    return [int(folder.name.split("-")[1]) for folder in checkpoint_folders(run)]


def test_a_damaged_newer_checkpoint_never_pushes_out_good_ones(straight: Path, store: Path, tmp_path: Path):
    run = rewind(straight, tmp_path / "run", 12)
    faults.flipped_byte(checkpoint_folder(run, 12))
    options = {"ranks": 2, "run__keep": 1, "run__save_every": 5, "train__updates": 11}
    job = train(run, store, **options)
    assert "passed over" in job.text(0) and "is now in" in job.text(0)
    assert steps(run) == [11]
    verify(checkpoint_folder(run, 11))
    assert (run / "previous-001/checkpoints/step-00000012/manifest.json").exists()
    assert "done: 11 updates" in train(run, store, **options).text(0)


def test_a_refused_start_moves_nothing(straight: Path, store: Path, tmp_path: Path):
    run = rewind(straight, tmp_path / "run", 12)
    before = files_of(run)
    four = str(checkpoint_folder(run, 4))
    for options in (
        {"run__resume": four, "data__seed": 9},
        {"run__resume": four, "data__max_document_tokens": 50},
        {"run__resume": "never", "train__precision": "fp16"},
        {"run__resume": "atuo"},
        {"run__resume": str(run)},
    ):
        job = train(run, store, ranks=2, expect=2, **options)
        assert job.text(1).strip() == "" and "Traceback" not in job.text(0)
        assert files_of(run) == before
    job = train(run, store, expect=2, run__resume=str(run))
    assert f"run.resume {run}: is a run, not one of its checkpoints; its newest is" in job.text(0)
    assert str(checkpoint_folder(run, 12)) in job.text(0)
    assert "run.resume atuo: no such folder" in train(run, store, expect=2, run__resume="atuo").text(0)
    job = train(run, store, expect=2, data__max_document_tokens=50)
    assert "data.max_document_tokens was None when this was saved and is 50 now" in job.text(0)


def test_what_is_left_behind_can_be_used(straight: Path, store: Path, tmp_path: Path):
    run = rewind(straight, tmp_path / "run", 12)
    train(run, store, ranks=2, run__resume=str(checkpoint_folder(run, 4)), train__updates=6, optim__lr=1e-4)
    assert steps(run) == [6, 4] and steps(run / "previous-001") == [12, 8]
    load_any(str(run / "previous-001"))
    assert metrics(run / "previous-001") == metrics(straight)
    train(run, store, ranks=2, run__resume="never")
    assert metrics(run) == metrics(straight)
    assert steps(run / "previous-002") == [6, 4]
    load_any(str(run / "previous-002"))


def test_a_checkpoint_of_another_run_brings_its_metrics(straight: Path, store: Path, tmp_path: Path):
    run = tmp_path / "run"
    train(run, store, ranks=2, optim__lr=1e-3)
    train(run, store, ranks=2, run__resume=str(checkpoint_folder(straight, 8)))
    assert metrics(run) == metrics(straight)
    assert losses(run / "previous-001") != losses(straight) and steps(run / "previous-001") == [12, 8, 4]


def test_a_requeued_job_continues_whatever_it_was_told_at_first(straight: Path, store: Path, tmp_path: Path):
    run = rewind(straight, tmp_path / "run", 8)
    job = train(run, store, ranks=2, fault=faults.requeued, run__resume="never")
    assert "now it is auto" in job.text(0) and "(update 8)" in job.text(0)
    assert metrics(run) == metrics(straight)


def test_checkpoints_that_only_a_newer_version_reads_are_no_damage(straight: Path, store: Path, tmp_path: Path):
    run = rewind(straight, tmp_path / "run", 8)
    for folder in checkpoint_folders(run):
        forged = Manifest(**{**read_manifest(folder).__dict__, "format": 9})
        (folder / "manifest.json").write_bytes(forged.to_json())
    before = files_of(run)
    assert "format 9, this version reads 3" in train(run, store, ranks=2, expect=2).text(0)
    assert files_of(run) == before


def test_a_lost_manifest_does_not_cost_the_checkpoint(straight: Path, store: Path, tmp_path: Path):
    run = rewind(straight, tmp_path / "run", 8)
    (checkpoint_folder(run, 8) / "manifest.json").unlink()
    job = train(run, store, ranks=2)
    assert f"resuming from {checkpoint_folder(run, 8)}" in job.text(0) and "passed over" not in job.text(0)
    assert metrics(run) == metrics(straight)


def test_a_checkpoint_that_has_lost_both_manifests_is_not_overwritten(straight: Path, store: Path, tmp_path: Path):
    run = rewind(straight, tmp_path / "run", 8)
    lost = checkpoint_folder(run, 8)
    for name in ("manifest.json", "manifest-copy.json"):
        (lost / name).unlink()
    before = files_of(lost)
    job = train(run, store, ranks=2)
    assert f"passed over {lost}" in job.text(0) and f"is now in {run / 'previous-001'}" in job.text(0)
    assert files_of(run / "previous-001/checkpoints" / lost.name) == before
    assert metrics(run) == metrics(straight)


def test_when_no_checkpoint_is_good_all_are_kept_aside(straight: Path, store: Path, tmp_path: Path):
    run = rewind(straight, tmp_path / "run", 8)
    for folder in checkpoint_folders(run):
        faults.flipped_byte(folder)
    train(run, store, ranks=2, run__keep=1)
    assert metrics(run) == metrics(straight)
    assert steps(run / "previous-001") == [8, 4]
