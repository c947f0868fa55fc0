"""The configuration of a GPTB over any decoder of transformers: the decoder's own, and the keys of the recurrence."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .configuration import UNLIMITED, check_slots


class GPTBDecoderConfig(PreTrainedConfig):
    """The configuration of `backbone_config`, a decoder of transformers (or a dict of it with its `model_type`).

    `num_slots`, `rebias`, `recent_tokens`, `preserve_decoder` and `carry` as in `GPTBConfig`. `head_bias`: the head has
    a bias, as some decoders' have. `max_position_embeddings` tells other programs how many tokens the model takes.
    What transformers asks of a language model's configuration (`vocab_size`, `hidden_size`, ...) is the backbone's.

    Raises ValueError for keys of the recurrence that don't hold up.
    """

    model_type = "gptb_decoder"
    keys_to_ignore_at_inference = ["past_key_values", "past_hidden_states"]  # noqa: RUF012
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 - transformers reads it from the class
    has_no_defaults_at_init = True

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    num_slots: int = 20
    rebias: bool = True
    recent_tokens: int = 0
    preserve_decoder: bool = False
    carry: str = "outputs"
    head_bias: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    max_position_embeddings: int = UNLIMITED
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        if isinstance(self.backbone_config, dict):
            values = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raises ValueError for the first thing that is wrong; the model calls it again when it is built."""
        if not isinstance(self.backbone_config, PreTrainedConfig):
            raise ValueError(f"backbone_config is {self.backbone_config!r}; it must be a decoder's configuration")
        check_slots(self)

    def own_copy(self) -> GPTBDecoderConfig:
        """A checked copy, for the model to keep."""
        own = copy.deepcopy(self)
        own.check()
        return own

    def identity(self) -> dict[str, object]:
        """What makes the backbone the one that it is, for who has to tell it from another."""
        names = (
            *("model_type", "num_key_value_heads", "head_dim", "intermediate_size", "layer_types", "sliding_window"),
            *("hidden_act", "hidden_activation", "rope_parameters", "rms_norm_eps", "layer_norm_eps", "attention_bias"),
            *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "use_parallel_residual"),
            *("logit_scale", "logits_scaling", "embedding_multiplier", "attention_multiplier", "residual_multiplier"),
        )
        found = {f"backbone.{name}": getattr(self.backbone, name, None) for name in names}
        return found | {"tie_word_embeddings": self.tie_word_embeddings}

    @property
    def backbone(self) -> Any:
        """The decoder's configuration."""
        return self.backbone_config

    @property
    def vocab_size(self) -> int:
        size: int = self.backbone.vocab_size
        return size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:  # by resize_token_embeddings
        self.backbone.vocab_size = value

    @property
    def hidden_size(self) -> int:
        width: int = self.backbone.hidden_size
        return width

    @property
    def num_hidden_layers(self) -> int:
        layers: int = self.backbone.num_hidden_layers
        return layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:  # by generate, for an assistant that leaves early
        self.backbone.num_hidden_layers = value

    @property
    def num_attention_heads(self) -> int:
        heads: int = self.backbone.num_attention_heads
        return heads

    @property
    def initializer_range(self) -> float:
        deviation: float = getattr(self.backbone, "initializer_range", 0.02)
        return deviation

    @property
    def final_logit_softcapping(self) -> float | None:
        cap: float | None = getattr(self.backbone, "final_logit_softcapping", None)
        return cap

    @property
    def logit_factor(self) -> float:
        """What the decoder's head multiplies its logits by (Cohere; Granite divides)."""
        factor: float = getattr(self.backbone, "logit_scale", None) or 1.0
        return factor / (getattr(self.backbone, "logits_scaling", None) or 1.0)
