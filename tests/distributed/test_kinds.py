"""`model.kind`: the models to compare with go through the same training, checkpoints, evaluation and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from gptb_ds.cli import main
from gptb_ds.evaluation import EvaluateOptions, evaluate
from gptb_ds.loading import load_any
from tests.harness.training import file_checksums, losses, metrics, rewind, train

KINDS = {
    "gpt2": {"model__kind": "gpt2", "model__context": 12, "run__eval_tokens": 200},
    "gpt2-in-a-window": {"model__kind": "gpt2", "run__eval_tokens": 200},
    "lstm": {"model__kind": "lstm", "run__eval_tokens": 200},
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, store, tmp_path_factory: pytest.TempPathFactory):
    """(name, keys, run) of a model to compare with, trained by two ranks at stage 1."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    train(run, store, ranks=2, **KINDS[request.param])
    return request.param, KINDS[request.param], run


def test_a_run_that_resumes_is_the_run_that_was_never_stopped(trained, store, tmp_path: Path):
    _, keys, run = trained
    again = rewind(run, tmp_path / "again", 4)
    train(again, store, ranks=2, **keys)
    assert metrics(again) == metrics(run)
    assert file_checksums(again, 12) == file_checksums(run, 12)


def test_other_ranks_and_stages_go_on_with_the_same_columns_and_state(trained, store, tmp_path: Path):
    _, keys, run = trained
    again = rewind(run, tmp_path / "again", 4)
    train(again, store, ranks=1, stage=3, **keys)
    expected, found = losses(run), losses(again)
    assert found == pytest.approx(expected, rel=1e-5)


def test_evaluate_gives_the_figure_that_training_saw(trained, store):
    _, _, run = trained
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    for lanes, window in ((8, 6), (3, 17)):
        read = evaluate(EvaluateOptions(str(run), [str(store)], lanes=lanes, window=window, max_tokens=200))
        found = read.summary()
        if trained[0] == "lstm":  # a GPT-2's context slides by its own stride, from the window's edge on
            assert found["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
        assert found["targets"] == 200


def test_a_gpt2_is_exported_as_plain_gpt2_and_an_lstm_is_refused(trained, tmp_path: Path, capsys):
    name, _, run = trained
    code = main(["export", str(run), "--out", str(tmp_path / "out")])
    if name == "lstm":
        assert code == 2
        assert "transformers has no model for" in capsys.readouterr().err
        return
    assert code == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain) is GPT2LMHeadModel
    ours = load_any(str(run))[0].state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in plain.state_dict().items())
    back = load_any(str(tmp_path / "out"))[0].state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in back.items())


def test_a_model_to_compare_with_writes_no_text_and_says_so(trained, capsys):
    name, _, run = trained
    assert main(["generate", str(run), "--prompt", "x"]) == 2
    said = capsys.readouterr().err
    assert "a model to compare with" in said
    assert ("use transformers" in said) == (name != "lstm")


def test_another_kind_does_not_go_on_with_a_checkpoint(trained, store, tmp_path: Path):
    _, _, run = trained
    shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("lock"))
    job = train(tmp_path / "other", store, expect=2)
    assert "model.kind was" in job.text()


def test_keys_that_only_a_gptb_has_are_refused_all_at_once(store, tmp_path: Path, capsys):
    args = ["train", "--data.path", str(store), "--run.dir", str(tmp_path / "run"), "--model.kind", "lstm"]
    args += ["--run.sample_every", "5", "--model.carry", "shift", "--train.recompute_every", "2"]
    assert main(args) == 2
    said = capsys.readouterr().err
    for key in ("run.sample_every", "model.carry", "train.recompute_every"):
        assert f"{key} is not offered with model.kind lstm" in said
