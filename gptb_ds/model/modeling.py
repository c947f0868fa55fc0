"""The GPT-2 backbone of the recurrence and the language model on top of it.

Axes: B lanes, T steps of this call, S slots, E embedding, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2Model
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2PreTrainedModel

from . import attention
from .configuration import GPTBConfig, as_gptb_config
from .recurrence import SlotRecurrence

# Keys of the model that a run's configuration does not have: GPT-2's defaults, or what a warm start's model has.
INHERITED = (
    *("n_positions", "n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
)


def inherited(config: GPT2Config) -> dict[str, Any]:
    """The values of `INHERITED` in a model's configuration: with the run's own they describe the model."""
    return {key: getattr(config, key) for key in INHERITED}


class GPTBOutput(NamedTuple):
    """`logits` (B, T, V), the new state (B, S-1, E), and the loss (a scalar) when labels were given."""

    logits: torch.Tensor
    past_hidden_states: torch.Tensor
    loss: torch.Tensor | None = None


class GPTBPreTrainedModel(GPT2PreTrainedModel):
    """What both models share: the configuration's class and the choice of attention."""

    config_class = GPTBConfig
    # A window's causal mask is a plain tensor, which these kernels do not take.
    _supports_flash_attn = False
    _supports_flex_attn = False

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # PreTrainedModel._initialize_weights (modeling_utils.py, transformers 5) treats classes from outside
        # transformers as code that may draw a weight again after it was loaded, and then never calls `_init_weights`
        # for a module that has no parameter of its own. GPT-2 scales its residual projections there (GPT2Block has
        # none of its own), so every `c_proj` would start sqrt(2 * n_layer) times too large. Our `_init_weights` draws
        # only through torch.nn.init, which transformers guards, so it may be treated as transformers' own.
        super()._initialize_weights(module, is_custom_code=False)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention is None:
            # GPT-2's upcasting variant exists only in transformers' own "eager" path.
            requested_attention = "eager" if self.config.reorder_and_upcast_attn else attention.NAME
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class GPTBModel(SlotRecurrence, GPTBPreTrainedModel, GPT2Model):
    """GPT-2's blocks run over S-1 state vectors and one token; see `SlotRecurrence.forward` for the call.

    Parameter names are GPT-2's plus `initial_embeds` (S-1, E), the learned initial state, drawn from N(0, 1).
    """

    def __init__(self, config: GPT2Config) -> None:
        """Copies `config`, a `GPTBConfig` or a plain `GPT2Config`. Raises ValueError for one that does not hold up."""
        super().__init__(as_gptb_config(config))
        for block in cast(list[GPT2Block], self.h):
            # SDPA without a mask falls back to this flag, which GPT-2's attention sets.
            block.attn.is_causal = not self.config.rebias
            if self.config.activation_function == "gelu_new":
                # The same function of the same number, in one kernel instead of eight.
                block.mlp.act = ACT2FN["gelu_pytorch_tanh"]

    def slot_context(self, like_E: torch.Tensor) -> tuple[Any, ...]:
        slots = self.config.num_slots
        positions_SE = self.wpe(torch.arange(slots, device=like_E.device))
        if self.config.rebias:
            return positions_SE, None
        mask_SS = torch.full((slots, slots), torch.finfo(like_E.dtype).min, dtype=like_E.dtype, device=like_E.device)
        return positions_SE, mask_SS.triu(1)

    def run_slots(self, x_BSE: torch.Tensor, context: tuple[Any, ...]) -> torch.Tensor:
        # The blocks are called directly: GPT2Model.forward would build masks and positions anew for every token.
        positions_SE, mask_SS = context
        x_BSE = self.drop(x_BSE + positions_SE)
        for block in self.h:
            x_BSE = block(x_BSE, None, mask_SS)
        return self.ln_f(x_BSE)


class GPTBLMHeadModel(GPTBPreTrainedModel):
    """`GPTBModel` with GPT-2's language-model head, tied to the token embedding unless `tie_word_embeddings=False`."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: GPT2Config) -> None:
        """Copies `config`, a `GPTBConfig` or a plain `GPT2Config`. Raises ValueError for one that does not hold up."""
        transformer = GPTBModel(config)
        super().__init__(transformer.config)
        self.transformer = transformer
        self.lm_head = nn.Linear(self.config.n_embd, self.config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def empty_state(self, lanes: int) -> torch.Tensor:
        """A state (lanes, S-1, E) for lanes that begin with a reset; see `SlotRecurrence.empty_state`."""
        return self.transformer.empty_state(lanes)

    def compile_step(self, **kwargs: Any) -> None:
        """Compiles one step of the recurrence with `torch.compile(**kwargs)`; see `SlotRecurrence.compile_step`."""
        self.transformer.compile_step(**kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_hidden_states: torch.Tensor | None = None,
        reset: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        recompute_every: int = 0,
    ) -> GPTBOutput:
        """`logits, past_hidden_states, loss = model(tokens, past_hidden_states=past_hidden_states)`.

        Arguments as in `SlotRecurrence.forward`. `labels` (B, T) are the targets of the SAME positions: `labels[b, t]`
        is the token that follows `input_ids[b, t]`; nothing is shifted inside, and -100 is not counted. The loss is the
        mean over counted labels, in nats (0 when there is none).

        Raises ValueError as `SlotRecurrence.forward` does, and for labels of another shape or outside the vocabulary.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; expected {tuple(input_ids.shape)} like input_ids, one target"
                " for each token (not shifted)"
            )
        hidden_BTE, state_BSE = self.transformer(input_ids, past_hidden_states, reset, recompute_every)
        logits_BTV = self.lm_head(hidden_BTE)
        loss = None if labels is None else _mean_loss(logits_BTV, labels)
        return GPTBOutput(logits_BTV, state_BSE, loss)


def _mean_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    logits_RV = logits_BTV.flatten(0, 1)
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    try:
        total = F.cross_entropy(logits_RV, labels_BT.reshape(-1), ignore_index=-100, reduction="sum")
    except IndexError:
        raise ValueError(
            f"labels hold tokens from {int(labels_BT.min())} to {int(labels_BT.max())}, but the vocabulary is 0 to"
            f" {logits_BTV.shape[-1] - 1} (-100 = not counted)"
        ) from None
    return total / (labels_BT != -100).sum().clamp(min=1)


def warm_start(config: GPT2Config, path: str) -> GPTBLMHeadModel:
    """A model whose blocks start from the GPT-2 (or GPTB) at `path`, a folder or a hub name, in float32, for training.

    Only `initial_embeds` is new, unless `path` has one of the same shape. What `INHERITED` names follows `path`.

    Raises ValueError when the shape of the model at `path` is not that of `config`, or when it has cross-attention.
    """
    config = as_gptb_config(config)
    source = AutoConfig.from_pretrained(path)
    if not isinstance(source, GPT2Config):
        raise ValueError(f"{path} holds a {source.model_type} model; GPTB starts from a GPT-2")
    if source.add_cross_attention:
        raise ValueError(f"the model at {path} has cross-attention, which GPTB has no use for; choose another")
    for key, value in inherited(source).items():
        setattr(config, key, value)
    pairs = [(key, getattr(config, key), getattr(source, key)) for key in ("n_layer", "n_head", "n_embd", "vocab_size")]
    wrong = [f"{key} {ours} (there: {theirs})" for key, ours, theirs in pairs if ours != theirs]
    if wrong:
        raise ValueError(f"the model at {path} has another shape: {', '.join(wrong)}; set what it has")
    return GPTBLMHeadModel.from_pretrained(path, config=config, dtype=torch.float32, use_safetensors=True).train()


AutoConfig.register(GPTBConfig.model_type, GPTBConfig)
AutoModel.register(GPTBConfig, GPTBModel)
AutoModelForCausalLM.register(GPTBConfig, GPTBLMHeadModel)
