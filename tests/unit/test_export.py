"""An exported folder is whole or not there, and loads where this package is not."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

import gptb_ds.model
from gptb_ds import export as export_module
from gptb_ds.export import ExportOptions, code_files, export
from gptb_ds.model.configuration import UNLIMITED
from tests.harness.elsewhere import run_elsewhere
from tests.harness.models import small_gptb

BYTES = ByT5Tokenizer(extra_ids=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `load_any` reads, as it was written before exports carried their code."""
    folder = tmp_path_factory.mktemp("source")
    small_gptb(vocab_size=len(BYTES), eos_token_id=BYTES.eos_token_id).save_pretrained(folder)
    BYTES.save_pretrained(folder)
    (folder / "metrics.jsonl").write_text(
        '{"update": 7, "loss": 1.5, "tokens": 99}\n{"update": 7, "eval_loss": 1.25}\n'
    )
    return folder


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(ExportOptions(str(source), str(tmp_path_factory.mktemp("out") / "model")))


def test_the_folder_has_what_it_needs_and_no_pickle(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer_config.json"} <= names
    assert {path.name for path in code_files()} <= names and not [
        name for name in names if name.endswith((".bin", ".pt"))
    ]
    card = (exported / "README.md").read_text()
    assert "| loss | 1.5 |" in card and "| eval loss | 1.25 |" in card and "| tokens | 99 |" in card
    assert [path.name for path in exported.parent.iterdir()] == ["model"]


def test_the_code_in_the_folder_is_the_packages_own_and_complete(exported: Path) -> None:
    package = Path(gptb_ds.model.__file__).parent
    code = {path.stem for path in exported.glob("*.py")}
    assert {"modeling", "configuration", "recurrence", "cache"} <= code
    for name in code:
        text = (exported / f"{name}.py").read_text()
        assert text == (package / f"{name}.py").read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in code  # `from . import x` is not seen by transformers' loader


def test_other_programs_read_the_context_rightly(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["n_positions"] == UNLIMITED and config["slot_positions"] == config["num_slots"] == 6
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert model.config.max_position_embeddings == tokenizer.model_max_length == UNLIMITED
    assert model.transformer.wpe.weight.shape[0] == 6
    assert model.generation_config.eos_token_id == BYTES.eos_token_id and tokenizer.padding_side == "left"


PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("the end", add_special_tokens=False, return_tensors="pt").input_ids
output = model(ids)
output.past_key_values.save(out + "/state.safetensors", model)
tokens = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=None)
text = pipeline("text-generation", model=model, tokenizer=tokenizer)("the end", max_new_tokens=8, do_sample=False)
model.save_pretrained(out + "/again")
again = AutoModelForCausalLM.from_pretrained(out + "/again", trust_remote_code=True)
assert torch.equal(again(ids).logits, output.logits)
logits = output.logits.flatten().tolist()
print(json.dumps([type(model).__module__, logits, tokens.tolist(), text[0]["generated_text"]]))
"""


@pytest.mark.slow
def test_it_loads_on_a_machine_without_this_package(exported: Path, tmp_path: Path) -> None:
    """With only what torch and transformers need on the path."""
    module, logits, tokens, text = run_elsewhere(PROGRAM, tmp_path, exported, tmp_path)
    assert module.startswith("transformers_modules.")
    model, ids = AutoModelForCausalLM.from_pretrained(exported), torch.tensor([[*b"the end"]]) + 3
    torch.testing.assert_close(torch.tensor(logits), model(ids).logits.flatten())
    assert tokens == model.generate(ids, max_new_tokens=8, do_sample=False).tolist()
    assert text.startswith("the end")


@pytest.mark.parametrize("where", ["weights", "tokenizer", "card"])
def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "weights":
        monkeypatch.setattr("gptb_ds.model.GPTBLMHeadModel.save_pretrained", full)
    elif where == "tokenizer":
        monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as error:
        export(ExportOptions(str(source), str(tmp_path / "out")))
    assert error.value.filename == str(tmp_path / "out") and not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module.shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(ExportOptions(str(source), str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_removed_by_the_next(source: Path, tmp_path: Path) -> None:
    program = (
        "import os, shutil, sys; from gptb_ds.export import *\nshutil.copyfile = lambda *_: os.kill(os.getpid(), 9)"
    )
    program += "\nexport(ExportOptions(*sys.argv[1:]))"
    killed = subprocess.run([sys.executable, "-c", program, str(source), str(tmp_path / "out")], check=False)
    assert killed.returncode == -9 and not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    export(ExportOptions(str(source), str(tmp_path / "other")))
    assert left.exists()  # of another name
    export(ExportOptions(str(source), str(tmp_path / "out")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_an_export_can_be_exported_again_and_a_full_folder_is_refused(exported: Path, tmp_path: Path) -> None:
    again = export(ExportOptions(str(exported), str(tmp_path / "again")))
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (exported / name).read_bytes()
    with pytest.raises(ValueError, match="is not empty"):
        export(ExportOptions(str(exported), str(again)))
    shutil.rmtree(again)
    again.mkdir()
    assert export(ExportOptions(str(exported), str(again))) == again  # an empty folder may stand there
