"""The tests of generation: the right tokens, no side effects, and text that is never torn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gptb_ds import GPTBConfig, GPTBLMHeadModel
from gptb_ds.cli import main
from gptb_ds.data import tokenization
from gptb_ds.generation import GenerateOptions, Sampling, TextStream, generate, generate_batch, generate_texts
from gptb_ds.loading import load_any
from gptb_ds.model import GPTBCache, recurrence

V, EOT = 29, 0


def make(vocab_size: int = V, eot: int | None = EOT, dropout: float = 0.0) -> GPTBLMHeadModel:
    torch.manual_seed(0)
    config = GPTBConfig(
        vocab_size=vocab_size, n_positions=5, num_slots=5, n_embd=16, n_layer=2, n_head=2, dropout=dropout,
        eos_token_id=eot, initializer_range=0.3,
    )  # fmt: skip
    return GPTBLMHeadModel(config).eval()


def without_end(model: GPTBLMHeadModel) -> GPTBLMHeadModel:
    """The same model, in effect, with an end of text that is never drawn."""
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[EOT] = 0
    model.lm_head.register_forward_hook(lambda _m, _i, out: out.index_fill(-1, torch.tensor([EOT]), -1e9))
    return model


def test_greedy_tokens_are_the_argmax_of_one_long_window() -> None:
    model, prompt = without_end(make()), [3, 4, 5]
    tokens = list(generate(model, prompt, 12, temperature=0))
    whole = torch.tensor([[EOT, *prompt, *tokens]])
    predicted = model(whole).logits[0].argmax(-1)
    assert len(tokens) == 12 and tokens == predicted[len(prompt) : -1].tolist()


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 9])
def test_prompts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    model, prompt = without_end(make()), [1 + i % (V - 1) for i in range(length)]
    whole = list(generate(model, prompt, 6, seed=1))
    monkeypatch.setattr(recurrence, "READ_CHUNK", 4)
    assert list(generate(model, prompt, 6, seed=1)) == whole


def test_a_token_costs_the_same_however_many_came_before() -> None:
    model = without_end(make())
    calls: list[tuple[int, ...]] = []
    model.transformer.h[0].register_forward_hook(lambda _m, inputs, _o: calls.append(tuple(inputs[0].shape)))
    assert len(list(generate(model, [], 40, seed=0))) == 40
    assert calls == [(1, 5, 16)] * 40


def test_the_seed_decides_and_nothing_else() -> None:
    model = without_end(make())
    one = list(generate(model, [1], 30, seed=7))
    torch.rand(11)
    before = torch.get_rng_state()
    assert list(generate(model, [1], 30, seed=7)) == one
    assert torch.equal(torch.get_rng_state(), before)
    assert list(generate(model, [1], 30, seed=8)) != one
    assert list(generate(model, [1], 30)) != list(generate(model, [1], 30))
    assert torch.equal(torch.get_rng_state(), before)


def test_stops_at_the_end_of_text() -> None:
    model = make(eot=None)
    stopped = 0
    for stop in range(V):
        free = list(generate(model, [stop, 1], 30, seed=0))
        expected = free[: free.index(stop)] if stop in free else free
        assert list(generate(model, [1], 30, seed=0, eot_id=stop)) == expected
        stopped += stop in free
    assert stopped


def test_top_1_is_greedy_and_temperature_sharpens() -> None:
    model = without_end(make())
    greedy = list(generate(model, [2], 10, temperature=0))
    assert list(generate(model, [2], 10, top_k=1, seed=3)) == greedy
    assert list(generate(model, [2], 10, temperature=1e-30, seed=3)) == greedy
    assert list(generate(model, [2], 10, top_k=V + 5, seed=3)) == list(generate(model, [2], 10, seed=3))


def test_draws_follow_the_distribution() -> None:
    """Over many lanes at once: the first token after the end of text, at temperature 0.5, among the three likeliest."""
    model = without_end(make())
    logits = model(torch.tensor([[EOT]])).logits[0, -1] / 0.5
    logits[logits < logits.topk(3).values[-1]] = -torch.inf
    sampling = Sampling(temperature=0.5, top_k=3, seed=0)
    draws = torch.tensor(generate_batch(model, [[]] * 4000, 1, sampling)).flatten()
    assert (draws.bincount(minlength=V) / 4000 - logits.softmax(-1)).abs().max() < 0.03


def test_a_model_in_training_samples_without_dropout_and_trains_on() -> None:
    model = without_end(make(dropout=0.5))
    expected = list(generate(model, [1], 8, seed=0))
    model.train()
    before = torch.get_rng_state()
    assert generate(model, [1], 8, seed=0) == expected
    assert model.training and model.transformer.h[0].attn.resid_dropout.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(make(), [1], **({"max_new_tokens": 3} | arguments))


def test_without_an_end_of_text() -> None:
    model = make(eot=None)
    with pytest.raises(ValueError, match="nothing to start from"):
        generate(model, [], 3)
    assert len(list(generate(model, [4], 9, seed=0))) == 9
    with pytest.raises(ValueError, match="tokens from 1 to 99"):
        list(generate(model, [99, 1], 3))


@pytest.fixture(scope="module")
def bpe() -> Any:
    return tokenization.load("bpe:300", iter(["naïve café 東京 🙂🙃 the end of the 東 line"] * 20))


BYTES = ByT5Tokenizer(extra_ids=0)


def streamed(tokenizer: Any, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.end()]


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_text_comes_whole_and_in_order(bpe: Any, text: str) -> None:
    for tokenizer in (BYTES, bpe):
        ids = tokenization.encode(tokenizer, [text])[0].tolist()
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == text
        # No character waits longer than the tokens that it is made of.
        assert "\ufffd" in text or pieces[-1] == ""


@given(st.binary(max_size=80))
@settings(max_examples=150, deadline=None)
def test_broken_bytes_do_not_stop_good_text(bpe: Any, noise: bytes) -> None:
    vocabulary = bpe.get_vocab()
    letters = bytes_to_unicode()
    tail = b"\n" + "東京 ok".encode()
    ids = [vocabulary[letters[byte]] for byte in noise + tail]
    assert "".join(streamed(bpe, ids)).endswith("東京 ok")
    assert "".join(streamed(BYTES, [byte + 3 for byte in noise + tail])).endswith("東京 ok")


def test_the_stream_holds_a_few_tokens(bpe: Any) -> None:
    start_of_three = bpe.get_vocab()[bytes_to_unicode()[0xE6]]
    for tokenizer, token in ((BYTES, 0xE6 + 3), (BYTES, ord("a") + 3), (bpe, start_of_three)):
        stream = TextStream(tokenizer)
        for _ in range(500):
            stream.push(token)
            assert len(stream._ids) <= TextStream._MOST


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export")
    without = make(vocab_size=len(BYTES), eot=BYTES.eos_token_id)
    without.save_pretrained(path)
    BYTES.save_pretrained(path)
    return path


def test_the_verb_prints_prompt_and_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(folder), "--prompt", "dé", "--max-new-tokens", "40", "--seed", "3", "--top-k", "50"]
    assert main(["generate", *words]) == 0
    printed = capsys.readouterr().out
    assert main(["generate", *words]) == 0
    assert capsys.readouterr().out == printed
    model, tokenizer = load_any(str(folder))
    prompt = tokenization.encode(tokenizer, ["dé"])[0].tolist()
    tokens = list(generate(model, prompt, 40, top_k=50, seed=3))
    assert printed == tokenizer.decode(prompt + tokens) + "\n" and printed.startswith("dé")


def test_the_verb_refuses_what_is_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no exported folder"):
        list(generate_texts(GenerateOptions(str(tmp_path))))
    with pytest.raises(ValueError, match=r"temperature is -1\.0"):
        list(generate_texts(GenerateOptions(str(folder), temperature=-1.0)))
    with pytest.raises(ValueError, match="not valid Unicode"):
        list(generate_texts(GenerateOptions(str(folder), prompt="a\udcff")))


def verb(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["generate", *words]) == 0
    return capsys.readouterr().out


def test_the_verb_takes_several_prompts_and_a_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a longer second prompt\n\nthird\n")
    greedy = ["--max-new-tokens", "20", "--temperature", "0"]
    printed = verb(capsys, str(folder), "--prompt", "first", "--prompt-file", str(tmp_path / "prompts.txt"), *greedy)
    alone = [verb(capsys, str(folder), "--prompt", text, *greedy) for text in
             ("first", "a longer second prompt", "third")]  # fmt: skip
    assert printed == "".join(f"--- {n} of 3\n{text}" for n, text in enumerate(alone, 1))
    with pytest.raises(ValueError, match=r"--prompt-file .*cannot be read"):
        generate_texts(GenerateOptions(str(folder), prompt_file=str(tmp_path / "none")))


def test_the_verb_goes_on_from_a_saved_state(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading in two goes, the state saved between them, is reading in one; what was generated is part of it."""
    state, again = str(tmp_path / "state.safetensors"), str(tmp_path / "again.safetensors")
    words = [str(folder), "--temperature", "0"]
    whole = verb(capsys, *words, "--prompt", "one two three", "--max-new-tokens", "12")
    verb(capsys, *words, "--prompt", "one two", "--max-new-tokens", "0", "--state-out", state)
    rest = verb(
        capsys, *words, "--prompt", " three", "--max-new-tokens", "12", "--state-in", state, "--state-out", again
    )
    assert "one two" + rest == whole
    model, tokenizer = load_any(str(folder))
    read = GPTBCache.load(again, model)
    text = tokenization.encode(tokenizer, [whole.removesuffix("\n")])[0].tolist()
    if tokenizer.decode(text) == whole.removesuffix("\n"):
        ids = torch.tensor([[BYTES.eos_token_id, *tokenization.encode(tokenizer, ["one two three"])[0].tolist()]])
        tokens = model.generate(ids, max_new_tokens=12, do_sample=False)
        assert read.knows(tokens[:, : read.get_seq_length()])
    several = verb(capsys, *words, "--prompt", " three", " four", "--max-new-tokens", "12", "--state-in", state)
    assert several.startswith(f"--- 1 of 2\n{rest}")


def test_the_verb_stops_at_a_text_and_searches_with_beams(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(folder), "--prompt", "dé", "--max-new-tokens", "60", "--seed", "3"]
    free = verb(capsys, *words).removesuffix("\n")
    stop = free[20:22]
    stopped = verb(capsys, *words, "--stop", "not there", stop).removesuffix("\n")
    assert stopped == free[: free.index(stop, 2) + len(stop)]
    model, tokenizer = load_any(str(folder))
    searched = verb(capsys, *words[:3], "--max-new-tokens", "20", "--temperature", "0", "--num-beams", "3")
    ids = torch.tensor([[BYTES.eos_token_id, *tokenization.encode(tokenizer, ["dé"])[0].tolist()]])
    tokens = model.generate(ids, max_new_tokens=20, num_beams=3, do_sample=False)
    assert searched == tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda:7"}, "--device cuda:7: not usable here"),
        ({"device": "abacus"}, "--device abacus: not usable here"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"min_p": 1.5}, r"min_p is 1\.5"),
        ({"repetition_penalty": -1.0}, r"repetition_penalty is -1\.0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"prompt": ["a", "b"], "state_out": "x"}, "--state-out: a state is saved of one prompt"),
        ({"state_in": "nowhere"}, "nowhere: not a saved state"),
    ],
)
def test_the_verb_refuses_what_does_not_hold_up(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_texts(GenerateOptions(str(folder), **arguments))


def test_low_precision_generates(folder: Path) -> None:
    texts = generate_texts(GenerateOptions(str(folder), prompt="dé", max_new_tokens=10, precision="bf16", device="cpu"))
    assert len(texts) == 1 and texts[0]
