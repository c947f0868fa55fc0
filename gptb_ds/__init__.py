"""GPTB-DS: distributed training of GPTB, a GPT-2 made recurrent by connecting its outputs to its inputs."""

from gptb_ds.model import GPTBConfig, GPTBLMHeadModel, GPTBModel

__all__ = ["GPTBConfig", "GPTBLMHeadModel", "GPTBModel"]
