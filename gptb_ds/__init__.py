"""GPTB-DS: distributed training of GPTB, a GPT-2 made recurrent by connecting its outputs to its inputs.

Importing it costs next to nothing, and transformers' Auto classes know GPTB from then on (`auto_classes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptb_ds import auto_classes

if TYPE_CHECKING:
    from gptb_ds.model import GPTBConfig, GPTBDecoderConfig, GPTBDecoderLMHeadModel, GPTBLMHeadModel, GPTBModel

__all__ = ["GPTBConfig", "GPTBDecoderConfig", "GPTBDecoderLMHeadModel", "GPTBLMHeadModel", "GPTBModel"]

auto_classes.register()


def __getattr__(name: str) -> type:
    """The model's classes, loaded when they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'gptb_ds' has no attribute '{name}'")
    from gptb_ds import model

    found: type = getattr(model, name)
    return found
