"""A run's folder has one writer, and nothing saved in it is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptb_ds.checkpoint.resume import choose_checkpoint, is_own
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


def test_what_stands_in_the_way_is_refused_at_the_start(tmp_path: Path):
    """Not hours later, at the first save; and a checkpoint on a scratch that is not mounted is not passed over."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("metrics.jsonl", "config.yaml", "stop"):
        (run / name).mkdir()
        with pytest.raises(ConfigError, match=rf"{name}: is no file; move it away, or name another --run.dir"):
            RunFolder(str(run), World())
        (run / name).rmdir()
    for name in ("tokenizer", "checkpoints/step-00000008"):
        (run / name).write_text("")
        with pytest.raises(ConfigError, match=rf"{name}: is no folder; move it away, or name another --run.dir"):
            RunFolder(str(run), World())
        (run / name).unlink()
        (run / name).symlink_to(tmp_path / "unmounted")
        with pytest.raises(ConfigError, match=rf"{name}: a link that leads nowhere \(.*unmounted\); mount"):
            RunFolder(str(run), World())
        (run / name).unlink()
        (run / name).symlink_to(tmp_path)
        RunFolder(str(run), World()).release()


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


def test_what_resume_names_is_said_when_it_is_no_checkpoint(tmp_path: Path):
    folder = tmp_path / "run" / "checkpoints" / "step-00000008"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    for named, words in (
        (folder / "manifest.json", f"is a file; name the checkpoint's folder, {folder} perhaps"),
        (folder.parent, f"holds the checkpoints of a run, not one of its checkpoints; its newest is {folder}"),
        (tmp_path / "run", f"is a run, not one of its checkpoints; its newest is {folder}"),
        (tmp_path / "none", "no such folder; give auto, never or a checkpoint's folder"),
    ):
        with pytest.raises(ConfigError) as caught:
            choose_checkpoint(str(named), tmp_path / "other", World(), print)
        assert words in str(caught.value) and "\n" not in str(caught.value)
