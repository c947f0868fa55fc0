"""How the next token is chosen: temperature, the likeliest ones, beams."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GenerationConfig

# Below this, dividing by the temperature only loses digits: the likeliest token is taken.
_COLDEST = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises ValueError, a line for each number out of range.

    `temperature` 0 takes the likeliest token; `top_k`, `top_p` and `min_p` draw among the likeliest;
    `repetition_penalty` above 1 makes what was said less likely; `num_beams` above 1 searches; `seed` None =
    unpredictable.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = [
            (0 <= self.temperature < float("inf"), "temperature", "0 (the likeliest token) or more"),
            (self.top_k is None or self.top_k >= 1, "top_k", "1 or more"),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p", "above 0, at most 1"),
            (self.min_p is None or 0 <= self.min_p <= 1, "min_p", "from 0 to 1"),
            (self.repetition_penalty is None or self.repetition_penalty > 0, "repetition_penalty", "above 0"),
            (self.num_beams >= 1, "num_beams", "1 or more"),
            (self.seed is None or -(1 << 63) <= self.seed < 1 << 64, "seed", "a number of 64 bits"),
        ]
        errors = [f"{name} is {getattr(self, name)}; expected {what}" for holds, name, what in checks if not holds]
        if errors:
            raise ValueError("\n".join(errors))

    def configuration(self, max_new_tokens: int, eot_id: int | None) -> GenerationConfig:
        """transformers' settings for this choice. Padding is masked, so any token can stand for it."""
        sample = self.temperature >= _COLDEST
        numbers: dict[str, float | int | None] = {
            "repetition_penalty": self.repetition_penalty,
            "num_beams": self.num_beams,
        }
        if sample:
            # top_k 0: GenerationConfig's own default is the 50 likeliest.
            numbers |= {"temperature": self.temperature, "top_k": self.top_k or 0, "top_p": self.top_p}
            numbers |= {"min_p": self.min_p}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            eos_token_id=eot_id,
            pad_token_id=0 if eot_id is None else eot_id,
            **{name: value for name, value in numbers.items() if value is not None},
        )
