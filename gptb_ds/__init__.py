"""GPTB-DS: distributed training of GPTB, a GPT-2 made recurrent by connecting its outputs to its inputs.

Importing it registers the model with transformers' Auto classes. That loads torch and transformers, which takes
seconds: as a command (`gptb-ds VERB`, `python -m gptb_ds VERB`) it loads only what the verb needs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__all__ = ["GPTBConfig", "GPTBLMHeadModel", "GPTBModel"]

# While Python looks for a package's __main__, argv[0] is "-m".
_IS_COMMAND = bool(sys.argv) and (sys.argv[0] == "-m" or Path(sys.argv[0]).name == "gptb-ds")

if TYPE_CHECKING or not _IS_COMMAND:
    from gptb_ds.model import GPTBConfig, GPTBLMHeadModel, GPTBModel


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gptb_ds' has no attribute '{name}'")
    from gptb_ds import model

    return getattr(model, name)
