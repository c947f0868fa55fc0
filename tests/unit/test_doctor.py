"""The proof of `gptb-ds doctor`: a sound machine passes, and each thing that is wrong is named with its remedy."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from gptb_ds.cli import main


@pytest.mark.slow
def test_sound_machine(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--data", str(store), "--run", str(tmp_path / "not" / "yet")]) == 0
    said = capsys.readouterr().out
    for package in ("torch", "deepspeed", "transformers"):
        assert importlib.metadata.version(package) in said
    assert "2 ranks over" in said and "held out" in said and "GiB free" in said
    assert said.splitlines()[-1] == "ready to train"
    assert not (tmp_path / "not").exists()


@pytest.mark.slow
def test_each_thing_that_is_wrong_has_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    (tmp_path / "file").write_text("a run cannot be written into a file")
    assert main(["doctor", "--data", str(tmp_path / "nowhere"), "--run", str(tmp_path / "file" / "run")]) == 1
    lines = capsys.readouterr().out.splitlines()
    bad = [line for line in lines if line.startswith("! ")]
    assert [line.split()[1] for line in bad] == ["store", "run", "all-reduce"]
    assert "run gptb-ds prepare" in bad[0] and "choose another --run.dir" in bad[1] and "GLOO_SOCKET_IFNAME" in bad[2]
    for name in ("compiler", "mpirun", "srun", "pdsh"):
        assert any(line.startswith("- ") and line.split()[1] == name and "not found" in line for line in lines)
    assert lines[-1] == "wrong: store, run folder, all-reduce"
