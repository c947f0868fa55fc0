"""The one layer of a state's cache: the newest states of some lanes, as transformers' caches handle a layer.

Axes: B lanes, S slots, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

# States kept so that the cache can go back: by itself, and while transformers asks for it (assisted decoding). One is
# (S-1) * E numbers a lane: 58 KB at GPT-2's size and 20 slots in float32, 29 KB in bfloat16.
KEPT = 16
RECORDED = 512


@dataclass
class Moment:
    """A lane's place in its stream: the state (B, S-1, E), and the hash of the tokens that it stands for, (B,).

    No tuple with names: transformers' exporters rebuild tuples from an iterator, which those don't take.
    """

    state_BSE: torch.Tensor
    hash_B: torch.Tensor


class StateLayer(CacheLayerMixin):
    """The one layer of a `GPTBCache`: the newest states, oldest first. No state yet = the learned initial state.

    Tensors are replaced, never written to, so that caches may share them.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self, kept: int = KEPT) -> None:
        super().__init__()
        self.kept = kept
        self.clear()
        self.record_past = False

    def clear(self) -> None:
        self.moments: list[Moment] = []
        self.seen = 0
        self.begins_here = True
        self.is_initialized = False

    # What transformers asks of a layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("a recurrent state has no keys and values")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError("a recurrent state has no keys and values; the model calls GPTBCache.append")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return self.moments[-1].state_BSE.shape[0] if self.moments else -1

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        """Back to the learned initial state (not to zeros), before any token."""
        self.clear()

    def offload(self) -> None:
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.moments and hasattr(self, "device"):
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Goes back by -`tokens_to_remove` tokens; a positive number is the length to go back to (transformers 5.0).

        Raises ValueError when the state from back then is no longer kept.
        """
        back = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if back == 0:
            self._trim()
            return
        if back == self.seen and self.begins_here:
            self.clear()
            return
        if back > self.seen and self.begins_here:
            raise ValueError(f"the cache has read {self.seen} tokens: it can't go back by {back}")
        if back >= len(self.moments):
            raise ValueError(
                f"the cache is {self.seen} tokens on and keeps the states of the last {len(self.moments)}: it can't go"
                f" back by {back}; make it as GPTBCache(kept={back + 1}), or activate_past_recording() beforehand"
            )
        self.moments = self.moments[:-back]
        self.seen -= back
        self._trim()

    # Ours

    def append(self, moments: list[Moment], tokens: int) -> None:
        self.moments = (self.moments + moments)[-max(1, RECORDED if self.record_past else self.kept) :]
        self.seen += tokens
        self.device = self.moments[-1].state_BSE.device
        self.is_initialized = True

    def _trim(self) -> None:
        self.moments = self.moments[-max(1, self.kept) :]

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.moments = [Moment(change(moment.state_BSE), change(moment.hash_B)) for moment in self.moments]
