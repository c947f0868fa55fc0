"""GPTB for EleutherAI's evaluation harness: `lm_eval`'s model "gptb", which carries the state.

`python -m gptb_ds.lm_eval` is the command `lm_eval` that knows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from gptb_ds.data import tokenization
from gptb_ds.generation import Sampling, StopAtText, generate_batch, text_after
from gptb_ds.loading import PRECISIONS, load_gptb, usable_device
from gptb_ds.model import GPTBCache
from gptb_ds.prefix_tree import PrefixReader

# What `batch_size auto` means: a lane costs little, but each has a state.
LANES = 64
MAX_NEW_TOKENS = 256  # lm_eval's own default
_GENERATE = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams"}


class GPTBLM(TemplateLM):
    """A run, a checkpoint or an exported folder (`pretrained`) as a model of lm_eval.

    Nothing is cut at a context length: a text of any length is read once, from its start. Beginnings that requests
    share (few-shot examples, a question with several answers) are read once, see `PrefixReader`.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        add_bos_token: bool = True,
        seed: int | None = 1234,
    ) -> None:
        """`add_bos_token`: a context begins with the end of text, as documents do in training.

        lm_eval's backend "hf" leaves it out, unless the context is empty. Raises ValueError for a folder that is no
        model, and for settings that there are not.
        """
        super().__init__()
        types = PRECISIONS | {str(dtype).split(".")[-1]: dtype for dtype in PRECISIONS.values()}
        if dtype not in types:
            raise ValueError(f"dtype {dtype}: not one of {', '.join(types)}")
        if not (batch_size is None or str(batch_size).startswith("auto") or str(batch_size).isdigit()):
            raise ValueError(f"batch_size {batch_size}: expected a number or auto")
        model, self.tokenizer = load_gptb(pretrained)
        # The command asks for cuda:0 unless told otherwise, and takes it for granted that a model knows better.
        no_gpu = str(device or "cuda").startswith("cuda") and not torch.cuda.is_available()
        self._device = usable_device("auto" if no_gpu or device is None else str(device))
        self.model = model.to(device=self._device, dtype=types[dtype])  # type: ignore[call-arg]
        self._lanes = int(str(batch_size)) if str(batch_size).isdigit() else int(max_batch_size or LANES)
        self._add_bos, self._seed, self._name = add_bos_token, seed, pretrained
        self.reader = PrefixReader(self.model, self._lanes)

    @property
    def eot_token_id(self) -> int:
        return tokenization.eot_id(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """The tokens of a text; what spells a special token is text, as in training."""
        return [int(token) for token in tokenization.encode(self.tokenizer, [string])[0]]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        return ([self.eot_token_id] if self._add_bos else []) + context_ids, continuation_ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        scores = self.reader.score(
            [context + continuation for _, context, continuation in requests],
            [len(context) for _, context, _ in requests],
        )
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each from its start, however long."""
        rows = [[self.eot_token_id, *self.tok_encode(request.args[0])] for request in requests]
        totals = [total for total, _ in self.reader.score(rows, [1] * len(rows))]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of its stop strings."""
        texts: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in alike.values():
            for first in range(0, len(indices), self._lanes):
                part = indices[first : first + self._lanes]
                contexts = [requests[index].args[0] for index in part]
                texts |= dict(zip(part, self._generate(contexts, requests[part[0]].args[1]), strict=True))
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _generate(self, contexts: Sequence[str], settings: Mapping[str, object]) -> list[str]:
        settings = dict(normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS))
        stops = [text for text in settings.pop("until") if text]
        most = settings.pop("max_gen_toks")
        if not settings.pop("do_sample"):
            settings["temperature"] = 0.0
        if unknown := sorted(settings.keys() - _GENERATE):
            raise ValueError(f"generation_kwargs {', '.join(unknown)}: not known here; there are {sorted(_GENERATE)}")
        begins = [self.eot_token_id] if self._add_bos else []
        rows = [begins + self.tok_encode(context) or [self.eot_token_id] for context in contexts]
        # All but the last token is read here, shared beginnings once; `generate` needs one to read.
        cache = GPTBCache(self.reader.states([row[:-1] for row in rows]))
        tokens = generate_batch(
            self.model,
            [row[-1:] for row in rows],
            most,
            Sampling(seed=self._seed, **settings),
            eot_id=self.eot_token_id,
            cache=cache,
            stopping=[StopAtText(self.tokenizer, stops, prompt_tokens=1)] if stops else [],
        )
        texts = [text_after(self.tokenizer, row, new) for row, new in zip(rows, tokens, strict=True)]
        return [_cut(text, stops) for text in texts]


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
