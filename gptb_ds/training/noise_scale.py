"""The gradient noise scale: the size of an update at which larger ones begin to be worth less a token.

McCandlish et al. 2018 (1812.06162), appendix A.1: the squared norm of a gradient from B tokens is |G|^2 + S / B, with
G the true gradient and S the variance of a single token's. Measured at two sizes, both follow; S / |G|^2 is the noise
scale in tokens. Below it, twice the tokens an update save nearly half the updates; above, hardly any.

The small size is the part of an update that one rank takes in one backward pass, the large one is the update. Tokens of
one lane follow one another and are not independent, as the theory has them: the scale holds for windows of this length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

# The estimates are ratios of noisy numbers: each of the two is averaged over about so many updates before.
AVERAGED_UPDATES = 50


@dataclass(frozen=True)
class NoiseScale:
    """Running averages of |G|^2 (`signal`) and S (`noise`) over `updates` measured updates."""

    signal: float = 0.0
    noise: float = 0.0
    updates: int = 0

    def after(self, small: tuple[float, float], large: tuple[float, float]) -> NoiseScale:
        """With one more update's (tokens, mean squared norm of the gradient) at the small and the large size."""
        (few, small_norm), (many, large_norm) = small, large
        assert few < many
        signal = (many * large_norm - few * small_norm) / (many - few)
        noise = (small_norm - large_norm) / (1 / few - 1 / many)
        share = max(1 / AVERAGED_UPDATES, 1 / (self.updates + 1))
        return replace(
            self,
            signal=self.signal + share * (signal - self.signal),
            noise=self.noise + share * (noise - self.noise),
            updates=self.updates + 1,
        )

    @property
    def tokens(self) -> float | None:
        """The noise scale in tokens; None before there is one (no update, or an average that is not positive)."""
        if self.updates == 0 or self.signal <= 0 or self.noise <= 0:
            return None
        return self.noise / self.signal


def merged(updates_per_window: int, window_tokens: int, noise: NoiseScale) -> int:
    """Updates of the next window when they follow the noise: half as many once an update of twice the size is worth it.

    That is when its tokens are at most the noise scale, measured over enough updates. Never more than before: the noise
    scale grows over a run, and a fall is most often chance.
    """
    if updates_per_window % 2 or noise.updates < AVERAGED_UPDATES or noise.tokens is None:
        return updates_per_window
    doubled = window_tokens * 2 // updates_per_window
    return updates_per_window // 2 if doubled <= noise.tokens else updates_per_window


class GradientNorms:
    """Squared norms of the gradients of single backward passes on this rank, as they arrive at the parameters.

    DeepSpeed reduces and cuts gradients as soon as they are there; what a rank's own backward pass gave can only be
    seen by a hook on the parameter, before that. It works at every ZeRO stage.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        for parameter in parameters:
            parameter.register_hook(self._add)  # type: ignore[no-untyped-call]

    def _add(self, gradient: torch.Tensor) -> None:
        self._sum += gradient.detach().float().square().sum()

    def take(self) -> torch.Tensor:
        """The sum over the backward passes since the last call, a float64 scalar; it starts anew."""
        total, self._sum = self._sum, torch.zeros_like(self._sum)
        return total
