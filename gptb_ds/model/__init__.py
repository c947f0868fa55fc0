"""Owns the model's public names: GPTB's configuration, the recurrence and the language model."""

from gptb_ds.model.configuration import GPTBConfig, as_gptb_config, warn_if_memoryless
from gptb_ds.model.modeling import GPTBLMHeadModel, GPTBModel, GPTBOutput, warm_start
from gptb_ds.model.recurrence import SlotRecurrence

__all__ = [
    "GPTBConfig",
    "GPTBLMHeadModel",
    "GPTBModel",
    "GPTBOutput",
    "SlotRecurrence",
    "as_gptb_config",
    "warm_start",
    "warn_if_memoryless",
]
