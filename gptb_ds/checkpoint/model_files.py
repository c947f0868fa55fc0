"""What a checkpoint holds beside tensors, so that its folder alone is a model: configuration and tokenizer."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The content of `config.json` and of the files in `tokenizer/`, by their names in a checkpoint.

    The configuration says float32, whatever the precision of training: the weights in a checkpoint are.
    """
    config = deepcopy(model.config)
    config.dtype, config.architectures = "float32", [type(model).__name__]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder / "tokenizer")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
