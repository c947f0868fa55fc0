"""GPTB's model configuration: GPT-2's keys plus those of the recurrence, and the checks on them."""

from __future__ import annotations

import copy
import dataclasses
import warnings

from transformers import GPT2Config, PreTrainedConfig

# What other programs read as the number of tokens that a model takes. There is no limit: this is one to work with.
UNLIMITED = 1 << 20
# What may become the state: see `GPTBConfig`.
CARRIES = ("outputs", "shift", "nothing")


class GPTBConfig(GPT2Config):
    """GPT-2's configuration with the keys of the recurrence.

    `num_slots` (S) counts the positions that the blocks run over: S-1 state vectors and one token. `rebias` lets every
    slot attend to every other; without it attention is causal and the model is memoryless (`warn_if_memoryless`).
    `recent_tokens` (C): the last C of the S-1 carried vectors are the embeddings of the last C tokens.
    `preserve_decoder`: the tokens' slots see each other as in a decoder, and the state through a learned gate that
    starts closed. `slot_positions`: rows of the table of positions; None = `n_positions`, which otherwise only tells
    other programs how many tokens the model takes.
    `carry`: which outputs of the blocks become the state. "outputs": those of the state's own slots, 0..S-2, as in the
    original. "shift": those of slots 1..S-1, so that the output which the logits are read from is carried on, and every
    vector moves one slot down a step. "nothing": none, the state's slots start each step anew from the initial state.
    Only recent tokens are carried then: a model to measure against what the state of another is worth.
    `dropout=p` sets GPT-2's `resid_pdrop`, `embd_pdrop` and `attn_pdrop` together.

    Raises ValueError when `num_slots` is below 2 or beyond the positions, `recent_tokens` leaves no state, or `n_head`
    does not divide `n_embd`.
    """

    model_type = "gptb"
    keys_to_ignore_at_inference = ["past_key_values", "past_hidden_states"]  # noqa: RUF012

    num_slots: int = 20
    rebias: bool = True
    recent_tokens: int = 0
    preserve_decoder: bool = False
    carry: str = "outputs"
    slot_positions: int | None = None
    # GPT-2's own default ids lie outside any smaller vocabulary.
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, dropout: float | None = None, **kwargs: object) -> None:
        if dropout is not None:
            self.resid_pdrop = self.embd_pdrop = self.attn_pdrop = dropout
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, object], **kwargs: object) -> GPTBConfig:
        """As in transformers, but overrides take part in the checks: `from_pretrained(gpt2_folder, num_slots=4)`."""
        names = {field.name for field in dataclasses.fields(cls)} | {"dropout"}
        own = {key: kwargs.pop(key) for key in names & kwargs.keys()}
        return super().from_dict({**config_dict, **own, "model_type": cls.model_type}, **kwargs)

    @property
    def position_rows(self) -> int:
        """Rows of `wpe`."""
        return self.n_positions if self.slot_positions is None else self.slot_positions

    def check(self) -> None:
        """Raises ValueError for the first thing that is wrong; the model calls it again when it is built."""
        check_slots(self)
        if self.num_slots > self.position_rows:
            key = "n_positions" if self.slot_positions is None else "slot_positions"
            raise ValueError(
                f"num_slots {self.num_slots} is beyond {key} {self.position_rows}; lower num_slots or raise {key}"
            )
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; choose a multiple")


def check_slots(config: PreTrainedConfig) -> None:
    """Raises ValueError when the keys of the recurrence, which every backbone's configuration has, don't hold up."""
    slots, recent = config.num_slots, config.recent_tokens
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 2:
        raise ValueError(f"num_slots is {slots!r}; it must be a whole number of at least 2 (one state, one token)")
    if isinstance(recent, bool) or not isinstance(recent, int) or not 0 <= recent < slots - 1:
        raise ValueError(
            f"recent_tokens is {recent!r}; with num_slots {slots} it must be a whole number from 0 to {slots - 2}"
            " (one slot for the token, at least one for the state)"
        )
    if getattr(config, "carry", "outputs") not in CARRIES:
        raise ValueError(f"carry is {config.carry!r}; it must be one of {', '.join(CARRIES)}")
    for name in ("rebias", "preserve_decoder"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} is {getattr(config, name)!r}; it must be true or false")
    if config.preserve_decoder and not config.rebias:
        raise ValueError("preserve_decoder with rebias=False: no token would ever reach the state; set rebias=True")


def as_gptb_config(config: GPT2Config) -> GPTBConfig:
    """A `GPTBConfig` of its own for the model, from a `GPTBConfig` or a plain `GPT2Config`, which stays as it was.

    A plain configuration may carry `rebias` and `num_slots` as hand-set attributes, or the original's `max_length` for
    the latter; what is missing takes GPTB's default.

    Raises ValueError for a configuration that is not GPT-2's, or that `GPTBConfig` refuses.
    """
    if isinstance(config, GPTBConfig):
        own = copy.deepcopy(config)
        own.check()
        return own
    if not isinstance(config, GPT2Config):
        raise ValueError(f"GPTB is built from a GPTBConfig or a GPT2Config, not from {type(config).__name__}")
    values = config.to_dict()
    values.pop("model_type", None)
    max_length = values.pop("max_length", None)
    if "num_slots" not in values and max_length is not None:
        values["num_slots"] = max_length
    return GPTBConfig(**values, **{"attn_implementation": config._attn_implementation})


def warn_if_memoryless(config: PreTrainedConfig) -> None:
    """Warns when `config` has `rebias` off: position S-1 is then hidden from the state, so no token can reach it.

    Unless the state is what `carry` "shift" makes it: then that position's output becomes a part of it.
    """
    if not getattr(config, "rebias", True) and getattr(config, "carry", "outputs") == "outputs":
        warnings.warn(
            "rebias=False makes attention between slots causal: no token ever reaches the state, so the model is"
            " memoryless (each prediction sees one token). Set rebias=True to train a recurrent model.",
            UserWarning,
            stacklevel=2,
        )


# Keys of the model that a run's configuration does not have: GPT-2's defaults, or what a warm start's model has.
INHERITED = (
    *("n_positions", "n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
)


def inherited(config: GPT2Config) -> dict[str, object]:
    """The values of `INHERITED` in a model's configuration: with the run's own they describe the model."""
    rows = config.position_rows if isinstance(config, GPTBConfig) else config.n_positions
    return {key: getattr(config, key) for key in INHERITED} | {"n_positions": rows}
