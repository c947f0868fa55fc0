"""What `evaluate` says of the state: equal to a plain loop over tokens, however lanes, windows and ranks read them.

Axes: B lanes, K steps.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptb_ds.commands.evaluate import position_table, state_use_table
from gptb_ds.data.corpus import Corpus
from gptb_ds.data.held_out import held_out_windows
from gptb_ds.data.segments import segment_windows, whole_pieces
from gptb_ds.distributed.world import World
from gptb_ds.model.objective import WindowObjective
from gptb_ds.plot import plot_state_use
from gptb_ds.state_use import Reader, Score
from tests.harness.models import V, small_gptb
from tests.harness.stores import EOT, make_corpus, numbered_documents, together

MODEL = small_gptb(torch.float64)
LENGTHS = [3, 40, 0, 7, 21, 1, 12]


def corpus_of(folder: Path, **options: object) -> Corpus:
    return make_corpus(folder, numbered_documents(LENGTHS, V), vocab=V, **options)


def score(corpus: Corpus, lanes: int = 4, window: int = 8, reset_every: int | None = None, **cut: int | None) -> Score:
    reader = Reader(WindowObjective(MODEL).eval(), corpus, World(), lanes, window)
    found = reader.score(whole_pieces(corpus, **cut), "wholes", None, reset_every)
    assert found is not None
    return found


@torch.no_grad()
def plain_losses(document: list[int], reset_every: int | None) -> list[float]:
    """The loss of each target of a document, token by token, the plainest way."""
    state, losses = None, []
    for at, (token, target) in enumerate(zip([EOT, *document], [*document, EOT], strict=True)):
        if reset_every and at % reset_every == 0:
            state = None
        logits, state, _ = MODEL(torch.tensor([[token]]), past_hidden_states=state)
        losses.append(-logits[0, 0].log_softmax(-1)[target].item())
    return losses


@pytest.mark.parametrize("reset_every", [None, 1, 2, 16, 100])
def test_the_loss_and_its_places_are_those_of_a_plain_loop(tmp_path: Path, reset_every: int | None) -> None:
    documents = numbered_documents(LENGTHS, V)
    by_document = [plain_losses(document, reset_every) for document in documents]
    expected = [loss for losses in by_document for loss in losses]
    found = score(corpus_of(tmp_path), reset_every=reset_every)
    assert found.targets == len(expected) and found.reset_every == reset_every
    assert found.loss == pytest.approx(sum(expected) / len(expected))
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    for row in found.by_position:
        there = [loss for losses in by_document for loss in losses[row.first - 1 : row.last]]
        assert row.targets == len(there) and row.loss == pytest.approx(sum(there) / len(there))
    assert [(row.first, row.last) for row in found.by_position] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]


@settings(max_examples=25, deadline=None)
@given(
    lanes=st.integers(1, 9),
    window=st.integers(1, 50),
    reset_every=st.sampled_from([None, 1, 3, 16]),
    budget=st.sampled_from([None, 1, 17, 60]),
    limit=st.sampled_from([None, 5, 20]),
)
def test_the_figure_does_not_depend_on_lanes_and_windows(
    tmp_path_factory: pytest.TempPathFactory,
    lanes: int,
    window: int,
    reset_every: int | None,
    budget: int | None,
    limit: int | None,
) -> None:
    corpus = corpus_of(tmp_path_factory.mktemp("store"))
    cut = {"max_tokens": budget, "max_document_tokens": limit}
    one, other = score(corpus, 4, 8, reset_every, **cut), score(corpus, lanes, window, reset_every, **cut)
    assert one.loss == pytest.approx(other.loss) and one.targets == other.targets
    for a, b in zip(one.by_position, other.by_position, strict=True):
        assert a.targets == b.targets and a.loss == pytest.approx(b.loss)


@settings(max_examples=30, deadline=None)
@given(
    budget=st.one_of(st.none(), st.integers(1, 100)),
    limit=st.sampled_from([None, 1, 5, 20]),
    world=st.integers(1, 3),
    reset_every=st.sampled_from([None, 1, 7]),
    counted=st.booleans(),
)
def test_all_readings_have_the_inputs_and_targets_of_training(
    tmp_path_factory: pytest.TempPathFactory,
    budget: int | None,
    limit: int | None,
    world: int,
    reset_every: int | None,
    counted: bool,
) -> None:
    """Also cut ones, of several stores, with loss weights, and shared by ranks: those of `held_out_windows`."""
    flags = [[i % 3 > 0 for i in range(n + 1)] for n in LENGTHS] if counted else None
    folder = tmp_path_factory.mktemp("store")
    corpus = together([corpus_of(folder, counted=flags), make_corpus(folder, [[9] * 11], vocab=V)], None)
    cut = {"max_tokens": budget, "max_document_tokens": limit}

    def pairs(windows: list) -> list[tuple[int, int]]:
        found = []
        for window in windows:
            there = window.loss_weights.bool()
            found += zip(window.input_ids[there].tolist(), window.targets[there].tolist(), strict=True)
        return sorted(found)

    expected = pairs(list(held_out_windows(corpus, lanes=4, window=5, **cut)))
    segments = whole_pieces(corpus, **cut)
    segments = segments if reset_every is None else segments.reset_every(reset_every)
    read = [w for rank in range(world) for w in segment_windows(corpus, segments.of_rank(rank, world), 3, 5)]
    assert pairs([w.columns for w in read]) == expected


def test_lanes_that_have_run_out_are_taken_over_and_then_left_out(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, numbered_documents([10] * 20 + [200]))
    windows = [w.columns for w in segment_windows(corpus, whole_pieces(corpus), 8, 11)]
    assert [w.lanes for w in windows] == [8, 8, 7] + [1] * 16
    short = list(segment_windows(corpus, whole_pieces(corpus).reset_every(2), 64, 11))
    assert max(w.columns.input_ids.shape[0] for w in short) == 2, "no window is longer than the segments"


def test_a_state_that_remembers_is_worth_something(tmp_path: Path) -> None:
    """A model that has learned that documents repeat their first token; without a state it can't know."""
    torch.manual_seed(0)
    documents = [[2 + n % 20] * 12 for n in range(60)]
    corpus = make_corpus(tmp_path, [[*d[:1], 24, *d[1:2], 25, *d[2:3], 26] for d in documents], vocab=V)
    model = small_gptb(n_embd=32)
    objective = WindowObjective(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        for read in segment_windows(corpus, whole_pieces(corpus), 60, 7):
            w = read.columns
            loss, _ = objective(w.input_ids, w.targets, w.reset, model.empty_state(w.lanes), w.loss_weights)
            optimizer.zero_grad()
            (loss / w.counted).backward()
            optimizer.step()
    reader = Reader(objective.eval(), corpus, World(), 16, 7)
    scores = reader.state_use(whole_pieces(corpus), "whole documents", 1.0, (1, 2, 4096))
    assert [s.reset_every for s in scores] == [1, 2, None], "as long as a document is no reset"
    assert scores[0].loss > scores[-1].loss + 0.5
    assert scores[-1].bits_per_byte == pytest.approx(scores[-1].loss / math.log(2))
    table = state_use_table(scores)
    assert [line.split()[0] for line in table] == ["state", "1", "2", "carried"]
    assert [line.split()[0] for line in position_table(scores)] == ["position", "1", "2-3", "4-7"]
    plot_state_use(scores, str(tmp_path / "state.png"))
    assert (tmp_path / "state.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_says_what_it_read_and_writes_table_file_and_picture(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptb_ds.cli import main
    from gptb_ds.data.documents import load_tokenizer

    tokenizer = load_tokenizer(store)
    small_gptb(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    capsys.readouterr()  # DeepSpeed, which transformers imports to save, speaks on stdout
    given = ["evaluate", str(tmp_path / "model"), "--data", str(store), "--max-tokens", "300"]
    assert main([*given, "--max-document-tokens", "50", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("whole documents: 300 targets, loss ") and " bits per byte" in said[0]
    assert said[1].startswith("pieces of 50 tokens: 300 targets, loss ")
    assert {"state reset every", "position"} <= {line[:17].strip() for line in said}
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["read_as"] == "pieces of 50 tokens" and written["eval_loss"] == written["pieces"]["loss"]
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 1000
    assert main([*given, "--json", "--reset-every"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["read_as"] == "whole documents" and plain["targets"] == 300 and plain["pieces"] is None
    assert [reading["reset_every"] for reading in plain["state_use"]] == [None]
    assert plain["eval_perplexity"] == pytest.approx(math.exp(plain["eval_loss"]))
    assert main([*given, "--reset-every", "0"]) == 2
    assert "--reset-every 0: must be at least 1" in capsys.readouterr().err
