"""The group `optim`: the optimizer, its rate, and how the rate goes over a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gptb_ds.config.group import Group


class OptimConfig(Group):
    name: Literal["adamw", "muon"] = Field("adamw", description="muon: for the blocks' matrices, AdamW for the rest")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    lr_scaling: Literal["none", "sqrt", "linear"] = Field(
        "none", description="how the rate grows with an update's tokens over optim.lr_tokens"
    )
    lr_tokens: int | None = Field(None, ge=1, description="tokens an update that optim.lr was found with")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's decay of the mean gradient, an update")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's decay of the mean squared gradient, an update")
    beta1_half_life: float | None = Field(None, gt=0, description="instead of beta1: its half-life in tokens")
    beta2_half_life: float | None = Field(None, gt=0, description="instead of beta2: its half-life in tokens")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's Nesterov momentum, an update")
    warmup_updates: int = Field(100, ge=0, description="updates of linear warm-up")
    warmup_tokens: int | None = Field(None, ge=0, description="instead of warmup_updates: in tokens")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="after the warm-up (wsd: stable, then a decay at the end)"
    )
    decay_updates: int | None = Field(None, ge=1, description="wsd: updates of the decay (default: a fifth of the run)")
    decay_tokens: int | None = Field(None, ge=1, description="wsd: tokens of the decay")
    decay_from: int | None = Field(None, ge=0, description="wsd: the update, of a checkpoint say, that decay starts at")
    weight_decay: float = Field(0.1, ge=0, description="decay of matrices; vectors and the state are not decayed")
    clip: float = Field(1.0, ge=0, description="global gradient norm; 0 = no clipping")

    @model_validator(mode="after")
    def _one_of_each(self) -> OptimConfig:
        errors = []
        decays = [key for key in ("decay_updates", "decay_tokens", "decay_from") if getattr(self, key) is not None]
        if decays and self.schedule != "wsd":
            errors.append(f"optim.{decays[0]} needs optim.schedule wsd, not {self.schedule}; set it, or leave this out")
        if len(decays) > 1:
            errors.append(f"optim.{' and optim.'.join(decays)} each say when the decay starts; give one of them")
        if (self.lr_scaling == "none") != (self.lr_tokens is None):
            errors.append(
                f"optim.lr_scaling {self.lr_scaling} with optim.lr_tokens {self.lr_tokens}: give both, the rule and"
                " the tokens an update that optim.lr was found with, or neither"
            )
        if self.beta1_half_life is not None and self.beta2_half_life is None:
            errors.append("optim.beta1_half_life needs optim.beta2_half_life: give both, or the second alone")
        if errors:
            raise ValueError("\n".join(errors))
        return self
