"""The state as transformers' cache: `past_key_values` of a recurrent model.

Axes: B lanes, T tokens, S slots, E embedding.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .state_layer import KEPT, RECORDED, Moment, StateLayer

FORMAT = "gptb-state-1"
# An odd constant (that of Knuth's MMIX generator): hashes of tokens are polynomials in it, modulo 2**64.
_BASE = 6364136223846793005


class GPTBCache(Cache):
    """The recurrent state of some lanes, with the last `kept` states before it, so that `crop` can go back.

    It is what the model takes and returns as `past_key_values`; beams reorder it, `batch_repeat_interleave(n)` gives
    each lane n times, `reset()` returns it to the learned initial state. `copy()` costs nothing and lets one reading of
    a long text be continued in several ways.
    """

    given_whole = False  # set by `generate`: the tokens that it got begin with those that were read

    def __init__(self, state_BSE: torch.Tensor | None = None, *, kept: int = KEPT, offloading: bool = False) -> None:
        """`state_BSE` (B, S-1, E) is a state to start from, of which no tokens are known; None = the initial state.

        `offloading` keeps the states on the CPU between two calls of the model.

        Raises ValueError for what is no state, and for a negative `kept`.
        """
        if isinstance(kept, bool) or not isinstance(kept, int) or kept < 0:
            raise ValueError(f"kept is {kept!r}; expected the number of states to keep, 0 or more")
        if state_BSE is not None and not (
            isinstance(state_BSE, torch.Tensor) and state_BSE.dim() == 3 and state_BSE.is_floating_point()
        ):
            given = _described(state_BSE) if isinstance(state_BSE, torch.Tensor) else type(state_BSE).__name__
            raise ValueError(f"the state is a {given}; expected floating-point numbers (lanes, num_slots - 1, width)")
        super().__init__(layers=[StateLayer(kept)], offloading=offloading)
        if state_BSE is not None:
            unknown = torch.full(state_BSE.shape[:1], -1, dtype=torch.int64, device=state_BSE.device)
            self.layer.append([Moment(state_BSE, unknown)], 0)
            self.layer.begins_here = False

    @property
    def layer(self) -> StateLayer:
        return self.layers[0]  # type: ignore[return-value]

    @property
    def state(self) -> torch.Tensor | None:
        """The newest state (B, S-1, E); None = the learned initial state."""
        return self.layer.moments[-1].state_BSE if self.layer.moments else None

    @property
    def wanted(self) -> int:
        """How many of the newest states the model should hand over."""
        return max(1, RECORDED if self.layer.record_past else self.layer.kept)

    def copy(self) -> GPTBCache:
        """A cache that goes its own way from here. It shares the tensors, which are never written to."""
        other = GPTBCache(kept=self.layer.kept, offloading=self.offloading)
        vars(other.layer).update(vars(self.layer))
        return other

    def append(
        self,
        states: list[torch.Tensor],
        ids_TB: torch.Tensor | None,
        mask_TB: torch.Tensor | None,
        steps: int,
    ) -> None:
        """The model has read `steps` more columns: `states` are those after the last of them, newest last.

        `ids_TB` None: vectors were read, not tokens. `mask_TB` tells the tokens that were read from the others.
        """
        before = self.layer.moments[-1].hash_B if self.layer.moments else None
        ids_TB = ids_TB if ids_TB is not None else states[-1].new_full((steps, len(states[-1])), -2, dtype=torch.int64)
        hashes = _hashes(before, ids_TB, mask_TB, len(states))
        # Before its first state the list may be one longer than the columns: it then begins with the state before them.
        states = states[-len(hashes) :]
        self.layer.append([Moment(*pair) for pair in zip(states, hashes, strict=True)], steps)
        if self.offloading:
            self.layer.offload()

    def knows(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> bool:
        """Whether the tokens `input_ids` (B, T) begin with those that this state stands for, read from the start."""
        seen = self.layer.seen
        if self.state is None or seen == 0 or input_ids.shape[1] < seen or input_ids.shape[0] != self.state.shape[0]:
            return False
        mask_TB = None if attention_mask is None else attention_mask[:, :seen].bool().t()
        read = _hashes(None, input_ids[:, :seen].t(), mask_TB, 1)
        return torch.equal(read[-1].cpu(), self.layer.moments[-1].hash_B.cpu())

    # On disk

    def save(self, path: str | Path, model: PreTrainedModel) -> None:
        """Writes the newest state to a safetensors file, whole or not at all, with hashes of its tokens and of `model`.

        Raises ValueError when nothing was read yet, OSError when the disk does not take it.
        """
        if self.state is None:
            raise ValueError("there is no state to save: nothing was read yet")
        facts = {"format": FORMAT, "model": fingerprint(model), "seen": str(self.layer.seen)}
        tensors = {"state": self.state.detach().cpu().contiguous(), "tokens_hash": self.layer.moments[-1].hash_B.cpu()}
        unfinished = Path(f"{path}.unfinished")
        try:
            unfinished.touch()
            mode = unfinished.stat().st_mode
            save_file(tensors, unfinished, metadata={"gptb": json.dumps(facts)})
            unfinished.chmod(mode)  # safetensors 0.8 puts a file in its place that only its owner may read
            os.replace(unfinished, path)
        except SafetensorError as error:  # its way to say that the disk is full or a folder is missing
            raise OSError(errno.EIO, f"the state can't be written: {error}", str(path)) from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, input_ids: torch.Tensor | None = None) -> GPTBCache:
        """The state of a file that `save` wrote, on the model's device.

        `input_ids` (B, T), when given, must be exactly the tokens that it stands for.

        Raises ValueError, in one line, for a file that is no state, or of another model, precision, shape or tokens.
        """
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["gptb"])
                state_BSE, hash_B = file.get_tensor("state"), file.get_tensor("tokens_hash")
            seen, known_format, made_by = int(facts["seen"]), facts["format"] == FORMAT, facts["model"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a saved state ({str(error) or type(error).__name__})") from None
        if not known_format:
            raise ValueError(f"{path}: a state of the format {facts['format']}, this version reads {FORMAT}")
        shape = (model.config.num_slots - 1, model.config.hidden_size)
        if state_BSE.dim() != 3 or tuple(state_BSE.shape[1:]) != shape or hash_B.shape != state_BSE.shape[:1]:
            raise ValueError(
                f"{path}: a state of shape {tuple(state_BSE.shape)}; this model's are (lanes, {shape[0]}, {shape[1]})"
            )
        if made_by != fingerprint(model):
            raise ValueError(f"{path}: the state of another model, or of this one in another precision; read it anew")
        cache = cls()
        cache.layer.append([Moment(state_BSE.to(model.device), hash_B.to(model.device))], seen)
        cache.layer.begins_here = False
        if input_ids is not None and not (input_ids.shape[1] == seen and cache.knows(input_ids)):
            raise ValueError(
                f"{path}: the state after {seen} other tokens than these {input_ids.shape[1]}; read them anew"
            )
        return cache


def _described(tensor: torch.Tensor) -> str:
    return f"tensor {tuple(tensor.shape)} of {tensor.dtype}"


def _hashes(
    before_B: torch.Tensor | None, ids_TB: torch.Tensor, mask_TB: torch.Tensor | None, last: int
) -> list[torch.Tensor]:
    """The hash (B,) of each lane's tokens after each of the `last` columns; nothing waits for the device.

    h = (token + 3) + (token before it + 3) * BASE + ... modulo 2**64. A token that was not read changes nothing.
    """
    steps, lanes = ids_TB.shape
    hash_B = torch.zeros(lanes, dtype=torch.int64, device=ids_TB.device) if before_B is None else before_B
    hash_B = hash_B.to(ids_TB.device)
    tail = max(0, steps - last)
    # All columns before the kept ones in one sum: each token times BASE to the power of the tokens read after it.
    if tail:
        read_TB = torch.ones_like(ids_TB) if mask_TB is None else mask_TB.to(torch.int64)
        read_TB = read_TB[:tail]
        after_TB = read_TB.flip(0).cumsum(0).flip(0)
        powers = torch.tensor(_powers(tail + 1), dtype=torch.int64, device=ids_TB.device)
        terms_TB = (ids_TB[:tail] + 3) * powers[after_TB - read_TB] * read_TB
        hash_B = hash_B * powers[after_TB[0]] + terms_TB.sum(0)
    hashes = []
    for column in range(tail, steps):
        new_B = hash_B * _BASE + ids_TB[column] + 3
        hash_B = new_B if mask_TB is None else torch.where(mask_TB[column], new_B, hash_B)
        hashes.append(hash_B)
    return hashes


def _powers(count: int) -> list[int]:
    """BASE ** 0, BASE ** 1, ... as signed 64-bit numbers."""
    powers, power = [], 1
    for _ in range(count):
        powers.append(power - (1 << 64) if power >= 1 << 63 else power)
        power = power * _BASE % (1 << 64)
    return powers


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the model's shape and of every weight as it is held."""
    digest = hashlib.sha256(f"{model.config.num_slots}/{model.config.rebias}".encode())
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype}/".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()[:32]
