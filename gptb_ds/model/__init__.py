"""The model: GPTB's configurations, the recurrence, the language models, and the window's objective.

The files of this folder but this one and `objective.py` are what an exported model carries with it as its own code:
they import each other relatively and nothing else of this package. Here they are registered with transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import GPTBCache
from .configuration import GPTBConfig, as_gptb_config, inherited, warn_if_memoryless
from .decoder import AnyGPTB, GPTBDecoderLMHeadModel, GPTBDecoderModel
from .decoder_configuration import GPTBDecoderConfig
from .modeling import GPTBLMHeadModel, GPTBModel
from .outputs import GPTBModelOutput, GPTBOutput
from .recurrence import SlotRecurrence
from .warm_start import warm_start
from .window_model import WindowModel

AutoConfig.register(GPTBConfig.model_type, GPTBConfig)
AutoModel.register(GPTBConfig, GPTBModel)
AutoModelForCausalLM.register(GPTBConfig, GPTBLMHeadModel)
AutoConfig.register(GPTBDecoderConfig.model_type, GPTBDecoderConfig)
AutoModel.register(GPTBDecoderConfig, GPTBDecoderModel)
AutoModelForCausalLM.register(GPTBDecoderConfig, GPTBDecoderLMHeadModel)

__all__ = [
    "AnyGPTB",
    "GPTBCache",
    "GPTBConfig",
    "GPTBDecoderConfig",
    "GPTBDecoderLMHeadModel",
    "GPTBDecoderModel",
    "GPTBLMHeadModel",
    "GPTBModel",
    "GPTBModelOutput",
    "GPTBOutput",
    "SlotRecurrence",
    "WindowModel",
    "as_gptb_config",
    "inherited",
    "warm_start",
    "warn_if_memoryless",
]
