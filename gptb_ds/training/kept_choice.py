"""What a run that goes on has in the place of a key's "auto": chosen once, written into its config.yaml, and kept."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import yaml

from gptb_ds.config import Config


def kept_choice(config: Config, key: str, choices: Collection[str]) -> str | None:
    """The choice that the run in `run.dir` made for `train.KEY`; None: it has made none, or starts anew."""
    if config.run.resume == "never":
        return None
    try:
        found = yaml.safe_load((Path(config.run.dir) / "config.yaml").read_text())["train"][key]
        found = {True: "on", False: "off"}.get(found, found)  # a switch, as it was written once
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return found if found in choices else None
