"""The run's configuration: its keys and their defaults by group, the checks between them, and how it is read."""

from gptb_ds.config.data import DataConfig
from gptb_ds.config.group import AUTO_LANES, AUTO_RECOMPUTE, Group
from gptb_ds.config.model import ModelConfig
from gptb_ds.config.numbers import below_one, divisors
from gptb_ds.config.optim import OptimConfig
from gptb_ds.config.reading import RECIPES, ConfigError, load_config, save_config
from gptb_ds.config.run import RunConfig
from gptb_ds.config.task import TaskConfig
from gptb_ds.config.train import TrainConfig
from gptb_ds.config.whole import Config

__all__ = [
    "AUTO_LANES",
    "AUTO_RECOMPUTE",
    "RECIPES",
    "Config",
    "ConfigError",
    "DataConfig",
    "Group",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "below_one",
    "divisors",
    "load_config",
    "save_config",
]
