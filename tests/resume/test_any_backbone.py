"""By configuration alone every tested family trains, resumes bit for bit, evaluates, generates, exports and loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptb_ds.cli import main
from gptb_ds.evaluation import EvaluateOptions, evaluate
from gptb_ds.export import ExportOptions, export
from gptb_ds.loading import load_any
from gptb_ds.model import GPTBDecoderLMHeadModel
from tests.harness.backbones import FAMILIES
from tests.harness.elsewhere import run_elsewhere
from tests.harness.training import file_checksums, metrics, rewind, train

IDS = torch.tensor([[*b"the end"]]) + 3


def keys(family: str) -> dict[str, object]:
    """Lane groups and recomputation are on, and the families share the four stages of ZeRO and two precisions."""
    return {
        "stage": FAMILIES.index(family) % 4,
        "train__precision": ("fp32", "fp32", "bf16")[FAMILIES.index(family) % 3],
        "model__backbone": family,
        "model__n_layer": 2,
        "model__dropout": 0.1,
        "train__updates": 3,
        "train__lane_groups": 2,
        "train__recompute_every": 2,
        "run__save_every": 1,
        "run__eval_every": 3,
        "run__eval_tokens": 60,
        "run__sample_every": 3,
        "run__sample_tokens": 4,
    }


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a family, trained when it is asked for first."""
    runs: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in runs:
            run = tmp_path_factory.mktemp(family) / "run"
            train(run, store, **keys(family))
            runs[family] = run
        return runs[family]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_resumes_bit_for_bit(family: str, trained, store: Path, tmp_path: Path) -> None:
    run = trained(family)
    again = rewind(run, tmp_path / "again", 1)
    said = train(again, store, **keys(family)).text(0)
    assert "resuming from" in said and f"4 slots over {family};" in said
    assert metrics(again) == metrics(run)
    assert file_checksums(again, 3) == file_checksums(run, 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_evaluates_and_generates(family: str, trained, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(family)
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    read = evaluate(EvaluateOptions(str(run), [str(store)], lanes=4, window=6, max_tokens=60)).summary()
    same = 1e-5 if keys(family)["train__precision"] == "fp32" else 1e-2  # what is loaded is float32
    assert read["eval_loss"] == pytest.approx(last["eval_loss"], rel=same)
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "the", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("the")


PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("the end", add_special_tokens=False, return_tensors="pt").input_ids
    logits = model(ids).logits.flatten().tolist()
    found[folder] = [type(model).__module__, logits, model.generate(ids, max_new_tokens=6, do_sample=False).tolist()]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_exports_load_by_auto_classes_on_a_machine_without_this_package(
    trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folders = [export(ExportOptions(str(trained(family)), str(tmp_path / family))) for family in FAMILIES]
    capfd.readouterr()
    load_any(str(folders[0]))
    assert capfd.readouterr() == ("", "")  # nothing of what transformers says about every model
    elsewhere = run_elsewhere(PROGRAM, tmp_path, *folders)
    for folder in folders:
        module, logits, tokens = elsewhere[str(folder)]
        assert module.startswith("transformers_modules.")
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model) is GPTBDecoderLMHeadModel and model.config.backbone.model_type == folder.name
        torch.testing.assert_close(torch.tensor(logits), model(IDS).logits.flatten())
        assert tokens == model.generate(IDS, max_new_tokens=6, do_sample=False).tolist()
