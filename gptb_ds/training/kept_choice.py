"""What a run that goes on has in the place of a key's "auto": chosen once, written into its config.yaml, and kept.

A run that continues another one's checkpoint keeps what that one has chosen.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import yaml

from gptb_ds.checkpoint.resume import resume_now
from gptb_ds.config import Config


def kept_choice(config: Config, key: str, choices: Collection[str], before: str | None = None) -> str | None:
    """The choice that the run which goes on made for `key` (GROUP.NAME); None: it has made none, or none goes on.

    `before` is what runs did before there was the key.
    """
    found = _kept(config, key, before)
    if isinstance(found, bool):  # a switch, as it was written once
        found = "on" if found else "off"
    return found if isinstance(found, str) and found in choices else None


def kept_number(config: Config, key: str) -> int | None:
    """The number that the run which goes on has for `key` (GROUP.NAME); None as in `kept_choice`."""
    found = _kept(config, key)
    return found if type(found) is int and found >= 0 else None


def _kept(config: Config, key: str, before: object = None) -> object:
    """What the config.yaml of the run which goes on has for `key`; `before` where it lacks the key."""
    folder = _goes_on(config)
    if folder is None:
        return None
    group, name = key.split(".")
    try:
        return yaml.safe_load((folder / "config.yaml").read_text()).get(group, {}).get(name, before)
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError):
        return None


def _goes_on(config: Config) -> Path | None:
    """The folder of the run which goes on: this one, or that of the named checkpoint."""
    resume = resume_now(config.run.resume)
    if resume in ("auto", "never"):
        return Path(config.run.dir) if resume == "auto" else None
    # A checkpoint is RUN/checkpoints/step-N, of which either folder may be a link.
    runs = [checkpoint.parent.parent for checkpoint in (Path(resume).absolute(), Path(resume).resolve())]
    return next((run for run in runs if (run / "config.yaml").is_file()), None)


def with_kept_order(config: Config) -> Config:
    """`config` with the documents in the lanes as the run which goes on began, whatever "auto" means today."""
    data, task = config.data, config.task
    if data.stagger == "auto":
        chosen = kept_choice(config, "data.stagger", ("on", "off")) or ("on" if data.is_staggered else "off")
        data = data.model_copy(update={"stagger": chosen})
    if task.curriculum == "auto" and kept_choice(config, "task.curriculum", ("off",), before="off"):
        task = task.model_copy(update={"curriculum": "off"})
    return config.model_copy(update={"data": data, "task": task})
