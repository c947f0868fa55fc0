"""transformers' `generate`, in all its modes, equals a plain loop over steps written here, token for token.

Axes: B lanes, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptb_ds import GPTBLMHeadModel
from gptb_ds.model import GPTBCache, recurrence
from tests.harness.models import V, random_ids, small_gptb

NEW = 24
ENDLESS = {"eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> GPTBLMHeadModel:
    # Most random models say the same token again and again; this one does not.
    return small_gptb(torch.float64, seed=2, **ENDLESS, tie_word_embeddings=False, initializer_range=1.0)


@torch.no_grad()
def loop(
    model: GPTBLMHeadModel,
    prompt: torch.Tensor,
    choose: Callable[[torch.Tensor, list[int]], int],
    state: torch.Tensor | None = None,
    stop: int | None = None,
    new: int = NEW,
) -> list[int]:
    """One lane: the original's loop, one token a step. `choose` sees the logits (V) and what came before."""
    logits, tokens = None, prompt.tolist()
    for token in prompt:
        logits, state, _ = model(token.view(1, 1), past_hidden_states=state)
    for _ in range(new):
        tokens.append(choose(logits[0, -1], tokens))
        if tokens[-1] == stop:
            break
        logits, state, _ = model(torch.tensor([[tokens[-1]]]), past_hidden_states=state)
    return tokens


def likeliest(logits_V: torch.Tensor, before: list[int]) -> int:
    return int(logits_V.argmax())


def greedy(model: GPTBLMHeadModel, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **kwargs)


@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "offloaded"}, {"num_beams": 1}],
    ids=str,
)
def test_greedy(model: GPTBLMHeadModel, how: dict[str, object]) -> None:
    ids = random_ids(2, 7)
    expected = [loop(model, row, likeliest) for row in ids]
    assert greedy(model, ids, **how).tolist() == expected
    assert len({tuple(row) for row in expected}) == 2 and len(set(expected[0][7:])) > 3


def test_a_given_repetition_penalty(model: GPTBLMHeadModel) -> None:
    def penalised(logits_V: torch.Tensor, before: list[int]) -> int:
        logits_V = logits_V.clone()
        for token in set(before):
            logits_V[token] = logits_V[token] / 1.7 if logits_V[token] > 0 else logits_V[token] * 1.7
        return int(logits_V.argmax())

    ids = random_ids(2, 5)
    assert greedy(model, ids, repetition_penalty=1.7).tolist() == [loop(model, row, penalised) for row in ids]


@pytest.mark.parametrize("how", ["plain", "top_k", "top_p", "min_p"])
def test_sampling(model: GPTBLMHeadModel, how: str) -> None:
    settings = {"plain": {}, "top_k": {"top_k": 4}, "top_p": {"top_p": 0.7}, "min_p": {"min_p": 0.2}}[how]

    def drawn(logits_V: torch.Tensor, before: list[int]) -> int:
        probabilities_V = (logits_V / 0.8).softmax(-1)
        order = probabilities_V.argsort(descending=True)
        if how == "top_k":
            kept = set(order[:4].tolist())
        elif how == "top_p":
            before_it = probabilities_V[order].cumsum(0) - probabilities_V[order]
            kept = set(order[before_it < 0.7].tolist())
        elif how == "min_p":
            kept = set((probabilities_V >= 0.2 * probabilities_V.max()).nonzero().flatten().tolist())
        else:
            kept = set(range(V))
        probabilities_V = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(probabilities_V.tolist())])
        return int(torch.multinomial(probabilities_V[None] / probabilities_V.sum(), 1))

    ids = random_ids(1, 4)
    torch.manual_seed(3)
    tokens = model.generate(ids, max_new_tokens=NEW, do_sample=True, temperature=0.8, **({"top_k": 0} | settings))
    torch.manual_seed(3)
    assert tokens[0].tolist() == loop(model, ids[0], drawn)


def test_prompts_of_different_length(model: GPTBLMHeadModel) -> None:
    rows = [random_ids(1, length, seed=length)[0] for length in (1, 4, 9)]
    ids = torch.stack([torch.cat((torch.zeros(9 - len(row), dtype=torch.int64), row)) for row in rows])
    mask = torch.stack([torch.arange(9) >= 9 - len(row) for row in rows]).long()
    for how in ({}, {"prefill_chunk_size": 4}):
        tokens = greedy(model, ids, attention_mask=mask, **how)
        for row, prompt in zip(tokens, rows, strict=True):
            assert row[9 - len(prompt) :].tolist() == loop(model, prompt, likeliest)


@torch.no_grad()
def beam_search(model: GPTBLMHeadModel, prompt: torch.Tensor, beams: int, new: int) -> list[list[int]]:
    """All beams, the best first, by the plainest code: every beam has its own list of tokens and its own state."""
    logits, state, _ = model(prompt[None])
    alive = [(0.0, prompt.tolist(), state, logits[0, -1].log_softmax(-1))]
    for _ in range(new):
        grown = [
            (score + float(gain), [*tokens, token], state)
            for score, tokens, state, log_probability in alive
            for token, gain in enumerate(log_probability)
        ]
        alive = []
        for score, tokens, state in sorted(grown, key=lambda beam: -beam[0])[:beams]:
            logits, new_state, _ = model(torch.tensor([[tokens[-1]]]), past_hidden_states=state)
            alive.append((score, tokens, new_state, logits[0, -1].log_softmax(-1)))
    return [tokens for _, tokens, _, _ in alive]


def test_beam_search_reorders_the_state(model: GPTBLMHeadModel) -> None:
    ids = random_ids(2, 5, seed=4)
    tokens = model.generate(ids, max_new_tokens=12, num_beams=4, num_return_sequences=3, do_sample=False)
    expected = [beam for row in ids for beam in beam_search(model, row, 4, 12)[:3]]
    assert tokens.tolist() == expected
    assert expected[0] != loop(model, ids[0], likeliest, new=12)  # a search, not the greedy path


@pytest.mark.parametrize("kind", ["prompt lookup", "another model", "the model itself"])
def test_assisted_decoding_gives_the_same_tokens(model: GPTBLMHeadModel, kind: str) -> None:
    assistants = {"another model": small_gptb(seed=1, n_layer=1, **ENDLESS), "the model itself": copy.deepcopy(model)}
    for assistant in assistants.values():
        assistant.generation_config.assistant_confidence_threshold = 0
    how = {"prompt_lookup_num_tokens": 6} if kind == "prompt lookup" else {"assistant_model": assistants[kind]}
    calls: list[int] = []
    hook = model.transformer.register_forward_pre_hook(lambda _m, _args, kwargs: calls.append(1), with_kwargs=True)
    for seed in range(2):
        ids = random_ids(1, 6, seed=seed)
        expected = loop(model, ids[0], likeliest, new=60)
        calls.clear()
        assert model.generate(ids, max_new_tokens=60, do_sample=False, **how)[0].tolist() == expected
        if kind == "the model itself":
            assert len(calls) < 20  # its guesses are always right: several tokens a call
    hook.remove()


@pytest.mark.slow
def test_speculative_sampling_draws_from_the_models_distribution() -> None:
    """The frequencies of the first token, drawn with an assistant 300 times, are the model's own."""
    model, assistant = small_gptb(**ENDLESS), small_gptb(seed=2, **ENDLESS)
    ids = random_ids(1, 3)
    exact = model(ids).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    counts = torch.zeros(V)
    for _ in range(300):
        tokens = model.generate(ids, max_new_tokens=2, do_sample=True, top_k=0, assistant_model=assistant)
        counts[tokens[0, 3]] += 1
    assert (counts / 300 - exact).abs().max() < 0.09


def test_stopping_at_a_token_pads_the_others(model: GPTBLMHeadModel) -> None:
    ids = random_ids(4, 3, seed=2)
    stop = loop(model, ids[0], likeliest)[8]
    tokens = greedy(model, ids, eos_token_id=stop)
    for row, prompt in zip(tokens.tolist(), ids, strict=True):
        expected = loop(model, prompt, likeliest, stop=stop)
        assert row[: len(expected)] == expected and set(row[len(expected) :]) <= {0}


def test_embeddings_as_a_prompt(model: GPTBLMHeadModel) -> None:
    ids = random_ids(2, 6)
    tokens = greedy(model, None, inputs_embeds=model.get_input_embeddings()(ids))
    assert tokens.tolist() == [loop(model, row, likeliest)[6:] for row in ids]


@pytest.mark.parametrize("how", [{}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 2}], ids=str)
def test_continuing_from_a_cache_with_the_whole_sequence_or_what_is_new(
    model: GPTBLMHeadModel, how: dict[str, object]
) -> None:
    ids = random_ids(1, 11)
    expected = loop(model, ids[0], likeliest)
    cache = model(ids[:, :7]).past_key_values
    assert greedy(model, ids, past_key_values=cache.copy(), **how)[0].tolist() == expected
    assert greedy(model, ids[:, 7:], past_key_values=cache.copy(), **how)[0].tolist() == expected[7:]
    full = torch.ones_like(ids)
    told = greedy(model, ids[:, 7:], past_key_values=cache.copy(), attention_mask=full, **how)
    assert told[0].tolist() == expected[7:]
    assert cache.get_seq_length() == 7  # copies went their own way


def test_continuing_from_a_bare_state(model: GPTBLMHeadModel) -> None:
    ids = random_ids(2, 9)
    state = model(ids[:, :5]).past_hidden_states
    expected = [loop(model, row, likeliest)[5:] for row in ids]
    for how in ({}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 1}):
        tokens = greedy(model, ids[:, 5:], past_hidden_states=state, **how)
        if "num_beams" not in how:
            assert tokens.tolist() == expected
    assert greedy(model, ids[:, 5:], past_key_values=GPTBCache(state)).tolist() == expected


def test_generating_in_two_goes_is_generating_in_one(model: GPTBLMHeadModel) -> None:
    ids = random_ids(2, 5)
    whole = greedy(model, ids)
    first = model.generate(ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    second = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=NEW - 9, do_sample=False
    )
    assert torch.equal(second, whole)


def test_a_cache_that_has_read_everything_says_so(model: GPTBLMHeadModel) -> None:
    ids = random_ids(1, 5)
    with pytest.raises(ValueError, match="has read all 5 tokens already"):
        greedy(model, ids, past_key_values=model(ids).past_key_values)
    with pytest.raises(ValueError, match="cache_implementation 'quantized'"):
        greedy(model, ids, cache_implementation="quantized")


def test_a_long_prompt_needs_the_memory_of_a_piece(model: GPTBLMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most columns that are embedded at once, whatever the prompt's length."""
    widths: list[int] = []
    hook = model.transformer.wte.register_forward_hook(lambda _m, inputs, _o: widths.append(inputs[0].shape[0]))
    model.generate(random_ids(1, 3 * recurrence.READ_CHUNK + 5), max_new_tokens=2, do_sample=False)
    hook.remove()
    assert max(widths) == recurrence.READ_CHUNK and sum(widths) == 3 * recurrence.READ_CHUNK + 6


@pytest.mark.slow
def test_pipeline(model: GPTBLMHeadModel) -> None:
    from transformers import ByT5Tokenizer, pipeline

    tokenizer = ByT5Tokenizer(extra_ids=0)
    speaker = small_gptb(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0)
    tokenizer.padding_side = "left"
    generator = pipeline("text-generation", model=speaker, tokenizer=tokenizer, device="cpu")
    texts = ["Once", "The quick brown"]
    together = generator(texts, max_new_tokens=8, do_sample=False, batch_size=2)
    for text, result in zip(texts, together, strict=True):
        ids = torch.tensor(tokenizer(text, add_special_tokens=True)["input_ids"])
        assert result[0]["generated_text"].startswith(text)
        alone = generator(text, max_new_tokens=8, do_sample=False)
        assert alone[0]["generated_text"] == result[0]["generated_text"] and len(ids)


def test_read_this_book_once_ask_many_times(model: GPTBLMHeadModel, tmp_path: Path) -> None:
    book, questions = random_ids(1, 300), [random_ids(1, 4, seed=s) for s in (1, 2)]
    model(book).past_key_values.save(tmp_path / "book.safetensors", model)
    for question in questions:
        cache = GPTBCache.load(tmp_path / "book.safetensors", model, input_ids=book)
        answer = greedy(model, question, past_key_values=cache)
        assert answer[0].tolist() == loop(model, torch.cat((book, question), dim=1)[0], likeliest)[300:]
