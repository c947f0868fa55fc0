"""A configuration as YAML: a recipe or a file with the command line's keys on top, and errors one line each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gptb_ds.config.group import Group
from gptb_ds.config.whole import Config
from gptb_ds.suggestions import nearest

RECIPES = Path(__file__).parents[1] / "recipes"


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line for each error."""


def load_config(source: str | None, overrides: Mapping[str, object]) -> Config:
    """The configuration of a recipe's name or YAML file, with dotted `overrides` on top.

    Raises `ConfigError` with one line for each thing that is wrong: key, value and remedy.
    """
    if source is not None and not source.strip():
        raise ConfigError("--config '': is empty (a variable that is not set?); name a recipe or a file")
    values = _read_yaml(source) if source else {}
    for key, value in overrides.items():
        *groups, name = key.split(".")
        target = values
        for group in groups:
            inner = target.setdefault(group, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{source}: '{group}' must hold keys, not the value {inner!r}")
            target = inner
        target[name] = value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(e) for e in error.errors())) from None


def save_config(config: Config) -> str:
    """`config` as YAML text; `load_config` of it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _check_keys(node: yaml.Node | None, seen: set[int]) -> None:
    """Raises YAMLError for a key that comes twice: of two groups of a name yaml 6.0 drops the first without a word."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = part if isinstance(part, tuple) else (None, part)
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"'{key.value}' is in line {lines[key.value]} and in line {line}; join them")
            lines[key.value] = line
        _check_keys(value, seen)


def _read_yaml(source: str) -> dict[str, object]:
    path = Path(source)
    recipe = RECIPES / f"{source}.yaml"
    if not path.is_file() and recipe.is_file():
        path = recipe
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ConfigError(f"--config {source}: no such file, and no recipe of that name (recipes: {names})")
    try:
        text = path.read_text(encoding="utf-8-sig")
        _check_keys(yaml.compose(text, yaml.SafeLoader), set())
        values = yaml.safe_load(text) or {}
    except OSError:
        raise
    except Exception as error:  # yaml raises what comes: ValueError for 2020-13-45, KeyError for !!bool x
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold groups of keys (model:, data:, ...), not {type(values).__name__}")
    return {name: value for name, value in values.items() if value is not None}


def _keys() -> list[str]:
    """Every key that a configuration may have, dotted, and its groups."""
    keys = list(Config.model_fields)
    for group, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            keys += [f"{group}.{key}" for key in field.annotation.model_fields]
    return keys


def _line(error: ErrorDetails) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{where}: required; give --{where} VALUE or set it in the configuration file"
    if error["type"] == "extra_forbidden":
        near = nearest(where, _keys())
        return f"{where}: unknown key; " + (f"did you mean {near}?" if near else "`gptb-ds train --help` lists them")
    if error["type"] == "value_error":  # a cross-field check of ours: it names the keys itself
        return str(error["ctx"]["error"])
    return f"{where}: {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
