"""The group `model`: which model it is, its sizes, and what it begins with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gptb_ds.config.group import Group
from gptb_ds.config.numbers import divisors


class ModelConfig(Group):
    kind: Literal["gptb", "gpt2", "lstm"] = Field(
        "gptb", description="gpt2 and lstm: models to compare with, of the same n_layer and n_embd"
    )
    backbone: str = Field(
        "gpt2",
        description="whose blocks they are: gpt2, llama, qwen3, gpt_neox, gemma, ... (a decoder of transformers), or a"
        " folder or hub name, whose config.json then says the sizes",
    )
    num_slots: int = Field(20, ge=2, description="S: positions the blocks run over (S-1 state vectors and one token)")
    n_layer: int = Field(12, ge=1, description="blocks")
    n_head: int = Field(12, ge=1, description="attention heads a block")
    n_kv_head: int | None = Field(None, ge=1, description="heads of keys and values (default: as many as n_head)")
    n_inner: int | None = Field(
        None, ge=1, description="width inside a block's MLP (default: as the backbone's family has it, 4 E in GPT-2)"
    )
    n_embd: int = Field(768, ge=1, description="E: width of a hidden vector")
    rebias: bool = Field(True, description="attention between slots is bidirectional; off, the model is memoryless")
    recent_tokens: int = Field(
        0, ge=0, description="C: of the S-1 carried vectors the last C are the embeddings of the last C tokens"
    )
    carry: Literal["outputs", "shift", "nothing"] = Field(
        "outputs",
        description="the state is the outputs of slots 0..S-2 (the original), or shifted: of 1..S-1; nothing: the twin"
        " without a state, to measure its worth",
    )
    context: int | None = Field(
        None, ge=1, description="gpt2: tokens that a prediction sees at most (default: data.window)"
    )
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of the weights that are drawn")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of embeddings, attention and residuals")
    init_from: str | None = Field(
        None, description="folder or hub name of a trained decoder whose weights start the blocks"
    )

    @model_validator(mode="after")
    def _shape_holds_up(self) -> ModelConfig:
        errors = []
        if self.n_embd % self.n_head:
            errors.append(
                f"model.n_embd {self.n_embd} is not divisible by model.n_head {self.n_head}; choose a multiple"
            )
        if self.recent_tokens > self.num_slots - 2:
            errors.append(
                f"model.recent_tokens {self.recent_tokens} leaves no slot for the state; with model.num_slots"
                f" {self.num_slots} choose at most {self.num_slots - 2}"
            )
        if self.n_kv_head is not None and (self.backbone == "gpt2" or self.n_head % self.n_kv_head):
            remedy = "leave it out" if self.backbone == "gpt2" else f"choose one of {divisors(self.n_head)}"
            errors.append(
                f"model.n_kv_head {self.n_kv_head} does not fit model.backbone {self.backbone} with model.n_head"
                f" {self.n_head}; {remedy}"
            )
        if self.context is not None and self.kind != "gpt2":
            errors.append(f"model.context {self.context} is for model.kind gpt2, not {self.kind}; leave it out")
        if errors:
            raise ValueError("\n".join(errors))
        return self
