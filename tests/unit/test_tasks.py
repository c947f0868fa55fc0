"""Shows that generated tasks are what their definitions say, go through stores and windows, and are scored exactly."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gptb_ds.data.collator import LaneCollator
from gptb_ds.data.corpus import open_corpus
from gptb_ds.data.documents import load_tokenizer, open_store, verify_store
from gptb_ds.data.held_out import held_out_windows
from gptb_ds.data.tasks import DEFAULTS, Task, longest_length, parse_task
from gptb_ds.evaluation import score_task
from tests.harness.stores import fail, prepare

AUTOMATA = ("parity", "cycle5", "cycle6", "s3", "a5", "s5")


def words(task: Task, document: Any) -> list[str]:
    return [task.symbols[token] for token in document.tokens]


def answers(task: Task, document: Any) -> list[int]:
    return [int(task.symbols[target].removeprefix("=")) for target in document.targets]


@pytest.mark.parametrize("name", AUTOMATA)
def test_answers_of_state_tracking_by_another_way(name: str) -> None:
    task = parse_task(f"task:{name}?length=30&count=20")
    if name[0] in "as":
        degree = int(name[1])
        elements = [
            e
            for e in itertools.permutations(range(degree))
            if name != "a5" or round(np.linalg.det(np.eye(degree)[list(e)])) == 1
        ]
        assert len(elements) == {"s3": 6, "a5": 60, "s5": 120}[name]
        matrices = np.array([np.eye(degree, dtype=int)[:, list(e)] for e in elements])
    for document in task.documents():
        inputs, got = [int(word) for word in words(task, document)], answers(task, document)
        if name == "parity":
            expected = [sum(inputs[:n]) % 2 for n in range(len(inputs) + 1)]
        elif name.startswith("cycle"):
            expected = [sum(x - 1 for x in inputs[:n]) % int(name[5:]) for n in range(len(inputs) + 1)]
        else:  # (p g)[i] = p[g[i]]: matrices with a one at (e[i], i) multiply in that order
            product, expected = np.eye(degree, dtype=int), []
            for x in [None, *inputs]:
                product = product if x is None else product @ matrices[x]
                expected.append(elements.index(tuple(product.argmax(0).tolist())))
        assert got == expected


@pytest.mark.parametrize("name", AUTOMATA)
def test_inputs_are_uniform_and_chance_is_one_over_the_states(name: str) -> None:
    task = parse_task(f"task:{name}?length=40&min_length=40&count=400")
    documents = list(task.documents())
    states, inputs = task.table.shape
    read = np.bincount(np.concatenate([d.tokens for d in documents]) - 1, minlength=inputs)
    assert len(read) == inputs and np.abs(read / read.sum() * inputs - 1).max() < 0.5
    last = np.bincount([answers(task, d)[-1] for d in documents], minlength=states)
    assert len(last) == states and last.max() < 400 / states + 6 * np.sqrt(400 / states)


@pytest.mark.parametrize("variables", [3, 5])
def test_programs_print_what_they_say(variables: int) -> None:
    task = parse_task(f"task:programs{variables}?count=20")
    printed = 0
    for document in task.documents():
        text = words(task, document)
        statements = [list(group) for end, group in itertools.groupby(text, lambda word: word == ";") if not end]
        assert len(statements) == 100
        values: dict[str, int] = {}
        place, expected = 0, []
        for statement in statements:
            if statement[0] == "print":
                assert int(statement[2]) == values[statement[1]]
                expected.append(place + 2)
            elif statement[1] == "=" and statement[0] != "if":
                values[statement[0]] = int(statement[2])
            elif statement[0] != "if" or values[statement[1]] == int(statement[3]):
                name, change = statement[-2:]
                values[name] = (values[name] + {"++": 1, "--": -1}[change]) % 10
            place += len(statement) + 1
        assert len(values) == variables
        assert np.flatnonzero(document.counted).tolist() == expected
        printed += len(expected)
    assert printed > 200


def test_copy_and_recall_at_a_distance() -> None:
    task = parse_task("task:copy?length=5&min_length=5&distance=7&count=9")
    for document in task.documents():
        text = words(task, document)
        assert text == [*text[:5], *["_"] * 7, "|", *text[:5]]
        assert np.flatnonzero(document.counted).tolist() == list(range(13, 18))
    task = parse_task("task:recall?length=6&distance=3&count=9")
    for document in task.documents():
        text = words(task, document)
        pairs = dict(zip(text[:12:2], text[1:12:2], strict=True))
        assert len(pairs) == 6 and text[12:16] == ["_", "_", "_", "|"]
        assert text[17] == pairs[text[16]] and np.flatnonzero(document.counted).tolist() == [17]


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_task_goes_through_a_store_into_windows(name: str, tmp_path: Path) -> None:
    out = tmp_path / "store"
    source = f"task:{name}?length=9&count=60&seed=3"
    assert prepare("--source", source, "--out", out) == 0
    verify_store(out)
    task = parse_task(source)
    expected = {tuple(d.tokens.tolist()): d for d in task.documents()}
    tokenizer = load_tokenizer(out)
    corpus = open_corpus([out])
    (store,) = corpus.stores
    for number in range(store.num_documents):
        tokens = store.document(number).tolist()
        assert tokenizer.encode(tokenizer.decode(tokens), add_special_tokens=False) == tokens
        assert tuple(tokens) in expected
    held_out = open_corpus([out], split="validation")
    windows = {
        "train": [LaneCollator(corpus, lanes=4, window=500, seed=0).next_window()],
        "held out": list(held_out_windows(held_out, lanes=2, window=7)),
    }
    for split in windows.values():
        seen = 0
        for lane in range(split[0].lanes):
            fields = [
                torch.cat([w[:, lane] for w in (getattr(window, f) for window in split) if w.shape[1] > lane]).tolist()
                for f in ("input_ids", "targets", "reset")
            ]
            weights = [
                1.0 if window.loss_weights is None else window.loss_weights[column, lane].item()
                for window in split
                if window.lanes > lane
                for column in range(len(window.input_ids))
            ]
            starts = [at for at, reset in enumerate(fields[2]) if reset]
            for start, end in itertools.pairwise(starts):
                document = expected[tuple(fields[0][start + 1 : end])]
                targets = document.targets
                if targets is None:
                    targets = [*document.tokens, 0]
                assert fields[1][start:end] == list(targets)
                counted = np.ones(end - start) if document.counted is None else document.counted
                assert weights[start:end] == counted.tolist()
                seen += 1
        assert seen
    assert (store.targets is not None) == (name in AUTOMATA)


def test_the_same_options_give_the_same_store_and_others_another(tmp_path: Path) -> None:
    def fingerprint(source: str) -> str:
        out = tmp_path / source.replace("?", "-")
        prepare("--source", source, "--out", out)
        return open_store(out).fingerprint

    first = fingerprint("task:parity?count=50")
    prepare("--source", "task:parity?count=50", "--out", tmp_path / "again")
    assert open_store(tmp_path / "again").fingerprint == first
    assert len({first, fingerprint("task:parity?count=50&seed=1"), fingerprint("task:parity?count=51")}) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("task:juggling", "no such generated task; choose one of parity, cycle5"),
        ("task:parity?width=4", "width=4: options are count, length, min_length, seed"),
        ("task:parity?length=four", "length=four: options are"),
        ("task:parity?length=0", "needs 1 <= min_length <= length"),
        ("task:recall?length=27", "length <= 26"),
    ],
)
def test_tasks_and_options_that_there_are_not(source: str, message: str, tmp_path: Path) -> None:
    assert message in fail("--source", source, "--out", tmp_path / "store")


def test_a_task_stands_alone_and_is_not_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    out = tmp_path / "store"
    assert "give it alone" in fail("--source", "task:parity", tmp_path / "a.txt", "--out", out)
    assert "a generated task has its own" in fail("--source", "task:parity", "--tokenizer", "bpe:300", "--out", out)
    prepare("--source", "task:parity?count=50", "--out", out)
    with pytest.raises(ValueError, match="documents of a generated task can't be cut"):
        LaneCollator(open_corpus([out]), lanes=2, window=4, seed=0, max_document_tokens=5)
    with pytest.raises(ValueError, match=r"data.stagger on: the documents of a generated task can't be cut"):
        LaneCollator(open_corpus([out]), lanes=2, window=4, seed=0, stagger=True)


class Solver(nn.Module):
    """A model that carries the automaton's state and errs in every lane from some length on."""

    def __init__(self, task: Task, fails_after: int) -> None:
        super().__init__()
        self.task, self.fails_after, self.transformer = task, fails_after, self
        self.weight = nn.Parameter(torch.zeros(()))

    def empty_state(self, lanes: int) -> torch.Tensor:
        return torch.full((lanes, 2), -1)

    def unroll(self, ids_KB: torch.Tensor, state_BS: torch.Tensor, reset_KB: torch.Tensor) -> tuple[Any, torch.Tensor]:
        table, out = torch.from_numpy(self.task.table), []
        state, steps = state_BS[:, 0], state_BS[:, 1]
        for ids, reset in zip(ids_KB, reset_KB, strict=True):
            state = torch.where(reset, 0, table[state.clamp(min=0), (ids - 1).clamp(min=0)])
            steps = torch.where(reset, 0, steps + 1)
            wrong = (steps > self.fails_after).long()
            out.append(1 + table.shape[1] + (state + wrong) % table.shape[0])
        return torch.stack(out), torch.stack([state, steps], dim=1)

    def logits_of(self, answers_KB: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(answers_KB, len(self.task.symbols)).float()


@pytest.mark.parametrize(("fails_after", "longest"), [(10_000, 600), (299, 299), (20, 19), (-1, 0)])
def test_scores_say_how_far_answers_are_right(fails_after: int, longest: int) -> None:
    task = parse_task("task:s3?length=20")
    score = score_task(Solver(task, fails_after), task, 600, documents=8, window=70)
    assert score.longest_90 == score.longest_99 == longest
    assert list(score.accuracy) == [10, 20, 40, 80, 160, 320, 600]
    assert score.accuracy[600] == (fails_after >= 600)


def test_the_longest_length_counts_whole_blocks() -> None:
    asked = np.full(100, 10)
    right = np.full(100, 10)
    right[57] = 0  # 90 of 100 in its block
    assert (longest_length(right, asked, 0.9), longest_length(right, asked, 0.99)) == (99, 49)
    asked[::2] = right[::2] = 0  # asked at every other position only
    assert longest_length(right, asked, 0.9) == 49
    assert longest_length(np.zeros(5, dtype=int), np.zeros(5, dtype=int), 0.9) == 0
