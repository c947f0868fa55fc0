"""A checkpoint's folder, copied away from its run, evaluates, generates and exports."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from gptb_ds.checkpoint.format import Manifest, read_manifest
from gptb_ds.checkpoint.model_files import model_files
from gptb_ds.checkpoint.writer import CheckpointWriter
from gptb_ds.cli import main
from gptb_ds.data.documents import load_tokenizer
from gptb_ds.distributed.world import World
from gptb_ds.loading import load_any
from gptb_ds.model import GPTBConfig, GPTBLMHeadModel


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    source = folder / "text"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.txt").write_text(f"document {number} " * (1 + number % 5))
    out = folder / "store"
    assert (
        main(["prepare", "--source", str(source), "--tokenizer", "bytes", "--out", str(out), "--holdout", "0.3"]) == 0
    )
    return out


@pytest.fixture
def checkpoint(store: Path, tmp_path: Path) -> tuple[Path, GPTBLMHeadModel]:
    """A checkpoint with weights that nothing but it holds, and the model that it is of."""
    torch.manual_seed(4)
    config = GPTBConfig(vocab_size=259, num_slots=4, n_positions=4, n_layer=1, n_head=2, n_embd=16, n_inner=24)
    model = GPTBLMHeadModel(config)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = {kind: {n: t.clone() for n, t in weights.items()} for kind in ("weight", "exp_avg", "exp_avg_sq")}
    lanes = {"state": torch.zeros(2, 3, 16), "ordinal": torch.arange(2), "offset": torch.arange(2)}
    facts = Manifest(3, 12, 1.5, 1, 0, 2, 2, {}, {}, {}, {})
    writer = CheckpointWriter(tmp_path / "run", World(), 1, model_files(model, load_tokenizer(store)))
    writer.begin(facts, parameters, lanes, {"cpu": torch.get_rng_state()})
    return writer.finish(), model


def test_a_copy_elsewhere_is_the_model(checkpoint, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, model = checkpoint
    copy = tmp_path / "elsewhere"
    shutil.move(folder, copy)
    shutil.rmtree(tmp_path / "run")
    loaded, tokenizer = load_any(str(copy))
    assert loaded.config.n_inner == 24 and loaded.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter)
    assert tokenizer.encode("abc", add_special_tokens=False) == [100, 101, 102]
    assert main(["evaluate", str(copy), "--data", str(store)]) == 0
    assert main(["generate", str(copy), "--prompt", "doc", "--max-new-tokens", "3", "--seed", "1"]) == 0
    capsys.readouterr()
    assert main(["export", str(copy), "--out", str(tmp_path / "export")]) == 0
    exported, _ = load_any(str(tmp_path / "export"))
    assert torch.equal(exported.transformer.wte.weight, model.transformer.wte.weight)


def test_configuration_and_tokenizer_are_covered_by_the_manifest(checkpoint):
    folder, _ = checkpoint
    files = read_manifest(folder).files
    assert {"config.json", "tokenizer/tokenizer_config.json"} <= files.keys()
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert on_disk == files.keys() | {"manifest.json", "manifest-copy.json"}
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"n_inner": 24', '"n_inner": 32'))
    with pytest.raises(ValueError, match=r"config.json was altered"):
        load_any(str(folder))
    (folder / "config.json").write_text(text)
    (folder / "tokenizer/tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer_config.json is missing"):
        load_any(str(folder))


def test_a_lost_manifest_is_read_from_its_copy(checkpoint):
    folder, _ = checkpoint
    facts = read_manifest(folder)
    (folder / "manifest.json").unlink()
    assert read_manifest(folder) == facts
    load_any(str(folder))
    (folder / "manifest-copy.json").unlink()
    with pytest.raises(ValueError, match=r"a checkpoint without its manifest.json"):
        load_any(str(folder))


def test_an_older_checkpoint_is_not_taken_without_a_word(
    checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    damaged = tmp_path / "run/checkpoints/step-00000009"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{")
    load_any(str(tmp_path / "run"))
    captured = capsys.readouterr()
    assert f"passed over {damaged}: manifest.json cannot be read" in captured.err and captured.out == ""
