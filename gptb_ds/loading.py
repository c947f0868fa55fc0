"""A model and its tokenizer from a run, a checkpoint or an exported folder; never a model that is only half there."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import GPT2Config, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from gptb_ds.baselines import GPT2Baseline, LSTMConfig
from gptb_ds.checkpoint.format import (
    CheckpointError,
    checkpoint_folders,
    has_manifest,
    newest_good,
    read_manifest,
    verify,
)
from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.data.tokenization import load_folder, vocab_size
from gptb_ds.distributed.world import World
from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.decoder import AnyGPTB
from gptb_ds.model.decoder_configuration import GPTBDecoderConfig
from gptb_ds.model.window_model import WindowModel
from gptb_ds.model_choice import model_class, new_model

# Types of a safetensors file that weights may have; all become float32.
FLOATS = ("F64", "F32", "F16", "BF16")


# Types that a model may read in.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_gptb(path: str) -> tuple[AnyGPTB, PreTrainedTokenizerBase]:
    """`load_any`, for what only a GPTB can do. Raises ValueError for a model to compare with, too."""
    model, tokenizer = load_any(path)
    if not isinstance(model, AnyGPTB):
        remedy = "export it, and use transformers" if isinstance(model, GPT2Baseline) else "train a GPTB"
        raise ValueError(f"{path}: holds a {type(model).__name__}, a model to compare with; {remedy}")
    return model, tokenizer


def load_any(path: str) -> tuple[WindowModel, PreTrainedTokenizerBase]:
    """Model (float32, eval mode) and tokenizer of a run (its newest good checkpoint), a checkpoint or an export.

    Raises ValueError saying what the folder lacks, or what other model it holds. transformers would fill what is
    missing with random numbers and go on; so all names and shapes are compared before.
    """
    folder = Path(path)
    if not path:
        raise ValueError("MODEL is empty (a variable that is not set?); name a run, a checkpoint or an exported folder")
    if has_manifest(folder):
        verify(folder)
        return _load_checkpoint(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: holds an adapter, which is not read; merge it into its model first")
    if checkpoint_folders(folder):
        good, passed_over = newest_good(folder, World())
        if good is None:
            raise ValueError("\n".join([f"{folder}: no checkpoint verifies", *passed_over.values()]))
        for line in passed_over.values():
            print(f"passed over {line}", file=sys.stderr)
        return _load_checkpoint(good)
    if next(folder.glob("lanes-*.safetensors"), None):
        raise ValueError(f"{folder}: a checkpoint without its manifest.json; the save was not completed")
    if (folder / "config.json").is_file():
        return _load_export(folder)
    raise ValueError(
        f"{path}: no run with checkpoints, no checkpoint and no exported folder (config.json);"
        " train first, or check the path"
    )


def trained_pieces(path: str) -> int | None:
    """How long the pieces of a run, or of a checkpoint, could be at most; None: whole documents, or not known."""
    folder = Path(path)
    for saved in [folder] if has_manifest(folder) else checkpoint_folders(folder):
        try:
            length = read_manifest(saved).identity.get("data.max_document_tokens")
        except CheckpointError:  # `load_any` passes it over as well
            continue
        return length if isinstance(length, int) else None
    return None


def usable_device(name: str) -> torch.device:
    """The device of a name of torch's; "auto" is a GPU if there is one. Raises ValueError for what there is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try cpu") from None
    return device


def _load_checkpoint(folder: Path) -> tuple[WindowModel, PreTrainedTokenizerBase]:
    reader = CheckpointReader(folder)
    model = new_model(_read_configuration(folder))
    parameters = dict(model.named_parameters())
    # Which moments there are is the optimizer's matter: only weights are read here.
    reader.check_model({name: tuple(p.shape) for name, p in parameters.items()}, moments=None)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(reader.fetch("weight", name))
    check_finite(str(folder), model)
    return model.eval(), _read_tokenizer(folder / "tokenizer", model.config)


def _load_export(folder: Path) -> tuple[WindowModel, PreTrainedTokenizerBase]:
    config = _read_configuration(folder)
    _check_weights(folder, config)
    tokenizer = _read_tokenizer(folder, config)
    kind = cast(type[PreTrainedModel], model_class(config))
    try:
        with quiet_loading():
            loaded = kind.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
    except Exception as error:  # of many classes, such as ImportError
        raise ValueError(f"{folder}: cannot be loaded: {one_line(error)}") from None
    model = cast(WindowModel, loaded)
    check_finite(str(folder), model)
    return model.eval(), tokenizer


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the bar and the table of missing tensors that transformers prints: we say it in a line, or refuse.

    A level above WARNING makes `from_pretrained` (modeling_utils.py, transformers 5.23) call `verify_tp_plan`, whose
    own logger then lists every tensor of ours that tensor parallelism would not split: it is silenced too.
    """
    bars = hf_logging.is_progress_bar_enabled()
    names = ("modeling_utils", "distributed.tensor_parallel", "integrations.tensor_parallel")
    loggers = [logging.getLogger(f"transformers.{name}") for name in names]
    levels = [logger.level for logger in loggers]
    hf_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()


def check_finite(name: str, model: torch.nn.Module) -> None:
    """Raises ValueError when a weight is infinite or NaN: everything that such a model says is NaN."""
    for key, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: the tensor {key!r} holds numbers that are not finite; take another copy of it")


def _read_configuration(folder: Path) -> PreTrainedConfig:
    """The configuration in a folder. Raises ValueError for another model's, or one that makes no model.

    A GPT-2 is read when it was trained here: its configuration says how it reads a stream.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_bytes())
        kind = values.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from None
    if values.get("quantization_config"):
        raise ValueError(f"{path}: its weights are quantised, which is not read; save them as float32 or bfloat16")
    kinds: dict[str, type[PreTrainedConfig]] = {
        each.model_type: each for each in (GPTBConfig, GPTBDecoderConfig, LSTMConfig)
    }
    if "carried_tokens" in values:
        kinds[GPT2Config.model_type] = GPT2Config
    if kind not in kinds:
        is_decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        remedy = "; --model.init_from starts the training of a GPTB from it" if is_decoder else ""
        raise ValueError(f"{folder}: holds a model of type {kind!r}, this reads {GPTBConfig.model_type!r}{remedy}")
    try:
        found: PreTrainedConfig = kinds[kind].from_pretrained(folder, local_files_only=True)
        return found
    except Exception as error:  # transformers has classes of its own for what its checks refuse
        raise ValueError(f"{path}: makes no model: {one_line(error)}") from None


def _check_weights(folder: Path, config: PreTrainedConfig) -> None:
    """Raises ValueError, in one line, unless the export's tensors are exactly those of the model."""
    try:
        with torch.device("meta"):
            model = cast(PreTrainedModel, new_model(config))
    except Exception as error:  # whatever a wrong value leads to: KeyError for an activation that there is not
        raise ValueError(f"{folder}/config.json: makes no model: {one_line(error)}") from None
    # A tied head is in the model twice, but a parameter once; the file may have it or not.
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, prefix = {name for name, _ in model.named_parameters()}, f"{model.base_model_prefix}."
    found = list(tensors_in(folder))
    if not any(name.startswith(prefix) for name, _, _ in found):  # of a GPTBModel, which has no head
        found = [(prefix + name, shape, dtype) for name, shape, dtype in found]
    for name, shape, dtype in found:
        if name not in wanted:
            raise ValueError(f"{folder}: has a tensor {name!r}, the model of its config.json has not")
        if shape != wanted[name] or dtype not in FLOATS:
            raise ValueError(
                f"{folder}: {name!r} is {dtype} {shape}, the model of its config.json needs F32 {wanted[name]}"
            )
        missing.discard(name)
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise ValueError(f"{folder}: lacks the tensor {min(missing)!r}{more}; export the model again")


def tensors_in(folder: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of each tensor in a model's safetensors files. Raises ValueError, in one line."""
    index = folder / "model.safetensors.index.json"
    try:
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if index.is_file() else []
        except ValueError as error:
            raise OSError(f"{index.name} is no JSON ({error})") from None
        for name in names or ["model.safetensors"]:
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: lacks {name}; export the model again")
            with safe_open(str(folder / name), "pt") as file:
                for key in file.keys():
                    piece = file.get_slice(key)
                    yield key, tuple(piece.get_shape()), piece.get_dtype()
    except (SafetensorError, OSError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}: its weights cannot be read: {one_line(error)}") from None


def _read_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = load_folder(folder)
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its tokenizer cannot be read: {one_line(error)}") from None
    if vocab_size(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has ids up to {vocab_size(tokenizer) - 1}, the model {config.vocab_size} rows;"
            " they don't belong together"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if any(end is not None and not 0 <= end < config.vocab_size for end in ends):
        raise ValueError(f"{folder}: its eos_token_id {config.eos_token_id} is beyond its {config.vocab_size} rows")
    return tokenizer


def one_line(error: BaseException) -> str:
    """What an exception says, as part of a line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
