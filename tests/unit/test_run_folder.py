"""A run's folder has one writer, and nothing saved in it is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptb_ds.checkpoint.resume import is_own
from gptb_ds.config import ConfigError
from gptb_ds.distributed.world import World
from gptb_ds.training.run_folder import RunFolder


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


def test_a_folder_that_no_save_would_reach_is_refused_at_the_start(tmp_path: Path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.parent.mkdir()
    checkpoints.symlink_to(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match=r"checkpoints \(a link to .*unmounted\): leads nowhere"):
        RunFolder(str(tmp_path / "run"), World())
    (tmp_path / "unmounted").write_text("")
    with pytest.raises(ConfigError, match="is no folder"):
        RunFolder(str(tmp_path / "run"), World())
    checkpoints.unlink()
    checkpoints.symlink_to("/proc")  # there, and nobody can write in it
    with pytest.raises(ConfigError, match=r"checkpoints \(a link to /proc\): cannot be written"):
        RunFolder(str(tmp_path / "run"), World())
    checkpoints.unlink()
    RunFolder(str(tmp_path / "run"), World()).release()
    assert not checkpoints.exists(), "to look changes nothing"


def test_what_is_set_aside_stays_on_the_file_system_of_its_link(tmp_path: Path):
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    run.mkdir()
    for step in (4, 8):
        (scratch / f"step-{step:08d}").mkdir(parents=True)
    (run / "checkpoints").symlink_to(scratch)
    folder = RunFolder(str(run), World())
    folder.set_aside([run / "checkpoints" / "step-00000008"])
    assert (run / "previous-001/checkpoints/step-00000008").resolve() == scratch / "previous-001" / "step-00000008"
    folder.set_aside([run / "checkpoints"])
    assert (run / "checkpoints").is_symlink()
    assert [p.name for p in sorted(scratch.iterdir())] == ["previous-001", "previous-002"]
    assert (run / "previous-002/checkpoints/step-00000004").is_dir()


def test_a_checkpoint_is_known_by_any_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    run.mkdir()
    (scratch / "step-00000004").mkdir(parents=True)
    (run / "checkpoints").symlink_to(scratch)
    (tmp_path / "best").symlink_to(run / "checkpoints" / "step-00000004")
    (tmp_path / "other" / "checkpoints" / "step-00000004").mkdir(parents=True)
    monkeypatch.chdir(run)
    for name in ("checkpoints/step-00000004", "../scratch/step-00000004", str(run / "checkpoints" / "step-00000004")):
        assert is_own(Path(name), run)
    assert is_own(tmp_path / "best", run)
    assert not is_own(tmp_path / "other" / "checkpoints" / "step-00000004", run)
