"""Tokenizers: the byte tokenizer, any of transformers', and a BPE trained on the corpus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gptb_ds.data.long_texts import LONGEST, pieces

if TYPE_CHECKING:
    from transformers import BatchEncoding
    from transformers import PreTrainedTokenizerBase as Tokenizer

END = "<|endoftext|>"
_LONGEST_WORD = 64  # bytes
_LARGEST_BPE = 1 << 20  # tokens; the library sets memory aside for all of them, and ends the process without it
_AT_ONCE = 4 * LONGEST  # characters that are tokenised at once


def load(spec: str, texts: Iterator[str]) -> Tokenizer:
    """The tokenizer of `--tokenizer`: `bytes`, `bpe:SIZE` (trained on `texts`), a store, a folder or a hub name.

    Raises ValueError, in one line, when there is no such tokenizer or it cannot be read.
    """
    from transformers import AutoTokenizer, ByT5Tokenizer

    if spec == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    if spec.startswith("bpe:"):
        return _train_bpe(spec, texts)
    folder = Path(spec)
    if (folder / "store.json").is_file():
        folder = folder / "tokenizer"
        if not folder.is_dir():
            raise ValueError(f"--tokenizer {folder}: this folder of the store is missing; prepare the store again")
    if folder.is_file():
        raise ValueError(f"--tokenizer {spec}: is a file; give the folder that it is in, {folder.parent}")
    if folder.is_absolute() and not folder.exists():
        raise ValueError(f"--tokenizer {spec}: no such folder")
    try:
        return load_folder(folder) if folder.is_dir() else AutoTokenizer.from_pretrained(spec)
    except UnreadableTokenizerError as error:
        raise ValueError(f"--tokenizer {error}") from None
    except Exception as error:  # transformers and tokenizers raise what comes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"--tokenizer {spec}: no such tokenizer ({lines[0]}); give bytes, bpe:SIZE, a folder or a hub name"
        ) from None


class UnreadableTokenizerError(ValueError):
    """A tokenizer's file is there and can't be read; the message is one line with its name."""


def load_folder(folder: Path) -> Tokenizer:
    """The tokenizer that is saved in a folder: a tokenizer's, a model's or an export's. Needs no network.

    Raises ValueError, in one line, when the folder has none, or one that can't be read.
    """
    from transformers import AutoTokenizer

    # Without these files transformers makes a tokenizer of the model's kind that knows no token, and says nothing.
    if not any(_is_of_tokenizer(file.name) for file in folder.iterdir()):
        raise ValueError(f"{folder} has no tokenizer files (tokenizer.json, vocab.json, tokenizer.model, ..)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UnreadableTokenizerError(f"{folder}: its tokenizer cannot be read ({_said(error)})") from None
    except Exception as error:  # the library tokenizers raises nothing more special
        import tokenizers

        raise UnreadableTokenizerError(
            f"{folder}/tokenizer.json: cannot be read by tokenizers {tokenizers.__version__}; made by a newer version,"
            f" or damaged ({' '.join(str(error).split())[:120]}); pip install -U tokenizers transformers"
        ) from None
    try:
        knows_nothing = not any(tokenizer.encode(text, add_special_tokens=False) for text in ("a", "the", "1"))
    except Exception as error:  # a vocabulary without the token for what is unknown, for example
        raise UnreadableTokenizerError(f"{folder}: its tokenizer fails on plain text ({_said(error)})") from None
    if knows_nothing and tokenizer.eos_token_id is not None:
        raise ValueError(f"{folder} holds a tokenizer that makes no tokens of text; its vocabulary is missing")
    return tokenizer


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_of_tokenizer(name: str) -> bool:
    starts = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges")
    return name.startswith(starts) or name.endswith((".model", ".tiktoken"))


def needs_no_files(spec: str) -> bool:
    """Whether the tokenizer is one that is made here, not read from a folder or the hub."""
    return spec == "bytes" or spec.startswith("bpe:")


def check_spec(spec: str) -> None:
    """Raises ValueError when a name is empty or a BPE's size is not usable, before any work is done."""
    if not spec.strip():
        raise ValueError("--tokenizer '': is empty (a variable that is not set?); give bytes, bpe:SIZE or a folder")
    size = spec.removeprefix("bpe:")
    if size != spec and not (size.isdecimal() and len(size) < 10 and 257 <= int(size) <= _LARGEST_BPE):
        raise ValueError(
            f"--tokenizer {spec}: the size must be a number of at least 257 (256 bytes and the end of text) and at most"
            f" {_LARGEST_BPE:,}"
        )


def eot_id(tokenizer: Tokenizer) -> int:
    """The token between documents: end of sequence, or beginning where it has none. Raises ValueError without both."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        f"the tokenizer {tokenizer_name(tokenizer)} has neither an end nor a beginning of sequence token to part"
        " documents; set its eos_token and save it again"
    )


def vocab_size(tokenizer: Tokenizer) -> int:
    """Embedding rows that the ids need: the largest id and one."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def tokenizer_name(tokenizer: Tokenizer) -> str:
    """A short name for people."""
    if is_bytes(tokenizer):
        return "bytes"
    return f"{tokenizer.name_or_path or 'bpe'} ({len(tokenizer)} tokens)"


def is_bytes(tokenizer: Tokenizer) -> bool:
    """Whether text is encoded as its UTF-8 bytes, three above their values (ByT5, Xue et al. 2022)."""
    if type(tokenizer).__name__ == "ByT5Tokenizer":
        return True
    ids = _byte_vocabulary()
    return len(tokenizer) == len(ids) and tokenizer.get_vocab() == ids


def for_other_programs(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer for an exported folder: the same tokens, and what it makes of a text begins with the end of text.

    So documents begin in training, and so must a prompt, also one that `pipeline` or lm_eval encodes, who know nothing
    of it. ByT5's tokenizer puts the end of text behind a text instead, where the model takes it for the end of its
    prompt; the byte tokenizer is therefore written as one of the library tokenizers. `add_special_tokens=False` encodes
    without. A tokenizer that puts tokens of its own around a text, or is written in Python, is left as it is.
    """
    from tokenizers import processors

    made = _fast_bytes() if is_bytes(tokenizer) else tokenizer
    backend = getattr(made, "backend_tokenizer", None)
    if backend is None or made("a").input_ids != made("a", add_special_tokens=False).input_ids:
        return tokenizer
    eot = eot_id(made)
    name = made.convert_ids_to_tokens(eot)
    begin = processors.TemplateProcessing(f"{name} $A", f"{name} $A $B:1", [(name, eot)])
    kept = backend.post_processor
    backend.post_processor = begin if kept is None else processors.Sequence([kept, begin])
    return made


def _byte_vocabulary() -> dict[str, int]:
    """ByT5's ids, with the bytes spelt as the library tokenizers spells them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    return special | {character: byte + 3 for byte, character in bytes_to_unicode().items()}


def _fast_bytes() -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(_byte_vocabulary(), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "</s>", "<unk>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that give equal ids, wherever they came from, also from an exported folder."""
    from transformers import ByT5Tokenizer

    if is_bytes(tokenizer):
        tokenizer = ByT5Tokenizer(extra_ids=0) if eot_id(tokenizer) == 1 else tokenizer
    backend, eot = getattr(tokenizer, "backend_tokenizer", None), tokenizer.convert_ids_to_tokens(eot_id(tokenizer))
    facts = [
        type(tokenizer).__name__ if backend is None else _without_beginning(json.loads(backend.to_str()), eot),
        sorted(tokenizer.get_vocab().items()),
        eot_id(tokenizer),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _without_beginning(backend: dict[str, Any], eot: object) -> dict[str, Any]:
    """A tokenizer's file without what `for_other_programs` added."""
    steps = backend.get("post_processor") or {}
    parts = steps.get("processors", [steps]) if steps.get("type") == "Sequence" else [steps]
    single = parts[-1].get("single", []) if parts[-1].get("type") == "TemplateProcessing" else []
    if [next(iter(piece)) for piece in single] != ["SpecialToken", "Sequence"] or single[0]["SpecialToken"][
        "id"
    ] != eot:
        return backend
    return backend | {"post_processor": parts[0] if len(parts) > 1 else None}


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[npt.NDArray[np.integer]]:
    """Token ids of each text. Text that spells a special token is text: it never becomes that token.

    Raises UnicodeEncodeError for a text with a lone surrogate.
    """
    if is_bytes(tokenizer):
        return [np.frombuffer(text.encode(), dtype=np.uint8) + np.uint16(3) for text in texts]
    for text in texts:
        text.encode()
    rows: list[list[npt.NDArray[np.integer]]] = [[] for _ in texts]
    for group in _groups(_numbered_pieces(tokenizer, texts)):
        ids = _call(tokenizer, [piece for _, piece in group])["input_ids"]
        for (number, _), row in zip(group, ids, strict=True):
            rows[number].append(np.asarray(row, dtype=np.int32))
    return [row[0] if len(row) == 1 else np.concatenate(row) for row in rows]


def size_of_text(tokenizer: Tokenizer, ids: npt.NDArray[np.integer]) -> int:
    """Bytes of the text that tokens stand for."""
    if is_bytes(tokenizer):
        return int(((ids >= 3) & (ids < 259)).sum())
    return len(str(tokenizer.decode(ids.tolist())).encode(errors="replace"))


def _numbered_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Each text, in pieces when it is long, with its number."""

    def ids_of(text: str) -> list[int]:
        return list(_call(tokenizer, [text])["input_ids"][0])

    def tokens_of(text: str) -> list[tuple[int, int | None, int, int]]:
        found = _call(tokenizer, [text], return_offsets_mapping=True)
        places = zip(found["input_ids"][0], found.word_ids(0), found["offset_mapping"][0], strict=True)
        return [(token, word, start, end) for token, word, (start, end) in places]

    for number, text in enumerate(texts):
        for piece in pieces(text, ids_of, tokens_of if tokenizer.is_fast else None):
            yield number, piece


def _groups(numbered: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Neighbours that are tokenised at once: the library needs a hundred times the memory of their text."""
    group: list[tuple[int, str]] = []
    size = 0
    for number, piece in numbered:
        if group and size + len(piece) > _AT_ONCE:
            yield group
            group, size = [], 0
        group.append((number, piece))
        size += len(piece)
    if group:
        yield group


def _call(tokenizer: Tokenizer, texts: list[str], **options: bool) -> BatchEncoding:
    try:
        found: BatchEncoding = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )
    except Exception as error:
        if type(error) is not Exception:  # all that the library tokenizers raises
            raise
        raise ValueError(
            f"--tokenizer {tokenizer.name_or_path}: fails on a text ({_said(error)}); give another one"
        ) from None
    return found


def _train_bpe(spec: str, texts: Iterator[str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    check_spec(spec)
    tokenizer = Tokenizer(models.BPE())
    # Words are cut at _LONGEST_WORD bytes (a character each, after ByteLevel). For each merge, training looks through
    # the distinct words that hold it: text without blanks (DNA, base64) would take time in the square of its size.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Split(Regex(f".{{{_LONGEST_WORD}}}"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(spec[4:]),
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)
