"""Export: a run or a checkpoint as a folder that `transformers` loads anywhere, with the model's own code in it."""

from __future__ import annotations

import ast
import errno
import glob
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, GPT2LMHeadModel, PreTrainedConfig, PreTrainedTokenizerBase

from gptb_ds import model as model_package
from gptb_ds.atomic_files import sync_path, usual_mode
from gptb_ds.baselines import GPT2Baseline
from gptb_ds.data.tokenization import for_other_programs
from gptb_ds.loading import load_any, quiet_loading
from gptb_ds.model.configuration import UNLIMITED, GPTBConfig
from gptb_ds.model.decoder import AnyGPTB
from gptb_ds.model.decoder_configuration import GPTBDecoderConfig

AUTO_MAP = {
    "AutoConfig": "configuration.GPTBConfig",
    "AutoModel": "modeling.GPTBModel",
    "AutoModelForCausalLM": "modeling.GPTBLMHeadModel",
}
DECODER_AUTO_MAP = {
    "AutoConfig": "decoder_configuration.GPTBDecoderConfig",
    "AutoModel": "decoder.GPTBDecoderModel",
    "AutoModelForCausalLM": "decoder.GPTBDecoderLMHeadModel",
}


@dataclass(frozen=True)
class ExportOptions:
    """`model`: a run, a checkpoint or an exported folder; `out`: the new folder."""

    model: str
    out: str


def export(options: ExportOptions) -> Path:
    """Writes the folder, whole or not at all, and returns it.

    It holds the weights (safetensors, float32), the configuration, the tokenizer, settings for `generate`, a model card
    and the model's code, so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it where
    this package is not installed.

    Raises ValueError for a model that can't be used or a folder that has something in it, OSError when the disk does
    not take it.
    """
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: is not empty; name a new folder")
    model, tokenizer = load_any(options.model)
    # transformers' saving imports accelerate, and that DeepSpeed, which otherwise says that it has found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(model, GPT2Baseline):
        return _export_gpt2(model, tokenizer, out)
    if not isinstance(model, AnyGPTB):
        raise ValueError(f"{options.model}: holds a {type(model).__name__}, which transformers has no model for")
    config = model.config
    if isinstance(config, GPTBConfig):
        # Other programs take n_positions for the longest text; slots have positions here, tokens have no limit.
        config.slot_positions, config.n_positions = config.position_rows, UNLIMITED
    config.auto_map = AUTO_MAP if isinstance(config, GPTBConfig) else DECODER_AUTO_MAP
    tokenizer = for_other_programs(tokenizer)
    tokenizer.model_max_length = UNLIMITED
    tokenizer.padding_side = "left"
    # A tokenizer in Python saves what it was made with, not what it was set to.
    tokenizer.init_kwargs["padding_side"] = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    eot_id = config.eos_token_id
    ids = {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ids)
    with _whole_or_not_at_all(out) as folder, quiet_loading():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for path in code_files(config.auto_map["AutoModel"].partition(".")[0]):
            shutil.copyfile(path, folder / path.name)
        (folder / "README.md").write_text(_card(options.model, config), encoding="utf-8")
    return out


def _export_gpt2(model: GPT2Baseline, tokenizer: PreTrainedTokenizerBase, out: Path) -> Path:
    """A plain GPT-2, as transformers' own code reads it."""
    plain = GPT2LMHeadModel(model.config)
    plain.load_state_dict(model.state_dict())
    with _whole_or_not_at_all(out) as folder, quiet_loading():
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out


def code_files(module: str = "modeling") -> list[Path]:
    """The files of `model/` that an exported folder carries: `module` and what it imports, which is all relative."""
    package = Path(model_package.__file__).parent
    found: dict[str, Path] = {}
    names = [module]
    while names:
        name = names.pop()
        if name not in found:
            found[name] = package / f"{name}.py"
            tree = ast.walk(ast.parse(found[name].read_text(encoding="utf-8")))
            names += [node.module for node in tree if isinstance(node, ast.ImportFrom) and node.level and node.module]
    return [found[name] for name in sorted(found)]


@contextmanager
def _whole_or_not_at_all(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, and is gone if there is no end.

    One that a killed export of the same name left behind on this machine is removed.
    """
    beginning = f".{out.name}.unfinished-{platform.node()}-"
    unfinished = out.parent / f"{beginning}{os.getpid()}"
    for left in out.parent.glob(f"{glob.escape(beginning)}*"):
        if not _is_running(left.name.removeprefix(beginning)):
            shutil.rmtree(left, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        mode = usual_mode(unfinished)
        for path in unfinished.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            sync_path(path)
        sync_path(unfinished)
        os.replace(unfinished, out)  # an empty folder may stand there
    except SafetensorError as error:
        raise OSError(errno.EIO, f"the weights can't be written: {error}", str(out)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(out)) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:  # somebody else's
        return True
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    return True


def _card(source: str, config: PreTrainedConfig) -> str:
    """The model card: what this is, the run's figures, and how to use it."""
    facts = {"slots": config.num_slots, "blocks": config.num_hidden_layers, "width": config.hidden_size}
    facts |= {"backbone": config.backbone.model_type if isinstance(config, GPTBDecoderConfig) else "gpt2"}
    facts |= {"heads": config.num_attention_heads, "vocabulary": config.vocab_size} | _figures(Path(source))
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gptb, recurrent]
---

# A GPTB model

A recurrent transformer: at each step it reads one token beside a state of {config.num_slots - 1} vectors and hands its
outputs back as the next state. Its context has no limit, and a token costs the same however many came before it.
Trained with GPTB-DS.

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# trust_remote_code: the model's code is in the folder; not needed where gptb_ds is imported
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100, do_sample=True, top_k=0)[0]))
```

A document began with the end of text in training, so a prompt does: the tokenizer puts it there
(`add_special_tokens=False` leaves it out, for text that goes on). `past_key_values` is the state; it can be saved
(`past_key_values.save(file, model)`).
"""


def _figures(source: Path) -> dict[str, float]:
    """What the run's metrics say about the model, as far as they are there."""
    at_end = (source / "metrics.jsonl").is_file()
    metrics = source / "metrics.jsonl" if at_end else source.parent.parent / "metrics.jsonl"
    step = None if at_end else source.name.removeprefix("step-")
    figures: dict[str, float] = {}
    try:
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            if step is None or line["update"] <= int(step):
                kept = ("update", "tokens", "loss", "eval_loss", "eval_bits_per_byte")
                figures |= {name.replace("_", " "): line[name] for name in kept if line.get(name) is not None}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # a model without its run, or with one that stopped amid a line: the card does without
    return figures
