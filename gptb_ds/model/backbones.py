"""Which decoders of transformers can be a backbone: their configurations by name, and what makes one unsuitable.

Axes: S slots, E embedding.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    GPT2Config,
    PreTrainedConfig,
)

from .configuration import GPTBConfig
from .decoder import GPTBDecoderLMHeadModel, GPTBDecoderModel, decoder_class
from .decoder_configuration import GPTBDecoderConfig

# Of each of these the tests train a small one, and start from a small one that they have trained.
TESTED = ("llama", "qwen3", "gpt_neox", "gemma", "gemma2", "gemma3_text", "mistral", "qwen2", "olmo2", "phi3")
# The names that dropout has in transformers' decoders.
_DROPOUTS = (
    *("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("residual_dropout", "embedding_dropout"),
)


class UnsuitableError(ValueError):
    """What can't be a backbone, in one line with the reason."""


def is_family(name: str) -> bool:
    """Whether transformers has models of this name."""
    return name in CONFIG_MAPPING


def read_backbone(path: str) -> PreTrainedConfig:
    """The decoder's configuration in a folder, or of a hub name. Raises ValueError for what is none."""
    if not Path(path).is_dir() and path.count("/") != 1:
        raise UnsuitableError(_no_such(path))
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers has classes of its own for what its checks refuse
        raise UnsuitableError(f"backbone {path}: no configuration of a decoder ({_one_line(error)})") from None
    found = found.backbone if isinstance(found, GPTBDecoderConfig) else found
    if not isinstance(found, GPT2Config):
        check_architecture(found, path)
    return found


def adapted_backbone(config: PreTrainedConfig, *, dropout: float, **values: object) -> PreTrainedConfig:
    """A copy with `values` and the dropout of ours; the type of weights is left to who builds the model."""
    own = copy.deepcopy(config)
    own.dtype = None
    for key in (key for key in _DROPOUTS if isinstance(getattr(own, key, None), int | float)):
        setattr(own, key, dropout)
    for key, value in values.items():
        setattr(own, key, value)
    return own


def named_backbone(name: str, sizes: dict[str, int], *, dropout: float, **values: object) -> PreTrainedConfig:
    """The configuration of a family of decoders in a size of ours; what is not given is as the family has it.

    `sizes`, by transformers' general names: `hidden_size`, `num_hidden_layers`, `num_attention_heads`, and if wanted
    `num_key_value_heads` (default: as many as heads) and `intermediate_size` (default: the family's own ratio to the
    width). `values` are further keys that every family has.

    Raises ValueError for a name that transformers does not know, or a family that can't be a backbone, or not so.
    """
    if not is_family(name):
        raise UnsuitableError(_no_such(name))
    kind = CONFIG_MAPPING[name]
    make: Callable[..., PreTrainedConfig] = kind
    try:
        usual = make()
    except Exception as error:  # transformers has classes of its own for what its checks refuse
        raise UnsuitableError(f"backbone {name}: it can't be had by its name alone ({_one_line(error)})") from None
    check_architecture(usual, name)
    given = {"num_key_value_heads": sizes["num_attention_heads"]} | sizes
    known = {field.name for field in dataclasses.fields(kind)} | kind.attribute_map.keys()
    inner = "ffn_dim" if "ffn_dim" in known else "intermediate_size"  # OPT and those that follow it
    if "intermediate_size" in sizes:
        given[inner] = given.pop("intermediate_size")
    elif isinstance(getattr(usual, inner, None), int):
        given[inner] = 8 * max(1, round(getattr(usual, inner) / usual.hidden_size * given["hidden_size"] / 8))
    missing = sorted(key for key in given if key in {*sizes, inner} and key not in known)
    if "num_attention_heads" in missing:
        raise UnsuitableError(
            f"backbone {name}: it has no attention, so that nothing would pass back from the token's slot"
        )
    if missing:
        raise UnsuitableError(f"backbone {name}: it has no {', '.join(missing)}; leave that out, or give a folder")
    if "head_dim" in known:
        given["head_dim"] = given["hidden_size"] // given["num_attention_heads"]
    dropouts = {key: dropout for key in _DROPOUTS if key in known}
    # Ids that a family has by default are those of its own tokenizer.
    tokens = {key: None for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    wanted = tokens | {key: value for key, value in given.items() if key in known} | dropouts | values
    try:
        return make(**{kind.attribute_map.get(key, key): value for key, value in wanted.items()})
    except Exception as error:  # transformers has classes of its own for what its checks refuse
        raise UnsuitableError(f"backbone {name}: {_one_line(error)}") from None


def build_decoder(config: GPTBDecoderConfig) -> GPTBDecoderLMHeadModel:
    """A model with weights that are drawn, whose decoder is known to do as a backbone (`check_backbone`).

    Raises ValueError, in one line with the reason.
    """
    name = config.backbone.model_type
    check_architecture(config.backbone, name)
    try:
        with torch.device("meta"):  # without its weights: a family's usual number of experts may not fit in memory
            drawn = AutoModel.from_config(config.backbone, attn_implementation="eager")
            parameters = [name.lower() for name, _ in drawn.named_parameters()]
        _check_parameters(parameters, name)
        model = GPTBDecoderLMHeadModel(config)
    except UnsuitableError:
        raise
    except Exception as error:  # a family's own mistakes with sizes that it was not written for
        raise UnsuitableError(f"backbone {name}: can't be built so ({_one_line(error)})") from None
    check_backbone(model.transformer)
    return model


def check_architecture(config: PreTrainedConfig, name: str) -> None:
    """Raises ValueError, in one line with the reason, for what is no decoder in one piece."""
    reason = None
    if name in (GPTBConfig.model_type, GPTBDecoderConfig.model_type):
        reason = "a GPTB itself; its blocks are another decoder's"
    elif config.is_encoder_decoder:
        reason = "an encoder and a decoder; its decoder alone predicts nothing"
    elif config.get_text_config() is not config:
        text = config.get_text_config().model_type
        reason = f"a model of several parts; its text decoder is {text}"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING or "Encoder" in str(decoder_class(config)):
        reason = "an encoder, which fills gaps and predicts no next token"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = "no language model of transformers"
    if reason:
        raise UnsuitableError(f"backbone {name}: {reason}; choose a decoder, such as {', '.join(TESTED[:4])}")


def _check_parameters(names: list[str], name: str) -> None:
    if any(word in parameter for parameter in names for word in ("expert", "router", "moe")):
        raise UnsuitableError(
            f"backbone {name}: a mixture of experts; its router needs a loss of its own to use them all, which the"
            f" window's objective has not; choose a decoder, such as {', '.join(TESTED[:4])}"
        )


def check_backbone(model: GPTBDecoderModel) -> None:
    """Tries whether the decoder does what the recurrence needs of it, by one pass over the slots and its gradient.

    It must take embeddings and a mask, return an output for each slot, let every slot reach every other as the mask
    says (attention that is causal, or looks at neighbours only, whatever the mask says, would keep tokens from the
    state), and take a state as it is.

    Raises `UnsuitableError`, in one line with the reason.
    """
    config: GPTBDecoderConfig = model.config
    slots, name = config.num_slots, config.backbone.model_type
    window = _sliding_window(config.backbone)
    if window is not None and window < slots:
        raise UnsuitableError(
            f"backbone {name}: sliding_window {window} is below num_slots {slots}: slots would not all see each other;"
            " raise it or lower num_slots"
        )
    if config.preserve_decoder and not model.takes_positions:
        raise UnsuitableError(f"backbone {name}: it takes no positions, and so can't be preserved; set recent_tokens 0")
    width = int(cast(torch.Tensor, model.get_input_embeddings().weight).shape[-1])
    if width != config.hidden_size:
        raise UnsuitableError(
            f"backbone {name}: its embeddings have {width} numbers, its blocks {config.hidden_size}; a state could not"
            " stand beside a token"
        )
    x_SSE, layers, reach_SS = _reach(model, name)
    mask_SS = model.slot_mask(model.initial_embeds)
    hidden_SS = torch.zeros_like(reach_SS, dtype=torch.bool)
    if mask_SS is not None:
        hidden_SS = mask_SS <= torch.finfo(mask_SS.dtype).min
    unseen, seen = (reach_SS <= 0) & ~hidden_SS, (reach_SS > 0) & hidden_SS
    if config.preserve_decoder:  # what a token's slot does not see itself, the state's slots tell it in the next block
        seen = torch.zeros_like(seen)
    lost = ", so that tokens would not reach the state"
    for wrong_SS, verb, effect in ((unseen, "does not see", lost), (seen, "sees", "")):
        if wrong_SS.any():
            looks, other = (int(i) for i in wrong_SS.nonzero()[0])
            raise UnsuitableError(
                f"backbone {name}: slot {looks} {verb} slot {other}, whatever the mask says{effect}; choose a decoder"
                " with attention that follows its mask"
            )
    _check_scale(layers[0], x_SSE, name)


def _reach(model: GPTBDecoderModel, name: str) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """One pass over the slots: what went in (S, S, E), the layers, and the gradient's norm by output and input slot."""
    slots, training = model.config.num_slots, model.training
    # For each slot a set of slots of its own: output s of set s, followed back to all inputs of that set.
    x_SSE = torch.randn((slots, slots, model.config.hidden_size), generator=torch.Generator().manual_seed(0))
    x_SSE = x_SSE.to(model.device, model.dtype).requires_grad_()
    layers: list[torch.Tensor] = []
    try:
        y_SSE = model.eval().run_slots(x_SSE, model.slot_context(model.initial_embeds), layers)
        own_SE = y_SSE.diagonal(dim1=0, dim2=1).t()
        direction_SE = torch.randn(own_SE.shape, generator=torch.Generator().manual_seed(1)).to(own_SE)
        (gradient_SSE,) = torch.autograd.grad((own_SE * direction_SE).sum(), x_SSE)
    except Exception as error:
        raise UnsuitableError(
            f"backbone {name}: it does not run over embeddings with a mask among them ({_one_line(error)})"
        ) from None
    finally:
        model.train(training)
    return x_SSE, layers, gradient_SSE.norm(dim=-1)


def _check_scale(first_SSE: torch.Tensor, x_SSE: torch.Tensor, name: str) -> None:
    """A state must enter the blocks as it came out of them, and not multiplied each time by some factor."""
    difference = (first_SSE - first_SSE[:1]).flatten().detach()
    given = (x_SSE - x_SSE[:1]).flatten().detach()
    factor = float(difference @ given / (given @ given))
    is_multiple = (difference - factor * given).norm() < 1e-3 * difference.norm()
    if is_multiple and abs(factor - 1) > 1e-2:
        raise UnsuitableError(
            f"backbone {name}: it multiplies what it is given by {factor:.4g} before its first block, which is not"
            " known here; states would not enter as they are"
        )


def _no_such(name: str) -> str:
    near = difflib.get_close_matches(name, [*CONFIG_MAPPING], 1)
    hint = f"did you mean {near[0]}?" if near else f"such as {', '.join(('gpt2', *TESTED))}, or a folder"
    return f"backbone {name!r}: no decoder of transformers, and no folder with a config.json; {hint}"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _sliding_window(config: PreTrainedConfig) -> int | None:
    if not getattr(config, "use_sliding_window", True):
        return None
    sizes = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if size), default=None)
