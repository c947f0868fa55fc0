"""Generation: one token a step from a fixed-size state, and its text as it appears.

Axes: T prompt tokens, V vocabulary, B = 1 lane.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gptb_ds.data import tokenization
from gptb_ds.loading import load_any
from gptb_ds.model import GPTBLMHeadModel

# Prompt tokens read in one call: what a long prompt needs of memory at once.
PROMPT_CHUNK = 256


def generate(
    model: GPTBLMHeadModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    eot_id: int | None = None,
) -> Iterator[int]:
    """Yields the tokens that follow `prompt_ids`, one by one, until the end of text (not yielded) or the limit.

    The model reads `eot_id` (default: the configuration's `eos_token_id`) and then the prompt, from its learned initial
    state, as it reads a document in training. Time and memory for each token do not grow. `temperature` 0 takes the
    likeliest token; `top_k` draws among the k likeliest. Draws come from a generator of this call's own, seeded with
    `seed` (None = unpredictable), so no other random stream is disturbed; dropout is off while a token is computed.

    Raises ValueError at the call for numbers out of range, and when there is neither a prompt nor an end of text.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected 1 or more")
    eot_id = _end_of_text(model) if eot_id is None else eot_id
    ids = [*([] if eot_id is None else [eot_id]), *prompt_ids]
    if not ids:
        raise ValueError("nothing to start from: the model names no end of text (eos_token_id) and the prompt is empty")
    return _tokens(model, ids, max_new_tokens, temperature, top_k, seed, eot_id)


def _tokens(
    model: GPTBLMHeadModel,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int | None,
    eot_id: int | None,
) -> Iterator[int]:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    state = None
    for start in range(0, len(ids) - 1, PROMPT_CHUNK):
        _, state = _read(model, ids[start : min(start + PROMPT_CHUNK, len(ids) - 1)], state)
    token = ids[-1]
    for _ in range(max_new_tokens):
        logits_V, state = _read(model, [token], state)
        token = _draw(logits_V, temperature, top_k, generator)
        if token == eot_id:
            return
        yield token


def _end_of_text(model: GPTBLMHeadModel) -> int | None:
    ids = model.config.eos_token_id
    return ids[0] if isinstance(ids, list) else ids


def _read(model: GPTBLMHeadModel, ids: list[int], state_BSE: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (V) after the last of `ids`, on the CPU in float32, and the new state."""
    with _evaluating(model), torch.no_grad():
        tokens_BT = torch.tensor([ids], device=model.device)
        hidden_BTE, state_BSE = model.transformer(tokens_BT, past_hidden_states=state_BSE)
        logits_V = model.lm_head(hidden_BTE[:, -1])[0]
    return logits_V.float().cpu(), state_BSE


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off, and afterwards as it was: a caller may train between two tokens."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _draw(logits_V: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    # Subtracting the largest first keeps a tiny temperature from dividing to infinity.
    logits_V = (logits_V - logits_V.max()) / temperature
    if top_k is not None and top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))


class TextStream:
    """Tokens in, text out as soon as it can no longer change: a character of several tokens is never torn.

    Holds a few tokens, however long the text grows. Works with every transformers tokenizer, whether it writes an
    unfinished character as U+FFFD (byte-level BPE) or leaves it out (ByT5).
    """

    _HELD = 3  # an unfinished UTF-8 character has at most three bytes
    _MOST = 32  # tokens kept when nothing but broken characters comes

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._printed = 0

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        unsure = min(len(text) - len(text.rstrip("\ufffd")), self._HELD)
        new = text[self._printed : len(text) - unsure]
        self._printed += len(new)
        if new and not unsure:
            # The last token stays as left context: some tokenizers write a space only between tokens.
            self._keep(1, 0)
        elif len(self._ids) > self._MOST:
            self._keep(self._HELD, unsure)
        return new

    def end(self) -> str:
        """What is left when no more tokens come."""
        text = self._decode(self._ids)[self._printed :]
        self._ids, self._printed = [], 0
        return text

    def _keep(self, tokens: int, unsure: int) -> None:
        self._ids = self._ids[-tokens:]
        self._printed = max(0, len(self._decode(self._ids)) - unsure)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class GenerateOptions:
    """What `generate_text` writes: see `generate` for the numbers."""

    model: str
    prompt: str = ""
    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    seed: int | None = None


def generate_text(options: GenerateOptions) -> Iterator[str]:
    """The text that follows the prompt, in pieces as they are generated. Raises ValueError for what the user gave."""
    model, tokenizer = load_any(options.model)
    try:
        prompt_ids = tokenization.encode(tokenizer, [options.prompt])[0].tolist()
    except UnicodeEncodeError:
        raise ValueError("--prompt is not valid Unicode; check the terminal's encoding (UTF-8)") from None
    tokens = generate(
        model,
        prompt_ids,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        eot_id=tokenization.eot_id(tokenizer),
    )
    return _text(tokenizer, prompt_ids, tokens)


def _text(tokenizer: Any, prompt_ids: list[int], tokens: Iterator[int]) -> Iterator[str]:
    stream = TextStream(tokenizer)
    for token in prompt_ids:
        stream.push(token)  # left context: the reader has it already
    for token in tokens:
        yield stream.push(token)
    yield stream.end()
