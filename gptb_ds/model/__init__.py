"""The model's public names: GPTB's configuration, the recurrence and the language model."""

from .configuration import GPTBConfig, as_gptb_config, warn_if_memoryless
from .modeling import GPTBLMHeadModel, GPTBModel, GPTBOutput, warm_start
from .recurrence import SlotRecurrence

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
