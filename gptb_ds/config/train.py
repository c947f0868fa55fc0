"""The group `train`: how long, in which precision, and how a window is taken."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gptb_ds.config.group import AUTO_RECOMPUTE, Group, Switch, auto_as


class TrainConfig(Group):
    updates: int = Field(1000, ge=1, description="optimizer steps of the whole run")
    tokens: int | None = Field(None, ge=1, description="instead of updates: tokens of the whole run (whole windows)")
    updates_per_window: list[str] = Field(
        ["1"],
        description="batch warm-up: N:TOKENS (or N:SHARE%) = N updates a window until so many tokens (so much of"
        " train.tokens) were trained, ..., the last without; auto:N = from N down as the measured noise allows",
    )
    measure_noise: bool = Field(
        False, description="estimate the gradient noise scale: the batch that is worth its size"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="of weights and activations in a step (auto: bf16 on GPUs, on CPUs the faster of fp32 and bf16;"
        " decided once and kept when the run resumes)",
    )
    lane_groups: int = Field(1, ge=1, description="gradient accumulation: a rank's lanes in so many groups")
    recompute_every: Annotated[int, auto_as(AUTO_RECOMPUTE, 0)] = Field(
        0,
        description="keep states every c steps and recompute inside (0 = off; auto: off where the window fits into"
        " memory, else the largest c that does)",
    )
    recompute_cheap: bool = Field(
        False,
        description="keep products and attention of every step, and compute norms and activation functions again in the"
        " backward pass: about two thirds of the memory, a sixth more time on a CPU",
    )
    graph: Switch = Field(
        "auto",
        description="a window's forward and backward pass as CUDA graphs (auto: where it can be, at ZeRO stages 0 to 2"
        " without dropout)",
    )
    compile: Switch = Field(
        "auto",
        description="compile the step with torch.compile (auto: on CPUs, in runs estimated at twenty minutes or more,"
        " without recompute_cheap)",
    )
    seed: int = Field(0, ge=0, description="initialisation and dropout")
    max_bad_updates: int = Field(10, ge=1, description="stop after so many non-finite updates in a row")

    @model_validator(mode="before")
    @classmethod
    def _one_phase_is_a_list(cls, values: object) -> object:
        if isinstance(values, dict) and "updates_per_window" in values:
            phases = values["updates_per_window"]
            phases = phases if isinstance(phases, list) else [phases]
            values = dict(values) | {"updates_per_window": [str(phase) for phase in phases]}
        return values

    @model_validator(mode="after")
    def _phases_fall(self) -> TrainConfig:
        errors = []
        numbers = [number for number, _ in self.batch_phases()]
        ends = [until for _, until in self.batch_phases() if until is not None]
        if numbers != sorted(numbers, reverse=True) or ends != sorted(set(ends)):
            errors.append(
                f"train.updates_per_window {' '.join(self.updates_per_window)}: updates a window must fall, at growing"
                " numbers of tokens"
            )
        for number in numbers:
            if number % self.lane_groups and self.lane_groups % number:
                errors.append(
                    f"train.updates_per_window {number} is no divisor and no multiple of train.lane_groups"
                    f" {self.lane_groups}; choose one"
                )
        if self.starts_adaptive and not self.measure_noise:
            errors.append("train.updates_per_window auto follows the measured noise; set train.measure_noise true")
        if self.starts_adaptive and self.tokens is None:
            errors.append(
                "train.updates_per_window auto: how many updates there will be is not known; give train.tokens"
            )
        if self.measure_noise and self.precision == "fp16":
            errors.append(
                "train.measure_noise with train.precision fp16: gradients carry a loss scale; choose bf16 or fp32"
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def starts_adaptive(self) -> bool:
        """Whether the updates of a window follow the measured noise."""
        return self.updates_per_window[0].startswith("auto:")

    def batch_phases(self) -> tuple[tuple[int, int | None], ...]:
        """(updates a window, until so many tokens) of each phase, the last one to the end. Raises ValueError."""
        texts = self.updates_per_window
        phases: list[tuple[int, int | None]] = []
        for position, text in enumerate(texts):
            number, _, until = text.removeprefix("auto:" if len(texts) == 1 else "").partition(":")
            last, share = position == len(texts) - 1, until.endswith("%")
            until = until.removesuffix("%")
            if not (_is_positive(number) and (until == "" if last else _is_positive(until))):
                raise ValueError(
                    f"train.updates_per_window {text!r}: must be {'N' if last else 'N:TOKENS or N:SHARE%'}, whole"
                    " numbers above 0" + (" (only the last phase has no end)" if last != (until == "") else "")
                )
            if share and self.tokens is None:
                raise ValueError(f"train.updates_per_window {text!r}: a share of the run needs train.tokens; give it")
            tokens = int(until or 0) * (self.tokens or 0) // 100 if share else int(until or 0)
            phases.append((int(number), None if last else tokens))
        return tuple(phases)

    @property
    def most_groups(self) -> int:
        """The largest number of lane groups that a window is ever taken in."""
        return max(self.lane_groups, *(number for number, _ in self.batch_phases()))


def _is_positive(text: str) -> bool:
    return text.isdecimal() and int(text) > 0
