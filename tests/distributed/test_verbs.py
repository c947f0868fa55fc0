"""The verbs work together: what `train` leaves behind, the others can use."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gptb_ds.checkpoint.format import checkpoint_folder
from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.cli import main
from gptb_ds.loading import load_any
from tests.harness.training import losses, metrics, rewind, train, write_corpus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    sinks = ["csv", "tensorboard"]
    job = train(run, store, ranks=2, stage=2, run__monitor=sinks, run__sample_every=6, run__eval_tokens=10**6)
    assert job.text(0).count("sample after") == 2
    assert job.text(1).strip() == "", "only rank 0 speaks"
    return run


def test_metrics_have_what_is_promised(run: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    assert [line["update"] for line in updates] == list(range(1, 13))
    for line in updates:
        assert {"update", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "wait_fraction"} <= line.keys()
        assert line["tokens"] == line["update"] * 8 * 6
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["update"] for line in evaluations] == [0, 5, 10, 12]
    assert updates[-1]["loss"] < updates[0]["loss"] - 1, "it learns"
    assert abs(updates[0]["loss"] - math.log(259)) < 0.5


def test_monitors_were_fed(run: Path):
    assert list(run.glob("tensorboard/**/events.out.tfevents*"))
    (file,) = run.glob("csv/**/*Train_loss*.csv")
    assert len(file.read_text().splitlines()) == 13


def test_evaluate_agrees_with_training(run: Path, store: Path, capsys: pytest.CaptureFixture[str]):
    """The verb reads other lanes and windows, and one rank instead of two: the same documents, the same loss."""
    assert main(["evaluate", str(run), "--data", str(store), "--lanes", "5", "--window", "33", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert said["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert said["eval_bits_per_byte"] == pytest.approx(last["eval_bits_per_byte"], rel=1e-5)
    assert main(["evaluate", str(checkpoint_folder(run, 12)), "--data", str(store), "--max-tokens", "50"]) == 0


def test_generate_repeats_itself_with_a_seed(run: Path, capsys: pytest.CaptureFixture[str]):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(run), "--prompt", "the lane", "--max-new-tokens", "30", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_export_loads_with_transformers(run: Path, tmp_path: Path):
    out = tmp_path / "exported"
    assert main(["export", str(run), "--out", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    ours, _ = load_any(str(run))
    tokens = torch.randint(0, 259, (2, 5))
    torch.testing.assert_close(model(tokens).logits, ours(tokens).logits)
    reader = CheckpointReader(checkpoint_folder(run, 12))
    assert torch.equal(model.transformer.wte.weight, reader.fetch("weight", "transformer.wte.weight"))
    assert AutoTokenizer.from_pretrained(out).decode([100, 101]) == "ab"
    assert main(["export", str(run), "--out", str(out)]) == 2  # not empty
    assert main(["evaluate", str(out), "--data", str(run)]) == 2  # a run is no store


def test_compiled_steps_train_to_the_same_losses(run: Path, store: Path, tmp_path: Path):
    train(tmp_path / "compiled", store, ranks=1, train__compile="true", timeout=400)
    got, want = losses(tmp_path / "compiled"), losses(run)
    assert all(got[update] == pytest.approx(want[update], rel=1e-4) for update in want)


def test_a_warm_start_takes_gpt2s_weights(store: Path, tmp_path: Path):
    own = {"activation_function": "relu", "tie_word_embeddings": False}
    config = GPT2Config(vocab_size=259, n_positions=32, n_layer=1, n_head=2, n_embd=16, **own)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    run = tmp_path / "run"
    train(run, store, ranks=2, stage=3, model__init_from=str(tmp_path / "gpt2"), optim__lr=1e-12, train__updates=3)
    weight = CheckpointReader(checkpoint_folder(run, 3)).fetch("weight", "transformer.wpe.weight")
    gpt2 = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    torch.testing.assert_close(weight, gpt2.transformer.wpe.weight.detach())
    loaded = load_any(str(run))[0]
    assert loaded.config.slot_positions == 32 and loaded.config.activation_function == "relu"
    torch.testing.assert_close(loaded.lm_head.weight, gpt2.lm_head.weight)
    job = train(tmp_path / "wrong", store, expect=2, model__init_from=str(tmp_path / "gpt2"), model__n_embd=32)
    assert "another shape" in job.text(0)


def test_a_mixture_trains_and_resumes_exactly(store: Path, tmp_path: Path):
    texts = write_corpus(tmp_path / "texts", documents=30, seed=8)
    assert main(["prepare", "--source", str(texts), "--out", str(tmp_path / "other"), "--holdout", "0.2"]) == 0
    stores = [store, tmp_path / "other"]
    options = {"ranks": 2, "data__weights": [0.7, 0.3]}
    train(tmp_path / "straight", stores, **options)
    resumed = rewind(tmp_path / "straight", tmp_path / "resumed", 8)
    train(resumed, stores, **options)
    assert metrics(resumed) == metrics(tmp_path / "straight")


def test_counted_targets_alone_make_the_loss(tmp_path: Path):
    """Answers that follow from the prompt are learned to nothing; prompts of noise are not counted."""
    import random

    chooser = random.Random(1)
    lines = []
    for _ in range(400):
        noise = "".join(chooser.choice("abcdefgh") for _ in range(6))
        lines.append(json.dumps({"question": noise, "text": "zzzz"}))
    source = tmp_path / "qa.jsonl"
    source.write_text("\n".join(lines))
    arguments = ["--source", str(source), "--prompt-field", "question", "--out", str(tmp_path / "store")]
    assert main(["prepare", *arguments, "--holdout", "0.1"]) == 0
    options = {"train__updates": 60, "run__save_every": 0, "run__eval_every": 0, "data__window": 12}
    for ranks in (1, 2):
        train(tmp_path / f"run{ranks}", tmp_path / "store", ranks=ranks, **options)
    got, want = losses(tmp_path / "run2"), losses(tmp_path / "run1")
    assert want[60] < 0.5, "noise is at ln 8 = 2.08 nats"
    assert all(got[update] == pytest.approx(want[update], rel=1e-4) for update in want)
    last = json.loads((tmp_path / "run1" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_loss"] < 0.5


def test_a_memoryless_model_is_warned_of(store: Path, tmp_path: Path):
    job = train(tmp_path / "run", store, model__rebias="false", train__updates=4)
    assert "memoryless" in job.text(0)


def test_a_single_document_trains_without_evaluation(tmp_path: Path):
    (tmp_path / "book.txt").write_text("the only document there is " * 40)
    assert main(["prepare", "--source", str(tmp_path / "book.txt"), "--out", str(tmp_path / "store")]) == 0
    job = train(tmp_path / "run", tmp_path / "store", ranks=2, run__sample_every=6)
    assert "nothing is held out" in job.text(0) and "sample after 12" in job.text(0)
    assert all('"loss"' in line for line in metrics(tmp_path / "run"))


def test_a_store_of_another_tokenizer_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.txt").write_text("text of another store " * 9)
    source = ["--source", str(tmp_path / "a.txt"), "--holdout", "0"]
    assert main(["prepare", *source, "--tokenizer", "bpe:257", "--out", str(tmp_path / "bpe")]) == 0
    assert main(["evaluate", str(run), "--data", str(tmp_path / "bpe"), "--split", "train"]) == 2
    assert "its tokens are of bpe (257 tokens)" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--data", str(tmp_path / "bpe"), "--max-tokens", "0", "--lanes", "0"]) == 2
    assert capsys.readouterr().err.count("must be at least 1") == 2
