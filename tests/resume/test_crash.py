"""A crash at any instant loses little and corrupts nothing."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest

from gptb_ds.checkpoint.format import CheckpointError, checkpoint_folder, checkpoint_folders, verify
from tests.harness import faults
from tests.harness.training import file_checksums, losses, metrics, rewind, start, train

KILLS = 30
DAMAGES = [
    *(faults.truncated, faults.flipped_byte, faults.flipped_in_manifest),
    *(faults.no_manifest, faults.no_file, faults.garbage_manifest),
]
# Wide enough that writing a checkpoint takes a while: kills are to fall into it.
BIG = {
    "ranks": 2,
    "stage": 1,
    "model__n_embd": 128,
    "model__dropout": 0.1,
    "data__window": 3,
    "train__updates": 200,
    "run__save_every": 5,
    "run__eval_every": 45,
    "run__keep": 2,
}


@pytest.mark.slow
def test_thirty_kills_change_nothing(store, tmp_path: Path):
    """Ranks are killed at random instants, most of them in the middle of a save; the command is always the same."""
    chooser = random.Random(11)
    train(tmp_path / "straight", store, **BIG)
    kills = in_save = runs = 0
    while kills < KILLS:  # a fast machine ends a run before so many kills, and begins another
        run = tmp_path / f"killed-{runs}"
        runs += 1
        ended = False
        while not ended and kills < KILLS:
            job = start(run, store, **BIG)
            hit = _kill_somewhere(job, run, chooser, aim_at_save=kills % 3 != 0)
            if not job.text(0):
                job.kill()  # before the ranks have met, only their launcher can know
            codes = job.wait()
            ended = 0 in codes  # else every rank was killed, or failed because the other was
            assert ended or -9 in codes, (codes, job.text())
            kills += hit is not None
            in_save += hit == "save"
        train(run, store, **BIG)
        assert metrics(run) == metrics(tmp_path / "straight")
        assert file_checksums(run, 200) == file_checksums(tmp_path / "straight", 200)
    print(f"{kills} kills survived, {in_save} in the middle of a save, {runs} runs finished")
    assert in_save >= 10


def _kill_somewhere(job, run: Path, chooser: random.Random, aim_at_save: bool) -> str | None:
    """SIGKILL to a random rank: in a save that is under way, or after a random time. None: the job ended before."""
    victim = chooser.randrange(2)
    end = time.monotonic() + chooser.uniform(0.0, 3.0)
    newest = max((int(p.name.split("-")[1]) for p in checkpoint_folders(run)), default=0)
    saves = chooser.randrange(1, 3)
    while all(process.is_alive() for process in job.processes):
        if not aim_at_save and time.monotonic() > end:
            job.kill(victim)
            return "anywhere"
        if aim_at_save:
            folder = checkpoint_folder(run, newest + BIG["run__save_every"] * saves)
            if folder.exists() and not (folder / "manifest.json").exists():
                time.sleep(chooser.uniform(0, 0.01))
                job.kill(victim)
                return "save" if not (folder / "manifest.json").exists() else "anywhere"
        time.sleep(0.0005)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage, straight, store, tmp_path: Path):
    run = rewind(straight, tmp_path / "run", 12)
    reason = damage(checkpoint_folder(run, 12))
    job = train(run, store, ranks=2)
    assert f"passed over {checkpoint_folder(run, 12)}" in job.text(0) and reason in job.text(0)
    assert f"resuming from {checkpoint_folder(run, 8)}" in job.text(0)
    assert metrics(run) == metrics(straight)
    assert file_checksums(run, 12) == file_checksums(straight, 12)


@pytest.mark.slow
def test_nothing_good_left_starts_fresh(straight, store, tmp_path: Path):
    run = rewind(straight, tmp_path / "run", 4)
    faults.flipped_byte(checkpoint_folder(run, 4))
    job = train(run, store, ranks=2)
    assert "was altered" in job.text(0)
    assert metrics(run) == metrics(straight)


def test_a_planted_pickle_is_refused_and_never_run(straight, tmp_path: Path):
    """A stranger's checkpoint whose manifest fits: the tensors are a pickle that would write a file."""
    import pickle

    from gptb_ds.atomic_files import sha256_of
    from gptb_ds.checkpoint.format import Manifest, read_manifest
    from gptb_ds.loading import load_any

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    run = rewind(straight, tmp_path / "run", 12)
    folder = checkpoint_folder(run, 12)
    manifest = read_manifest(folder)
    files = dict(manifest.files)
    for name in files:
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    forged = Manifest(**{**manifest.__dict__, "files": files})
    (folder / "manifest.json").write_bytes(forged.to_json())
    verify(folder)  # checksums fit: a stranger can make them fit
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_any(str(folder))
    assert not (tmp_path / "pwned").exists()


def test_a_manifest_cannot_name_files_elsewhere(straight, tmp_path: Path):
    from gptb_ds.checkpoint.format import Manifest, read_manifest

    folder = checkpoint_folder(rewind(straight, tmp_path / "run", 12), 12)
    manifest = read_manifest(folder)
    forged = Manifest(**{**manifest.__dict__, "files": manifest.files | {"../../secret": {"bytes": 0, "sha256": ""}}})
    (folder / "manifest.json").write_bytes(forged.to_json())
    with pytest.raises(CheckpointError, match="no file of a checkpoint"):
        read_manifest(folder)


@pytest.mark.slow
def test_shapes_are_checked_before_anything_changes(straight, store, tmp_path: Path):
    """A forged manifest that claims this run's identity over tensors of another shape."""
    from gptb_ds.checkpoint.format import Manifest, read_manifest

    wide = tmp_path / "wide"
    train(wide, store, ranks=2, model__n_embd=32)
    run = rewind(straight, tmp_path / "run", 4)
    shutil.copytree(checkpoint_folder(wide, 12), checkpoint_folder(run, 12))
    folder = checkpoint_folder(run, 12)
    forged = {**read_manifest(folder).__dict__, "identity": read_manifest(checkpoint_folder(run, 4)).identity}
    (folder / "manifest.json").write_bytes(Manifest(**forged).to_json())
    job = train(run, store, ranks=2, expect=2)
    assert "the model needs F32" in job.text(0)
    assert "Traceback" not in job.text()


@pytest.mark.slow
def test_old_checkpoints_go_but_never_the_last_good_one(store, tmp_path: Path):
    run = tmp_path / "run"
    train(run, store, run__keep=1, run__save_every=3)
    assert [p.name for p in checkpoint_folders(run)] == ["step-00000012"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses(run).keys() == set(range(1, 13)) and lines[-1]["update"] == 12
