"""The model whose weights a run starts from (`model.init_from`): a whole one, or one line that says what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from gptb_ds.checkpoint.format import checkpoint_folders, has_manifest
from gptb_ds.config import ConfigError
from gptb_ds.loading import FLOATS, check_finite, one_line, quiet_loading, tensors_in
from gptb_ds.model.decoder import AnyGPTB
from gptb_ds.model.decoder_configuration import GPTBDecoderConfig
from gptb_ds.model.warm_start import warm_start

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def start_from(configuration: GPT2Config | GPTBDecoderConfig, path: str, report: Callable[[str], None]) -> AnyGPTB:
    """`warm_start` from a folder or a hub name. transformers draws what a file lacks at random and goes on; we don't.

    Raises ConfigError for what is there and can't be used, OSError when the hub can't be reached.
    """
    folder, key = Path(path), f"model.init_from {path}"
    if folder.exists() or not _HUB_NAME.fullmatch(path):
        _must_hold_a_model(folder, key)
    said: list[str] = []
    model, problem = None, None
    try:
        with quiet_loading() if folder.is_dir() else nullcontext():  # a download of minutes keeps its bars
            model = warm_start(configuration, path, said.append)
    except ValueError as error:
        raise ConfigError(str(error) if path in str(error) else f"{key}: {one_line(error)}") from None
    except Exception as error:  # of many classes: what is wrong is looked for below
        problem = error
    if folder.is_dir():
        _must_be_whole(folder, key)
    if model is None:
        if isinstance(problem, OSError) and not folder.exists():
            raise OSError(f"{key}: {one_line(problem)}") from None
        raise ConfigError(f"{key}: cannot be loaded: {problem and one_line(problem)}") from None
    try:
        check_finite(key, model)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for line in said:
        report(line)
    return model


def _must_hold_a_model(folder: Path, key: str) -> None:
    if not folder.exists():
        raise ConfigError(f"{key}: no such folder (models of the hub are named OWNER/NAME)")
    if not folder.is_dir():
        raise ConfigError(f"{key}: is a file; name the model's folder")
    if has_manifest(folder) or checkpoint_folders(folder):
        raise ConfigError(f"{key}: is a run or a checkpoint; name what `gptb-ds export {folder} --out DIR` makes of it")
    if not (folder / "config.json").is_file():
        remedy = "an adapter; merge it into its model first" if _is_adapter(folder) else "no model (no config.json)"
        raise ConfigError(f"{key}: holds {remedy}")


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _must_be_whole(folder: Path, key: str) -> None:
    """Raises ConfigError when a tensor of the folder's own model is missing in its files, or has another shape."""
    try:
        with torch.device("meta"):
            source = AutoConfig.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_config(source)  # type: ignore[no-untyped-call]
    except Exception:  # it makes no model: `warm_start` has met that too
        return
    prefix = f"{model.base_model_prefix}."
    wanted = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in model.named_parameters()}
    try:
        found = {name.removeprefix(prefix): (shape, dtype) for name, shape, dtype in tensors_in(folder)}
    except ValueError as error:
        raise ConfigError(f"model.init_from {error}") from None
    for name, shape in wanted.items():
        if name not in found:
            raise ConfigError(f"{key}: its files lack the tensor {name!r}; fetch or export the model again")
        if found[name][0] != shape or found[name][1] not in FLOATS:
            there = " ".join(map(str, reversed(found[name])))
            raise ConfigError(f"{key}: {name!r} is {there}, the model of its config.json needs F32 {shape}")
