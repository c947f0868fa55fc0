"""Generation: transformers' `generate` over documents as the model was trained on them, and its text as it appears.

Axes: B prompts, T tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from gptb_ds.data import tokenization
from gptb_ds.loading import PRECISIONS, load_gptb, usable_device
from gptb_ds.model import AnyGPTB, GPTBCache
from gptb_ds.sampling import Sampling
from gptb_ds.text_stream import TextStream

__all__ = ["GenerateOptions", "Sampling", "TextStream", "generate", "generate_batch", "generate_texts"]


def generate(
    model: AnyGPTB,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    eot_id: int | None = None,
) -> list[int]:
    """The tokens that follow one prompt, without the end of text; see `generate_batch`."""
    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    return generate_batch(model, [prompt_ids], max_new_tokens, sampling, eot_id=eot_id)[0]


def generate_batch(
    model: AnyGPTB,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    eot_id: int | None = None,
    cache: GPTBCache | None = None,
    streamer: BaseStreamer | None = None,
    stopping: Sequence[StoppingCriteria] = (),
) -> list[list[int]]:
    """The tokens that follow each prompt, until its end of text (not returned) or `max_new_tokens`.

    The model reads `eot_id` (default: the configuration's `eos_token_id`) and then the prompt, from its learned initial
    state, as it reads a document in training; with a `cache` it reads the prompt alone and goes on from there. Prompts
    of different length are padded on the left. Draws come from a random stream of this call's own, so no other one is
    disturbed, and dropout is off meanwhile. With a `cache` and one prompt, the cache then stands for all of its text.

    Raises ValueError for numbers out of range, and when there is nothing to read.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
    eot_id = _end_of_text(model) if eot_id is None else eot_id
    starts = cache is None or not cache.layer.moments
    rows = [[*([eot_id] if starts and eot_id is not None else []), *prompt] for prompt in prompts]
    if not all(rows):
        raise ValueError(
            "nothing to start from: the model names no end of text (eos_token_id) and the prompt is empty"
            if starts
            else "nothing to read: a state is continued with a prompt"
        )
    ids_BT, mask_BT = _padded(rows, model.device)
    with _evaluating(model), _own_draws(sampling.seed, model.device):
        if max_new_tokens == 0:
            with torch.no_grad():
                model(ids_BT, attention_mask=mask_BT, past_key_values=cache, logits_to_keep=1)
            return [[] for _ in rows]
        if cache is not None and cache.layer.seen:  # a longer mask says that the tokens are new
            mask_BT = torch.cat((mask_BT.new_ones((len(rows), cache.layer.seen)), mask_BT), dim=1)
        output_BT = model.generate(
            ids_BT,
            attention_mask=mask_BT,
            past_key_values=cache,
            generation_config=sampling.configuration(max_new_tokens, eot_id),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList(stopping),
        )
        new_BT = output_BT[:, ids_BT.shape[1] :]
        if cache is not None and len(rows) == 1 and int(new_BT[0, -1]) != eot_id:
            with torch.no_grad():  # the last token was chosen, not read
                model(new_BT[:, -1:], past_key_values=cache)
    return [row[: row.index(eot_id)] if eot_id in row else row for row in new_BT.tolist()]


def _end_of_text(model: AnyGPTB) -> int | None:
    ids = model.config.eos_token_id
    return ids[0] if isinstance(ids, list) else ids


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, (B, T) both, padded on the left; what stands there is never read."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off, and afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _own_draws(seed: int | None, device: torch.device) -> Iterator[None]:
    """torch's random streams from `seed`, and afterwards as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        yield


class StopAtText(StoppingCriteria):
    """Ends a lane whose new text holds one of `texts`, whatever the tokenizer.

    transformers' own stop strings (StopStringCriteria) are worked out from the text of each token alone, which the
    byte tokenizer and byte fallback do not have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer, self._texts, self._begin = tokenizer, list(texts), prompt_tokens
        # A character has at most four tokens.
        self._window = 4 * max(map(len, texts)) + 32

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        newest = input_ids[:, self._begin :][:, -self._window :]
        texts = [text_after(self._tokenizer, [], row) for row in newest.tolist()]
        stopped = [any(stop in text for stop in self._texts) for text in texts]
        return torch.tensor(stopped, device=input_ids.device)


class _Pieces(BaseStreamer):
    """Hands on the text of one lane as it is generated. The first tokens that `generate` puts are the prompt's."""

    def __init__(self, stream: TextStream, say: Callable[[str], None]) -> None:
        self._stream, self._say, self._in_prompt = stream, say, True

    def put(self, value: torch.Tensor) -> None:
        if self._in_prompt:
            self._in_prompt = False
            return
        for token in value.flatten().tolist():
            self._say(self._stream.push(token))

    def end(self) -> None:
        self._say(self._stream.end())


@dataclass(frozen=True)
class GenerateOptions:
    """What `generate_texts` reads and writes; the numbers are those of `Sampling`."""

    model: str
    prompt: Sequence[str] = ("",)
    prompt_file: str | None = None
    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1
    stop: Sequence[str] = ()
    seed: int | None = None
    state_in: str | None = None
    state_out: str | None = None
    device: str = "auto"
    precision: str = "fp32"

    def prompts(self) -> list[str]:
        """Those given, and each line of the file. Raises ValueError for a file that can't be read."""
        given = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if self.prompt_file is None:
            return given or [""]
        try:
            lines = Path(self.prompt_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt-file {self.prompt_file}: cannot be read: {error}") from None
        lines = [line for line in lines if line]
        if not lines:
            raise ValueError(f"--prompt-file {self.prompt_file}: holds no prompt; write one a line")
        return [*(prompt for prompt in given if prompt), *lines]

    def sampling(self) -> Sampling:
        return Sampling(
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.num_beams,
            self.seed,
        )


def generate_texts(options: GenerateOptions, say: Callable[[str], None] | None = None) -> list[str]:
    """The text that follows each prompt. With one prompt and no beams, `say` gets it in pieces as it is generated.

    Raises ValueError for what the user gave.
    """
    prompts, sampling = options.prompts(), options.sampling()
    if options.state_out and (len(prompts) > 1 or options.num_beams > 1):
        raise ValueError("--state-out: a state is saved of one prompt, without beams")
    _check_writable(options.state_out)
    model, tokenizer = load_gptb(options.model)
    model.to(device=usable_device(options.device), dtype=PRECISIONS[options.precision])  # type: ignore[call-arg]
    try:
        rows = [row.tolist() for row in tokenization.encode(tokenizer, prompts)]
    except UnicodeEncodeError:
        raise ValueError("--prompt is not valid Unicode; check the terminal's encoding (UTF-8)") from None
    cache = _given_state(options, model, len(rows))
    stream = TextStream(tokenizer)
    streamed = say is not None and len(rows) == 1 and options.num_beams == 1
    if streamed:
        for token in rows[0]:
            stream.push(token)  # left context: the reader has it already
    prompt_tokens = max(map(len, rows)) + (0 if cache is not None and cache.layer.moments else 1)
    tokens = generate_batch(
        model,
        rows,
        options.max_new_tokens,
        sampling,
        eot_id=tokenization.eot_id(tokenizer),
        cache=cache,
        streamer=_Pieces(stream, say) if streamed and say is not None else None,
        stopping=[StopAtText(tokenizer, options.stop, prompt_tokens)] if options.stop else [],
    )
    if options.state_out:
        assert cache is not None
        cache.save(options.state_out, model)
    return [text_after(tokenizer, row, new) for row, new in zip(rows, tokens, strict=True)]


def _check_writable(state_out: str | None) -> None:
    """Raises ValueError for a file that can't come to be: better now than after the text."""
    if state_out is None:
        return
    path = Path(state_out)
    if path.is_dir():
        raise ValueError(f"--state-out {path}: is a folder; name a file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--state-out {path}: there is no folder {path.parent} that can be written to")


def _given_state(options: GenerateOptions, model: AnyGPTB, lanes: int) -> GPTBCache | None:
    """The cache to read into: that of `state_in`, once for each prompt, or a new one if the state is to be saved."""
    if options.state_in is None:
        return GPTBCache() if options.state_out else None
    cache = GPTBCache.load(options.state_in, model)
    if cache.layer.batch_size != 1:
        raise ValueError(f"--state-in {options.state_in}: holds {cache.layer.batch_size} lanes; one is continued")
    cache.batch_repeat_interleave(lanes * options.num_beams)
    return cache


def text_after(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """The text that the new tokens add to that of the prompt."""
    stream = TextStream(tokenizer)
    for token in prompt_ids:
        stream.push(token)
    return "".join([*map(stream.push, new_ids), stream.end()])
