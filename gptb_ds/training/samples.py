"""Samples while training: a text from the model as it is, for which the host waits once.

Axes: K steps, B lanes, E embedding, V vocabulary.
"""

from __future__ import annotations

import torch

from gptb_ds.model import AnyGPTB


@torch.no_grad()
def sample_document(model: AnyGPTB, eot_id: int, tokens: int, seed: int) -> list[int]:
    """The document that begins with the end of text and is drawn token by token, without its end; at most `tokens`.

    The tokens that `generate` draws from the same seed, but it asks after each one whether the text has ended, and
    torch.multinomial whether its probabilities are any (2.13, aten/src/ATen/native/Distributions.cpp): on a GPU that is
    three waits a token, in which training stands still. Here all tokens stay on the device until the last one is drawn.
    """
    device = model.device
    token_KB = torch.full((1, 1), eot_id, device=device)
    reset_KB = torch.ones((1, 1), dtype=torch.bool, device=device)
    state, drawn = model.empty_state(1), []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # training's draws go on as if nothing were
        torch.manual_seed(seed)
        for _ in range(tokens):
            hidden_KBE, state = model.unroll(token_KB, state, reset_KB)
            shares_BV = model.logits_of(hidden_KBE[-1]).float().softmax(-1)
            # A race, as inside torch.multinomial: token V comes first with probability `shares_BV`.
            token_KB = (shares_BV / torch.empty_like(shares_BV).exponential_()).argmax(-1)[None]
            reset_KB = torch.zeros_like(reset_KB)
            drawn.append(token_KB[0])
    found: list[int] = torch.cat(drawn).tolist()
    return found[: found.index(eot_id)] if eot_id in found else found
