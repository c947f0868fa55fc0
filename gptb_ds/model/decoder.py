"""GPTB over any decoder of transformers that takes embeddings and a mask and returns its last hidden states.

Axes: B lanes, S slots, E embedding, V vocabulary.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel

from .attention import NAME as SLOT_ATTENTION
from .decoder_configuration import GPTBDecoderConfig
from .modeling import GPTBLMHeadModel, RecurrentLM
from .recurrence import SlotRecurrence
from .step import Shared


class GPTBDecoderPreTrainedModel(PreTrainedModel):
    """What both models share: the configuration's class and the choice of attention."""

    config: GPTBDecoderConfig
    config_class = GPTBDecoderConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # The slots' mask is a plain tensor, which these kernels do not take: they would fall back to causal attention.
    _supports_flash_attn = False
    _supports_flex_attn = False
    # The number of tokens is not a shape of anything: `compile_step` is what compiles well.
    _can_compile_fullgraph = False

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention is None:
            requested_attention = _attention_for(self.config.backbone)
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class GPTBDecoderModel(SlotRecurrence, GPTBDecoderPreTrainedModel):
    """A decoder of transformers run over S-1 state vectors and one token; see `SlotRecurrence.forward` for the call.

    `backbone` is the decoder, with its own parameter names; `initial_embeds` (S-1, E) is the learned initial state.
    """

    def __init__(self, config: GPTBDecoderConfig) -> None:
        """Copies `config`. Raises ValueError for one that does not hold up."""
        config = config.own_copy()
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone, attn_implementation=config._attn_implementation)
        self.takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters
        self.input_factor = _input_factor(self.backbone)
        self._draws = any(rate > 0 for rate in _dropout_rates(self.backbone))
        self.post_init()

    @property
    def has_dropout(self) -> bool:
        """Whether a forward pass in training draws random numbers."""
        return self._draws

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.backbone.get_input_embeddings()
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def slot_context(self, like_E: torch.Tensor) -> Shared:
        slots = self.config.num_slots
        order = torch.arange(slots, device=like_E.device)
        if self.config.preserve_decoder:
            # The tokens have the positions that they had in the decoder, the state those behind them.
            order = order.roll(slots - 1 - self.recent_tokens)
        mask_SS = self.slot_mask(like_E)
        if mask_SS is None:
            # A mask that hides nothing, and not None: without one, transformers' decoders make a causal one.
            mask_SS = like_E.new_zeros((slots, slots))
        # With four axes it goes to the attention as it is (masking_utils._preprocess_mask_arguments, transformers 5).
        return order[None], mask_SS[None, None]

    def run_slots(self, x_BSE: torch.Tensor, context: Shared, layers: list[torch.Tensor] | None = None) -> torch.Tensor:
        positions_1S, mask_11SS = context
        arguments = {"position_ids": positions_1S} if self.takes_positions else {}
        if self.input_factor != 1:
            # The token's embedding was scaled in `embed`; a state is an output, and enters as it is.
            x_BSE = x_BSE / self.input_factor
        output = self.backbone(
            inputs_embeds=x_BSE,
            attention_mask=mask_11SS,
            use_cache=False,
            output_hidden_states=layers is not None,
            **arguments,
        )
        if layers is not None:
            layers += output.hidden_states
        y_BSE: torch.Tensor = output.last_hidden_state
        return y_BSE

    def embed(self, input_ids_KB: torch.Tensor) -> torch.Tensor:
        embedded_KBE = super().embed(input_ids_KB)
        return embedded_KBE if self.input_factor == 1 else embedded_KBE * self.input_factor


class GPTBDecoderLMHeadModel(RecurrentLM, GPTBDecoderPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """`GPTBDecoderModel` with a linear head, tied to the token embedding unless `tie_word_embeddings=False`."""

    transformer: GPTBDecoderModel

    def __init__(self, config: GPTBDecoderConfig) -> None:
        """Copies `config`. Raises ValueError for one that does not hold up."""
        transformer = GPTBDecoderModel(config)
        super().__init__(transformer.config)
        self.transformer = transformer
        embedding = transformer.get_input_embeddings()
        (name,) = [name for name, module in transformer.named_modules() if module is embedding]
        self._tied_weights_keys = {"lm_head.weight": f"transformer.{name}.weight"}
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=self.config.head_bias)
        self.post_init()

    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits (..., V) of last-slot outputs (..., E), scaled and capped as the decoder's head does it."""
        factor = self.config.logit_factor
        return super().logits_of(hidden if factor == 1 else hidden * factor)


# The language models over a `SlotRecurrence`, whatever the backbone.
AnyGPTB: TypeAlias = GPTBLMHeadModel | GPTBDecoderLMHeadModel


def decoder_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """transformers' model without a head for a configuration; None when there is none."""
    try:
        found = MODEL_MAPPING[type(config)]
    except KeyError:
        return None
    return found[0] if isinstance(found, tuple) else found


def _attention_for(config: PreTrainedConfig) -> str:
    """Ours where a decoder goes through transformers' attention interface, and can do with PyTorch's kernel on a GPU.

    The others (Gemma 2 caps its scores, GPT-OSS has sinks) have what they need in their own "eager" path only.
    """
    decoder = decoder_class(config)
    has_interface = decoder is not None and hasattr(sys.modules[decoder.__module__], "eager_attention_forward")
    return SLOT_ATTENTION if has_interface and decoder is not None and decoder._supports_sdpa else "eager"


def _dropout_rates(backbone: nn.Module) -> Iterator[float]:
    """Of its layers and attention; the configuration also holds those of heads it does not have (GPT-NeoX's 0.1)."""
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            yield module.p
        yield from (rate for key, rate in vars(module).items() if "drop" in key and isinstance(rate, float))


def _input_factor(backbone: PreTrainedModel) -> float:
    """What the decoder's forward multiplies given embeddings by, before its first block.

    Gemma's embedding does it itself since transformers 5.4 (GemmaTextScaledWordEmbedding in modeling_gemma.py); before
    that, the forward did, whatever it was given.
    """
    config = backbone.config
    if config.model_type in ("gemma", "gemma2") and not hasattr(backbone.get_input_embeddings(), "embed_scale"):
        return float(config.hidden_size**0.5)
    return float(getattr(config, "embedding_multiplier", None) or 1.0)
