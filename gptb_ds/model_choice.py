"""Which model a run's configuration describes: a GPTB over its backbone, or a model to compare with."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, PreTrainedConfig

from gptb_ds.baselines import GPT2Baseline, LSTMBaseline, LSTMConfig
from gptb_ds.config import Config, ConfigError
from gptb_ds.model.backbones import adapted_backbone, is_family, named_backbone, read_backbone
from gptb_ds.model.configuration import UNLIMITED, GPTBConfig, inherited
from gptb_ds.model.decoder import GPTBDecoderLMHeadModel
from gptb_ds.model.decoder_configuration import GPTBDecoderConfig
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.window_model import WindowModel

Values = dict[str, Any]  # keys of a configuration of transformers, by their names there


def model_class(configuration: PreTrainedConfig) -> type[WindowModel]:
    """The class of the model that a configuration is for."""
    kinds: dict[type[PreTrainedConfig], type[WindowModel]] = {
        GPTBConfig: GPTBLMHeadModel,
        GPTBDecoderConfig: GPTBDecoderLMHeadModel,
        GPT2Config: GPT2Baseline,
        LSTMConfig: LSTMBaseline,
    }
    return kinds[type(configuration)]


def new_model(configuration: PreTrainedConfig) -> WindowModel:
    """A model with weights that are drawn. Raises ValueError for a configuration that does not hold up."""
    return model_class(configuration)(configuration)


def baseline_configuration(config: Config, vocab_size: int, eot_id: int) -> PreTrainedConfig:
    """The model to compare with that a run's configuration describes, over a store's vocabulary."""
    model, window = config.model, config.data.window
    shared: Values = {"vocab_size": vocab_size, "n_layer": model.n_layer, "n_embd": model.n_embd}
    shared |= {"eos_token_id": eot_id, "bos_token_id": eot_id, "initializer_range": model.initializer_range}
    if model.kind == "lstm":
        return LSTMConfig(**shared, dropout=model.dropout)
    context = model.context or window
    # Read again with the next window, so that every prediction sees its document as far back as it can.
    streaming: Values = {"carried_tokens": context - window, "evaluation_stride": max(1, context // 4)}
    return GPT2Config(
        **shared,
        n_head=model.n_head,
        n_positions=context,
        resid_pdrop=model.dropout,
        embd_pdrop=model.dropout,
        attn_pdrop=model.dropout,
        **streaming,
    )


def model_configuration(config: Config, vocab_size: int, eot_id: int) -> GPTBConfig | GPTBDecoderConfig:
    """The GPTB that a run's configuration describes, over a store's vocabulary.

    Raises ValueError for a backbone that there is not, or that can't be one.
    """
    model = config.model
    recurrence: Values = {key: getattr(model, key) for key in ("num_slots", "rebias", "recent_tokens", "carry")}
    # What starts from a decoder and holds recent tokens begins as that decoder.
    recurrence["preserve_decoder"] = model.rebias and model.recent_tokens > 0 and model.init_from is not None
    recurrence |= {"bos_token_id": eot_id, "eos_token_id": eot_id}
    folder = None if is_family(model.backbone) else read_backbone(model.backbone)
    if model.backbone != "gpt2" and not isinstance(folder, GPT2Config):
        backbone = _backbone(config, folder, vocab_size, eot_id)
        tied = True if folder is None else folder.tie_word_embeddings
        return GPTBDecoderConfig(backbone_config=backbone, tie_word_embeddings=tied, **recurrence)
    rest: Values = inherited(folder) if isinstance(folder, GPT2Config) else {}
    return GPTBConfig(
        **rest
        | recurrence
        | {key: getattr(model, key) for key in ("n_layer", "n_head", "n_embd", "n_inner", "initializer_range")}
        | {"vocab_size": vocab_size, "dropout": model.dropout}
        # Slots have positions, tokens have not: what other programs read as the longest text is no limit of ours.
        | {"slot_positions": rest.get("n_positions", model.num_slots), "n_positions": UNLIMITED}
    )


def _backbone(config: Config, folder: PreTrainedConfig | None, vocab_size: int, eot_id: int) -> PreTrainedConfig:
    """The configuration of a decoder other than GPT-2 that the blocks are of."""
    model = config.model
    tokens = {"vocab_size": vocab_size, "bos_token_id": eot_id, "eos_token_id": eot_id}
    if folder is not None:
        return adapted_backbone(folder, dropout=model.dropout, pad_token_id=None, **tokens)
    sizes = {"hidden_size": model.n_embd, "num_hidden_layers": model.n_layer, "num_attention_heads": model.n_head}
    sizes |= {} if model.n_kv_head is None else {"num_key_value_heads": model.n_kv_head}
    sizes |= {} if model.n_inner is None else {"intermediate_size": model.n_inner}
    return named_backbone(
        model.backbone, sizes, dropout=model.dropout, initializer_range=model.initializer_range, **tokens
    )


# Keys of a run's configuration that a folder's config.json has the say on, by transformers' names.
_OF_FOLDER = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_kv_head": "num_key_value_heads",
    "n_inner": "intermediate_size",
    "initializer_range": "initializer_range",
}


def with_backbone(config: Config) -> Config:
    """The configuration with the sizes of `model.backbone`, when that is a folder or a hub name; else as it is.

    Raises ConfigError for a size that was given and is another there, and for what is no decoder.
    """
    model = config.model
    if is_family(model.backbone):
        return config
    source = read_backbone(model.backbone)
    if isinstance(source, GPT2Config):
        theirs = {key: getattr(source, name, None) for key, name in _OF_FOLDER.items()} | {"n_inner": source.n_inner}
    else:
        theirs = {key: getattr(source, name, None) for key, name in _OF_FOLDER.items()}
    theirs = {key: value for key, value in theirs.items() if isinstance(value, int | float)}
    wrong = [
        f"model.{key} {getattr(model, key)}: model.backbone {model.backbone} has {value}; leave it out"
        for key, value in theirs.items()
        if key in model.model_fields_set and getattr(model, key) not in (None, value)
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return config.model_copy(update={"model": model.model_copy(update=theirs)})
