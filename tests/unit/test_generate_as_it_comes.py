"""`generate` with what watches it or ends it: streamers, stop strings, criteria; several answers to one prompt.

Each equals, token for token, a plain loop over steps written here.
Axes: B lanes, T tokens, V vocabulary.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, TextStreamer
from transformers.generation import BaseStreamer

from gptb_ds import GPTBLMHeadModel
from gptb_ds.data.tokenization import for_other_programs
from tests.harness.models import small_gptb

NEW = 30
TOKENIZER = for_other_programs(ByT5Tokenizer(extra_ids=0))


@pytest.fixture(scope="module")
def model() -> GPTBLMHeadModel:
    return small_gptb(
        torch.float64, seed=11, vocab_size=259, eos_token_id=None, pad_token_id=0, initializer_range=1.0,
        tie_word_embeddings=False,
    )  # fmt: skip


@torch.no_grad()
def loop(model: GPTBLMHeadModel, ids_BT: torch.Tensor, new: int, draw: bool = False) -> list[list[int]]:
    """The original's loop, all lanes at once: greedy, or drawn from the model's distribution."""
    state = None
    for column in ids_BT.t():
        logits, state, _ = model(column[:, None], past_hidden_states=state)
    columns = []
    for _ in range(new):
        odds_BV = logits[:, -1].float().softmax(-1)
        token_B1 = torch.multinomial(odds_BV, 1) if draw else odds_BV.argmax(-1, keepdim=True)
        columns.append(token_B1)
        logits, state, _ = model(token_B1, past_hidden_states=state)
    return torch.cat((ids_BT, *columns), dim=1).tolist()


def prompt(text: str = "the end") -> torch.Tensor:
    return TOKENIZER(text, return_tensors="pt").input_ids


def greedy(model: GPTBLMHeadModel, ids: torch.Tensor, **settings: Any) -> Any:
    return model.generate(ids, **({"max_new_tokens": NEW, "do_sample": False} | settings))


@pytest.mark.parametrize("answers", [2, 5])
def test_several_answers_are_drawn_as_from_as_many_copies_of_the_prompt(model: GPTBLMHeadModel, answers: int) -> None:
    ids = torch.cat((prompt("the end"), prompt("another")))
    torch.manual_seed(1)
    drawn = model.generate(ids, max_new_tokens=NEW, do_sample=True, top_k=0, num_return_sequences=answers)
    torch.manual_seed(1)
    assert drawn.tolist() == loop(model, ids.repeat_interleave(answers, dim=0), NEW, draw=True)
    assert len({tuple(row) for row in drawn.tolist()}) == 2 * answers


def test_beams_over_padded_prompts_are_those_of_each_prompt_alone(model: GPTBLMHeadModel) -> None:
    given = TOKENIZER(["the end", "a"], return_tensors="pt", padding=True, padding_side="left")
    together = model.generate(**given, max_new_tokens=8, num_beams=3, do_sample=False)[:, given.input_ids.shape[1] :]
    for row, text in zip(together, ("the end", "a"), strict=True):
        alone = model.generate(prompt(text), max_new_tokens=8, num_beams=3, do_sample=False)
        assert row.tolist() == alone[0, prompt(text).shape[1] :].tolist()


class Watcher(BaseStreamer):
    """Keeps what it is given, call by call."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}], ids=str)
def test_a_streamer_sees_the_prompt_and_then_every_token_once(model: GPTBLMHeadModel, settings: dict[str, Any]) -> None:
    ids, watcher = prompt(), Watcher()
    tokens = greedy(model, ids, streamer=watcher, **settings)
    assert watcher.ended and watcher.calls[0] == ids[0].tolist()
    assert [token for call in watcher.calls for token in call] == tokens[0].tolist() == loop(model, ids, NEW)[0]
    if not settings:
        assert len(watcher.calls) == 1 + NEW  # as they come


def test_transformers_text_streamers_print_the_text(model: GPTBLMHeadModel, capsys: pytest.CaptureFixture[str]) -> None:
    text = TOKENIZER.decode(loop(model, prompt(), NEW)[0][len(prompt()[0]) :])
    greedy(model, prompt(), streamer=TextStreamer(TOKENIZER, skip_prompt=True))
    assert capsys.readouterr().out == text + "\n"
    pieces = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=greedy, args=(model, prompt()), kwargs={"streamer": pieces})
    thread.start()
    assert "".join(pieces) == text
    thread.join()


def test_stop_strings_end_a_text_where_they_are_whole(model: GPTBLMHeadModel) -> None:
    tokens, start = loop(model, prompt(), NEW)[0], prompt().shape[1]
    letters = [
        n for n in range(start + 3, len(tokens)) if 33 <= tokens[n] - 3 < 127 and tokens[n] not in tokens[start:n]
    ]
    last = letters[0]
    stop = chr(tokens[last] - 3)
    stopped = greedy(model, prompt(), stop_strings=[stop, "not to be said"], tokenizer=TOKENIZER)
    assert stopped[0].tolist() == tokens[: last + 1] and TOKENIZER.decode(stopped[0]).endswith(stop)
    batch = torch.cat((prompt(), prompt("another")[:, : prompt().shape[1]]))
    both = greedy(model, batch, stop_strings=[stop], tokenizer=TOKENIZER)
    assert both[0, : last + 1].tolist() == tokens[: last + 1] and set(both[0, last + 1 :].tolist()) <= {0}


def test_criteria_of_ones_own_see_tokens_and_scores(model: GPTBLMHeadModel) -> None:
    seen: list[int] = []

    class AfterSeven(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
            seen.append(input_ids.shape[1])
            return torch.full((len(input_ids),), input_ids.shape[1] >= start + 7)

    start = prompt().shape[1]
    tokens = greedy(model, prompt(), stopping_criteria=StoppingCriteriaList([AfterSeven()]))
    assert tokens[0].tolist() == loop(model, prompt(), 7)[0] and seen == list(range(start + 1, start + 8))
    timed = greedy(model, prompt(), max_time=0.0)  # what has begun is finished: one token
    assert timed[0].tolist() == loop(model, prompt(), 1)[0]
