"""A run that goes on keeps what it began with, whatever "auto" means today."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gptb_ds.config import Config, load_config, save_config
from gptb_ds.training.kept_choice import kept_number, with_kept_order


def config(run: Path, **over: object) -> Config:
    return load_config(None, {"data.path": "store", "run.dir": str(run), "data.max_document_tokens": 9} | over)


def saved_before_the_keys(run: Path, stagger: bool) -> None:
    """The config.yaml of a run from when `data.stagger` was a truth value and tasks had no curriculum."""
    values = yaml.safe_load(save_config(config(run)))
    values["data"]["stagger"] = stagger
    del values["task"]
    (run / "config.yaml").write_text(yaml.safe_dump(values))


def test_a_new_run_takes_todays_choices(tmp_path: Path):
    new = with_kept_order(config(tmp_path))
    assert (new.data.stagger, new.task.curriculum) == ("on", "auto")
    assert with_kept_order(config(tmp_path, **{"data.max_document_tokens": None})).data.stagger == "off"


@pytest.mark.parametrize(("stagger", "kept"), [(False, "off"), (True, "on")])
def test_an_old_run_keeps_the_order_of_its_documents(stagger: bool, kept: str, tmp_path: Path):
    saved_before_the_keys(tmp_path, stagger)
    again = with_kept_order(config(tmp_path))
    assert (again.data.stagger, again.task.curriculum) == (kept, "off")
    anew = with_kept_order(config(tmp_path, **{"run.resume": "never"}))
    assert (anew.data.stagger, anew.task.curriculum) == ("on", "auto")
    (tmp_path / "config.yaml").write_text(save_config(again))
    assert with_kept_order(config(tmp_path)) == again


def test_what_is_given_stands(tmp_path: Path):
    saved_before_the_keys(tmp_path, False)
    assert with_kept_order(config(tmp_path, **{"data.stagger": "on"})).data.stagger == "on"


@pytest.mark.parametrize("content", ["[]", "data: 3", ": :", "task:\n  curriculum: [a]"])
def test_a_broken_file_keeps_nothing(content: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(content)
    assert with_kept_order(config(tmp_path)).data.stagger == "on"


def test_a_checkpoint_of_another_run_brings_its_choices(tmp_path: Path):
    """So that it isn't refused for an "auto" that means something else in a new folder."""
    saved_before_the_keys(tmp_path, False)
    new = config(tmp_path / "new", **{"run.resume": str(tmp_path / "checkpoints" / "step-00000004")})
    assert with_kept_order(new).data.stagger == "off"
    assert kept_number(new, "data.lanes") == 64


def test_checkpoints_behind_a_link_are_of_the_run_that_has_the_link(tmp_path: Path):
    run, elsewhere = tmp_path / "run", tmp_path / "large" / "disk"
    run.mkdir()
    (elsewhere / "step-00000004").mkdir(parents=True)
    (run / "checkpoints").symlink_to(elsewhere)
    saved_before_the_keys(run, False)
    named = config(tmp_path / "new", **{"run.resume": str(run / "checkpoints" / "step-00000004")})
    assert with_kept_order(named).data.stagger == "off"


def test_a_link_to_a_checkpoint_is_followed_to_its_run(tmp_path: Path):
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "best").symlink_to("run/checkpoints/step-00000004")
    saved_before_the_keys(run, False)
    assert with_kept_order(config(tmp_path / "new", **{"run.resume": str(tmp_path / "best")})).data.stagger == "off"


def test_a_requeued_job_keeps_its_choices_though_it_began_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Slurm repeats its command, `--run.resume never` included, and the run then goes on from its own checkpoint."""
    saved_before_the_keys(tmp_path, False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert with_kept_order(config(tmp_path, **{"run.resume": "never"})).data.stagger == "off"
