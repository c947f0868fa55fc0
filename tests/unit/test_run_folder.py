"""A run's folder has one writer, and nothing saved in it is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

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
