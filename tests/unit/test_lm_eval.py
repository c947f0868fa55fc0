"""lm_eval on tasks given as local files: its model "gptb" and its backend "hf" agree with `gptb-ds evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import gptb_ds  # noqa: F401  (makes lm_eval know "gptb")
from gptb_ds.cli import main
from gptb_ds.data.documents import load_tokenizer
from gptb_ds.export import ExportOptions, export
from tests.harness.models import small_gptb
from tests.harness.stores import prepare

lm_eval = pytest.importorskip("lm_eval", reason="the optional component lm-eval is not installed")

# With 31 tokens (bytes) the end of the document is at position 32, which has a row of its own in `evaluate`'s table.
TEXTS = [f"document {n} has {n * 7:5d} as number." for n in range(6)]
TASKS = {
    "whole_texts": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list:\n  - {metric: word_perplexity}\n",
    "choices": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: '{{answer}}'\ntarget_delimiter: ''\nnum_fewshot: 2\nfewshot_config: {sampler: first_n}\n"
    "fewshot_split: train\nmetric_list:\n  - {metric: acc}\n",
    "answers": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: '{{answer}}'\ntarget_delimiter: ''\nmetric_list:\n  - {metric: acc}\n",
    "free": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['e'], max_gen_toks: 12, do_sample: false}\n"
    "metric_list:\n  - {metric: exact_match}\n",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder, the tasks, and a store of the texts, all of it held out."""
    folder = tmp_path_factory.mktemp("lm_eval")
    rows = [{"text": t, "question": t[:20], "choices": [t[20:], t[20:25], "x"], "answer": 0} for t in TEXTS]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"test": str(folder / "rows.jsonl"), "train": str(folder / "rows.jsonl")}
    for name, settings in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {json.dumps(files)}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{settings}")
    assert prepare("--source", folder / "rows.jsonl", "--out", folder / "store", "--holdout", "0") == 0
    asked = [{"question": t[:20], "text": t[20:]} for t in TEXTS]
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    given = ("--source", folder / "asked.jsonl", "--prompt-field", "question", "--holdout", "0")
    assert prepare(*given, "--out", folder / "asked") == 0
    tokenizer = load_tokenizer(folder / "store")
    model = small_gptb(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, initializer_range=0.1)
    model.save_pretrained(folder / "saved")
    tokenizer.save_pretrained(folder / "saved")
    export(ExportOptions(str(folder / "saved"), str(folder / "model")))
    return folder


def scores(files: Path, model: str, task: str, **arguments: Any) -> list[list[Any]]:
    """What the model answered to each request of a task, by document."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(files), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(files / "model"), **arguments},
        tasks=[task],
        task_manager=manager,
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [[response[0] for response in sample["resps"]] for sample in samples]


def evaluated(files: Path, capsys: pytest.CaptureFixture[str], store: Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", str(files / "model"), "--data", str(store), "--split", "train", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def without_ends(result: dict[str, Any]) -> float:
    """The log-likelihood of all tokens but the ends of documents, which stand alone at position 32."""
    *rows, ends = result["state_use"][-1]["by_position"]
    assert (ends["first"], ends["targets"]) == (32, len(TEXTS))
    return -sum(row["targets"] * row["loss"] for row in rows)


def test_both_backends_give_the_log_likelihoods_of_evaluate(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluated(files, capsys, files / "store")
    ours = scores(files, "gptb", "whole_texts")
    theirs = scores(files, "hf", "whole_texts", trust_remote_code=True, add_bos_token=False)
    assert len(ours) == len(TEXTS)
    assert sum(row[0] for row in ours) == pytest.approx(without_ends(result), abs=1e-4)
    for our, their in zip(ours, theirs, strict=True):
        assert our[0] == pytest.approx(their[0], abs=1e-4)


def test_choices_after_shared_examples(files: Path) -> None:
    ours = scores(files, "gptb", "choices", add_bos_token=False)
    theirs = scores(files, "hf", "choices", trust_remote_code=True, add_bos_token=False)
    for our, their in zip(ours, theirs, strict=True):
        assert len(our) == 3
        for (gain, likeliest), (their_gain, their_likeliest) in zip(our, their, strict=True):
            assert gain == pytest.approx(their_gain, abs=1e-4) and likeliest == their_likeliest


def test_an_answer_after_its_question_costs_what_evaluate_says(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read as in training: the end of text, the question, and the answer, which alone counts."""
    result = evaluated(files, capsys, files / "asked")
    right = [row[0][0] for row in scores(files, "gptb", "answers")]
    assert sum(right) == pytest.approx(without_ends(result), abs=1e-4)


def test_generated_text_ends_at_a_stop_string_and_is_that_of_the_other_backend(files: Path) -> None:
    ours = scores(files, "gptb", "free", add_bos_token=False)
    assert ours == scores(files, "hf", "free", trust_remote_code=True, add_bos_token=False)
    assert all(len(row[0].encode()) <= 12 * 3 and "e" not in row[0] for row in ours)


@pytest.mark.parametrize("task", ["choices", "answers", "free"])
def test_without_any_flag_both_backends_begin_with_the_end_of_text(files: Path, task: str) -> None:
    ours, theirs = scores(files, "gptb", task), scores(files, "hf", task, trust_remote_code=True)
    if task == "free":
        assert ours == theirs
        return
    for our, their in zip(ours, theirs, strict=True):
        assert [gain for gain, _ in our] == pytest.approx([gain for gain, _ in their], abs=1e-4)


@pytest.mark.slow  # lm_eval looks through all its tasks first
def test_the_command_knows_gptb(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.__main__ import cli_evaluate

    given = ["--model", "gptb", "--model_args", f"pretrained={files / 'model'}", "--tasks", "choices", "--limit", "2"]
    given += ["--include_path", str(files), "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *given])
    cli_evaluate()
    assert "choices" in capsys.readouterr().out
    (written,) = tmp_path.rglob("results_*.json")
    assert "acc,none" in json.loads(written.read_text())["results"]["choices"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"pretrained": "no/such/model"},
            "no/such/model: no run with checkpoints, no checkpoint and no",
        ),
        ({"dtype": "int8"}, "dtype int8: not one of fp32, bf16, fp16, float32"),
        ({"batch_size": "many"}, "batch_size many: expected a number or auto"),
    ],
    ids=["no model", "dtype", "batch size"],
)
def test_what_is_wrong_is_one_line(files: Path, arguments: dict[str, str], said: str) -> None:
    from lm_eval.api.registry import get_model

    with pytest.raises(ValueError, match=said) as error:
        get_model("gptb")(**({"pretrained": str(files / "model")} | arguments))
    assert "\n" not in str(error.value)
