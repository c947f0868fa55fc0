"""The way out of a run: a model and its tokenizer from a run, a checkpoint or an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gptb_ds.checkpoint.format import checkpoint_folders, newest_good, verify
from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.config import Config
from gptb_ds.distributed.world import World
from gptb_ds.model.configuration import INHERITED, GPTBConfig
from gptb_ds.model.modeling import GPTBLMHeadModel


def load_any(path: str) -> tuple[GPTBLMHeadModel, PreTrainedTokenizerBase]:
    """Model (float32, eval mode) and tokenizer of a run (its newest good checkpoint), a checkpoint or an export.

    Raises ValueError saying what the folder lacks.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        model = GPTBLMHeadModel.from_pretrained(folder, use_safetensors=True)
        return model.eval(), AutoTokenizer.from_pretrained(folder)
    if checkpoint_folders(folder):
        good, passed_over = newest_good(folder, World())
        if good is None:
            raise ValueError("\n".join([f"{folder}: no checkpoint verifies", *passed_over.values()]))
        return _load_checkpoint(good)
    if (folder / "manifest.json").is_file():
        verify(folder)
        return _load_checkpoint(folder)
    raise ValueError(
        f"{path}: no run with checkpoints, no checkpoint and no exported folder (config.json);"
        " train first, or check the path"
    )


def model_configuration(
    config: Config, vocab_size: int, eot_id: int, inherited: dict[str, Any] | None = None
) -> GPTBConfig:
    """The model that a run's configuration describes, over a store's vocabulary.

    `inherited` is what a warm start took over (see `modeling.INHERITED`).
    """
    model = config.model
    return GPTBConfig(
        vocab_size=vocab_size,
        num_slots=model.num_slots,
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_embd=model.n_embd,
        rebias=model.rebias,
        resid_pdrop=model.dropout,
        embd_pdrop=model.dropout,
        attn_pdrop=model.dropout,
        bos_token_id=eot_id,
        eos_token_id=eot_id,
        **({"n_positions": model.num_slots} if inherited is None else inherited),
    )


def _load_checkpoint(folder: Path) -> tuple[GPTBLMHeadModel, PreTrainedTokenizerBase]:
    run = folder.parent.parent
    try:
        config = Config.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{run / 'config.yaml'}: the run's configuration cannot be read: {error}") from None
    reader = CheckpointReader(folder)
    identity = reader.manifest.identity
    try:
        inherited = {key: identity[key] for key in INHERITED}
        shape = model_configuration(config, identity["vocab_size"], identity["eot_id"], inherited)
    except KeyError as error:
        raise ValueError(f"{folder}: the manifest's identity lacks {error}") from None
    model = GPTBLMHeadModel(shape)
    parameters = dict(model.named_parameters())
    reader.check_model({name: tuple(p.shape) for name, p in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(reader.fetch("weight", name))
    return model.eval(), AutoTokenizer.from_pretrained(run / "tokenizer", local_files_only=True)
