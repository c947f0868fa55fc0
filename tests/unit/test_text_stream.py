"""A stream of text equals the decode of all its tokens, for every kind of tokenizer and whatever the tokens."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, CTRLTokenizer, PreTrainedTokenizerFast

from gptb_ds.data import tokenization
from gptb_ds.text_stream import TextStream

CORPUS = [
    "naïve café 東京 🙂🙃 the end of the 東 line, isn't it? He said 'no' . Well",
    "hello world  two  spaces\nnew line\tTab",
    "don't stop ... now !",
]


def byte_fallback() -> Any:
    """As Llama 2 and Mistral: pieces for letters and spaces, and every other character as its bytes."""
    words = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for piece in ["▁", "▁the", *"abcdefghijklmnopqrstuvwxyz.,'é"]:
        words[piece] = len(words)
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<reserved>"])  # special, but in no role that transformers knows
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    special = ["[UNK]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")


def unigram() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def replacing_at_the_end() -> Any:
    """A decoder that takes out blanks before full stops when all tokens are joined."""
    words = {word: number for number, word in enumerate(["<unk>", "</s>", " ", " .", *"abcdefgh."])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(" .", ".")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def replacing_joined_bytes() -> Any:
    """The same behind a byte-level decoder, which joins the tokens as well; with tokens that are added to it."""
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "Ġ", "Ġ.", *"abcdefgh.Ãã"])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(" .", ".")])
    tokenizer.add_tokens(["東京", " <tool> "])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def with_joints() -> Any:
    """Pieces that end in "@@" are joined to the next one, by Python at the very end (CTRL, PhoBERT)."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        letters = "abcdefghijklmnopqrstuvwxyzé東.,'"
        words = ["<unk>", "</s>", "the", "th@@", *letters, *(f"{letter}@@" for letter in letters)]
        vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
        merges.write_text("#version: 0.2\nt h\nth e</w>\n")
        return CTRLTokenizer(str(vocabulary), str(merges), unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {
    "bytes (ByT5)": ByT5Tokenizer(extra_ids=0),
    "byte-level BPE": tokenization.load("bpe:320", iter(CORPUS * 20)),
    "byte fallback": byte_fallback(),
    "WordPiece": word_piece(),
    "Unigram": unigram(),
    "replaced when joined": replacing_at_the_end(),
    "replaced in joined bytes": replacing_joined_bytes(),
    "joints (CTRL)": with_joints(),
}
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from([*"aé東🙂 .'\n", "  ", "the ", "n't", "日本語の文"]), max_size=25).map("".join),
)


def streamed(tokenizer: Any, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.end()]


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_the_stream_of_a_text_is_its_decode(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenization.encode(tokenizer, [text])[0].tolist()
    assert "".join(streamed(tokenizer, ids)) == decoded(tokenizer, ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_stream_of_any_tokens_is_their_decode(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=80))
    assert "".join(streamed(tokenizer, ids)) == decoded(tokenizer, ids)


def test_broken_characters_in_a_row_are_all_printed() -> None:
    tokenizer = TOKENIZERS["replaced in joined bytes"]
    for count in range(1, 9):
        ids = [tokenizer.convert_tokens_to_ids("Ã")] * count
        assert "".join(streamed(tokenizer, ids)) == decoded(tokenizer, ids) == "\ufffd" * count


def test_byte_fallback_prints_japanese() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenization.encode(tokenizer, ["the 日本語の文 end"])[0].tolist()
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == "the 日本語の文 end" and "\ufffd" not in "".join(pieces)
    assert sum(map(bool, pieces)) > 4  # and it comes in pieces


def test_a_special_token_without_a_role_does_not_end_a_run_of_bytes() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenizer.convert_tokens_to_ids(["<0xE6>", "<reserved>", "<0x9D>", "<0xB1>"])
    assert "".join(streamed(tokenizer, ids)) == decoded(tokenizer, ids) == "東"
