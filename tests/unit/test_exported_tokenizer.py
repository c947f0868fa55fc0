"""The tokenizer of an exported folder begins a text as documents began in training, for programs that know of none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, pipeline

from gptb_ds.data import tokenization
from gptb_ds.export import ExportOptions, export
from gptb_ds.generation import GenerateOptions, generate_texts
from tests.harness.models import small_gptb

BYTES = ByT5Tokenizer(extra_ids=0)


def bpe() -> PreTrainedTokenizerFast:
    return tokenization.load("bpe:280", iter(["the end of the text and the beginning"] * 4))


def saved(tokenizer: object, folder: Path) -> PreTrainedTokenizerFast:
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def fast_bytes(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return saved(tokenization.for_other_programs(ByT5Tokenizer(extra_ids=0)), tmp_path_factory.mktemp("bytes"))


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_bytes_stay_bytes(fast_bytes: PreTrainedTokenizerFast, text: str) -> None:
    ids = [byte + 3 for byte in text.encode()]
    if "</s>" not in text and "<pad>" not in text and "<unk>" not in text:  # spelt in a text, a tokenizer makes tokens
        assert fast_bytes(text, add_special_tokens=False).input_ids == ids
        assert fast_bytes(text).input_ids == [1, *ids]
    assert fast_bytes.decode([1, *ids], skip_special_tokens=True) == text
    assert tokenization.encode(fast_bytes, [text])[0].tolist() == ids


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_tokens_are_those_of_the_store(kind: str, tmp_path: Path) -> None:
    before = BYTES if kind == "bytes" else bpe()
    known = tokenization.fingerprint(before)
    after = saved(tokenization.for_other_programs(before), tmp_path / "once")
    again = saved(tokenization.for_other_programs(after), tmp_path / "twice")
    eot = tokenization.eot_id(before)
    for made in (after, again):
        assert tokenization.fingerprint(made) == known and tokenization.eot_id(made) == eot
        assert tokenization.vocab_size(made) == tokenization.vocab_size(before)
        assert tokenization.is_bytes(made) == (kind == "bytes")
        ids = made("the end", add_special_tokens=False).input_ids
        assert made("the end").input_ids == [eot, *ids] and ids[-1] != eot


def test_a_tokenizer_with_tokens_of_its_own_stays_as_it_is() -> None:
    from tokenizers import processors

    own = bpe()
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A <|endoftext|>", None, [("<|endoftext|>", 0)]
    )
    known = tokenization.fingerprint(own)
    assert tokenization.for_other_programs(own) is own and own("a").input_ids[-1] == 0
    assert tokenization.fingerprint(own) == known != tokenization.fingerprint(bpe())


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_pipeline_says_what_generate_says(kind: str, tmp_path: Path) -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0) if kind == "bytes" else bpe()
    eot = tokenization.eot_id(tokenizer)
    small_gptb(vocab_size=len(tokenizer), eos_token_id=eot, initializer_range=0.5, seed=3).save_pretrained(
        tmp_path / "m"
    )
    tokenizer.save_pretrained(tmp_path / "m")
    export(ExportOptions(str(tmp_path / "m"), str(tmp_path / "out")))
    generator = pipeline("text-generation", str(tmp_path / "out"), device="cpu")
    texts = ["the end", "the beginning of"]
    theirs = generator(texts, max_new_tokens=12, do_sample=False, batch_size=2)
    options = GenerateOptions(str(tmp_path / "out"), texts, max_new_tokens=12, temperature=0.0, device="cpu")
    ours = generate_texts(options)
    said = [result[0]["generated_text"] for result in theirs]
    assert said == [text + new for text, new in zip(texts, ours, strict=True)] and any(ours)
