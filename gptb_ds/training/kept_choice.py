"""What a run that goes on has in the place of a key's "auto": chosen once, written into its config.yaml, and kept."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import yaml

from gptb_ds.config import Config


def kept_choice(config: Config, key: str, choices: Collection[str], before: str | None = None) -> str | None:
    """The choice that the run in `run.dir` made for `key` (GROUP.NAME); None: it has made none, or starts anew.

    `before` is what runs did before there was the key.
    """
    if config.run.resume == "never":
        return None
    group, name = key.split(".")
    try:
        found = yaml.safe_load((Path(config.run.dir) / "config.yaml").read_text()).get(group, {}).get(name, before)
        found = {True: "on", False: "off"}.get(found, found)  # a switch, as it was written once
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError):
        return None
    return found if found in choices else None


def kept_number(config: Config, key: str) -> int | None:
    """The number that the run in `run.dir` has for `key` (GROUP.NAME); None as in `kept_choice`."""
    if config.run.resume == "never":
        return None
    group, name = key.split(".")
    try:
        found = yaml.safe_load((Path(config.run.dir) / "config.yaml").read_text())[group][name]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return found if type(found) is int and found >= 0 else None


def with_kept_order(config: Config) -> Config:
    """`config` with the documents in the lanes as the run in `run.dir` began, whatever "auto" means today."""
    data, task = config.data, config.task
    if data.stagger == "auto":
        chosen = kept_choice(config, "data.stagger", ("on", "off")) or ("on" if data.is_staggered else "off")
        data = data.model_copy(update={"stagger": chosen})
    if task.curriculum == "auto" and kept_choice(config, "task.curriculum", ("off",), before="off"):
        task = task.model_copy(update={"curriculum": "off"})
    return config.model_copy(update={"data": data, "task": task})
