"""GPTB as a language model of transformers, and its GPT-2 backbone.

Axes: B lanes, T tokens of this call, S slots, E embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, GPT2Config, GPT2Model
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2PreTrainedModel

from .attention import NAME as SLOT_ATTENTION
from .cache import GPTBCache
from .compiled_step import Backend
from .configuration import GPTBConfig, as_gptb_config
from .gradient_sums import GradientSums
from .input_checks import check_generate, check_labels, check_logits_to_keep
from .loss import causal_loss
from .outputs import GatheredOutput, GPTBOutput
from .recurrence import SlotRecurrence, wants_dict
from .step import Shared
from .window_model import WindowModel


class GPTBPreTrainedModel(GPT2PreTrainedModel):
    """What both models of the GPT-2 backbone share: the configuration's class and the choice of attention."""

    config_class = GPTBConfig
    # What transformers' tests read: layers' outputs can be asked for, attention weights can't.
    _can_record_outputs = {"hidden_states": GPT2Block}  # noqa: RUF012
    # A window's causal mask is a plain tensor, which these kernels do not take.
    _supports_flash_attn = False
    _supports_flex_attn = False
    # The number of tokens is not a shape of anything: `compile_step` is what compiles well.
    _can_compile_fullgraph = False

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
            requested_attention = "eager" if self.config.reorder_and_upcast_attn else SLOT_ATTENTION
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class GPTBModel(SlotRecurrence, GPTBPreTrainedModel, GPT2Model):
    """GPT-2's blocks run over S-1 state vectors and one token; see `SlotRecurrence.forward` for the call.

    Parameter names are GPT-2's plus `initial_embeds` (S-1, E), the learned initial state, drawn from N(0, 1).
    """

    weights_are_seen = True

    def __init__(self, config: GPT2Config) -> None:
        """Copies `config`, a `GPTBConfig` or a plain `GPT2Config`. Raises ValueError for one that does not hold up."""
        config = as_gptb_config(config)
        context = config.n_positions
        # GPT2Model makes a row of `wpe` for each of n_positions; here positions are slots, and tokens have no limit.
        config.n_positions = config.position_rows
        super().__init__(config)
        config.n_positions = context
        for block in cast(list[GPT2Block], self.h):
            # SDPA without a mask falls back to this flag, which GPT-2's attention sets.
            block.attn.is_causal = not self.config.rebias
            if self.config.activation_function == "gelu_new":
                # The same function of the same number, in one kernel instead of eight.
                block.mlp.act = ACT2FN["gelu_pytorch_tanh"]

    def slot_context(self, like_E: torch.Tensor) -> Shared:
        slots = self.config.num_slots
        order = torch.arange(slots, device=like_E.device)
        if self.config.preserve_decoder:
            # The tokens have the positions that they had in the decoder, the state those behind them.
            order = order.roll(slots - 1 - self.recent_tokens)
        return self.wpe(order), self.slot_mask(like_E)

    def run_slots(self, x_BSE: torch.Tensor, context: Shared, layers: list[torch.Tensor] | None = None) -> torch.Tensor:
        # The blocks are called directly: GPT2Model.forward would build masks and positions anew for every token.
        positions_SE, mask_SS = context
        assert isinstance(positions_SE, torch.Tensor)
        x_BSE = self.drop(x_BSE + positions_SE)
        for block in self.h:
            if layers is not None:
                layers.append(x_BSE)
            x_BSE = block(x_BSE, None, mask_SS)
        y_BSE = self.ln_f(x_BSE)
        if layers is not None:
            layers.append(y_BSE)
        return y_BSE


class RecurrentLM(WindowModel):
    """What a language model over a `SlotRecurrence` does, whatever the backbone: forward, state, generate.

    It stands before `GenerationMixin` and a `PreTrainedModel`, which hold `transformer` and `lm_head`.
    """

    config: Any
    transformer: SlotRecurrence
    lm_head: nn.Linear
    accepts_loss_kwargs = True  # for transformers' Trainer: forward takes num_items_in_batch

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def empty_state(self, lanes: int) -> torch.Tensor:
        """A state (lanes, S-1, E) for lanes that begin with a reset; see `SlotRecurrence.empty_state`."""
        return self.transformer.empty_state(lanes)

    def unroll(
        self,
        input_ids_KB: torch.Tensor,
        state: torch.Tensor | None,
        reset_KB: torch.Tensor | None = None,
        recompute_every: int = 0,
        sums: GradientSums | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last slot's outputs (K, B, E) and the new state; see `SlotRecurrence.unroll`."""
        return self.transformer.unroll(input_ids_KB, state, reset_KB, recompute_every, sums)

    @property
    def recomputes_apart(self) -> bool:
        """As `SlotRecurrence.recomputes_apart`."""
        return self.transformer.recomputes_apart

    def compile_step(self, backend: Backend = "inductor") -> None:
        """Compiles one step of the recurrence with this backend of `torch.compile`."""
        self.transformer.compile_step(backend)

    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits (..., V) of last-slot outputs (..., E)."""
        logits = self.lm_head(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_hidden_states: torch.Tensor | None = None,
        reset: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        recompute_every: int = 0,
        *,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: GPTBCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **others: Any,
    ) -> GPTBOutput | tuple[object, ...]:
        """A causal language model's forward; unpacks as the original's loop does: `logits, past_hidden_states, loss`.

        Arguments as in `SlotRecurrence.forward`. `labels` (B, T) follow transformers' convention: they are `input_ids`
        and are shifted inside, so that position t is scored on `labels[:, t + 1]`; -100 is not counted. The loss is the
        mean over counted labels, in nats (0 when there is none), or their sum over `num_items_in_batch`.
        `shift_labels` (B, T), in place of labels, stand where they are predicted already. `logits_to_keep` = n > 0
        computes the logits of the last n tokens only; a tensor names the tokens.

        Raises ValueError as `SlotRecurrence.forward` does, and for labels of another shape or outside the vocabulary.
        """
        # Not a named argument: transformers' Trainer takes every name with "label" in it for one that data must have
        # (utils/generic.py, find_labels), and without it leaves the loss out of an evaluation.
        shift_labels = others.pop("shift_labels", None)
        targets = shift_labels if shift_labels is not None else labels
        check_labels(targets, input_ids if input_ids is not None else inputs_embeds)
        keep_last = check_logits_to_keep(logits_to_keep)
        hidden = self.transformer(
            input_ids,
            past_hidden_states,
            reset,
            recompute_every,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            keep_last=0 if targets is not None else keep_last,
            **others,
        )
        hidden_BTE = hidden.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor) and targets is None:
            hidden_BTE = hidden_BTE[:, logits_to_keep]
        logits_BTV = self.logits_of(hidden_BTE)
        is_replica = getattr(self, "_is_replica", False)  # set by torch.nn.parallel.replicate
        output = (GatheredOutput if is_replica else GPTBOutput)(
            loss=causal_loss(logits_BTV, targets, shift_labels is None, num_items_in_batch),
            logits=logits_BTV,
            past_key_values=None if is_replica else hidden.past_key_values,  # the lanes of one replica
            past_hidden_states=hidden.past_hidden_states,
            hidden_states=hidden.hidden_states,
        )
        return output if wants_dict(return_dict, self.config) else output.to_tuple()

    # transformers' generate

    def generate(self, inputs: torch.Tensor | None = None, *args: object, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`, which may also continue from a state.

        `past_key_values` is a `GPTBCache` that has read something; the tokens are then either the whole sequence, which
        begins with what the cache has read, or only what is new: the cache knows its tokens and tells them apart. (An
        `attention_mask` longer than the tokens says that they are new, as everywhere in transformers.)
        `past_hidden_states` (B, S-1, E) is a bare state to start from.
        """
        cache = kwargs.get("past_key_values")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        check_generate(None if "inputs_embeds" in kwargs else ids, kwargs.get("attention_mask"))
        if isinstance(cache, GPTBCache) and cache.layer.seen and ids is not None and ids.dim() == 2:
            kwargs["attention_mask"] = _mask_after(cache, ids, kwargs.get("attention_mask"))
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: object, **kwargs: object
    ) -> None:
        # GenerationMixin would make a DynamicCache of keys and values here (generation/utils.py, transformers 5).
        state_BSE, cache = model_kwargs.get("past_hidden_states"), model_kwargs.get("past_key_values")
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "offloaded"):
            raise ValueError(
                f"cache_implementation '{kind}': the state has one size anyway; leave it out, or choose 'offloaded'"
            )
        if cache is not None:
            if state_BSE is not None:
                raise ValueError("give the state as past_key_values or as past_hidden_states, not both")
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs.pop("past_hidden_states", None)
            model_kwargs["past_key_values"] = GPTBCache(state_BSE, offloading=kind == "offloaded")
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: object,
        # GenerationMixin looks for this name here before it lets embeddings in.
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, object]:
        # GenerationMixin.generate hands these on to the model (generation/utils.py, transformers 5), whose own models
        # take whatever comes.
        kwargs = {name: value for name, value in kwargs.items() if name not in ("tokenizer", "assistant_tokenizer")}
        cache = kwargs.get("past_key_values")
        if (
            isinstance(cache, GPTBCache)
            and cache.given_whole
            and kwargs.get("is_first_iteration")
            and kwargs.get("next_sequence_length", 0) is None
        ):
            # GenerationMixin._assisted_decoding leaves out the slicing that its _prefill does.
            kwargs["next_sequence_length"] = input_ids.shape[1] - cache.layer.seen
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )


class GPTBLMHeadModel(RecurrentLM, GPTBPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """`GPTBModel` with GPT-2's language-model head, tied to the token embedding unless `tie_word_embeddings=False`."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: GPT2Config) -> None:
        """Copies `config`, a `GPTBConfig` or a plain `GPT2Config`. Raises ValueError for one that does not hold up."""
        transformer = GPTBModel(config)
        super().__init__(transformer.config)
        self.transformer = transformer
        self.lm_head = nn.Linear(self.config.n_embd, self.config.vocab_size, bias=False)
        self.post_init()


def _mask_after(cache: GPTBCache, ids_BT: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask by which `GenerationMixin._prefill` knows whether `ids_BT` are the whole sequence or only what is new.

    Raises ValueError when the cache has already read all of it.
    """
    lanes, steps = ids_BT.shape
    cache.given_whole = (mask is None or mask.shape[1] == steps) and cache.knows(ids_BT, mask)
    if cache.given_whole and steps == cache.layer.seen:
        raise ValueError(f"past_key_values has read all {steps} tokens already: give at least one new one")
    if cache.given_whole or (mask is not None and mask.shape[1] > steps):
        return mask
    new = torch.ones_like(ids_BT) if mask is None else mask
    return torch.cat((new.new_ones((lanes, cache.layer.seen)), new), dim=1)
