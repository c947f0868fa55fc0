"""Export: a run or a checkpoint as a folder that `transformers` loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptb_ds.loading import load_any


@dataclass(frozen=True)
class ExportOptions:
    """`model`: a run, a checkpoint or an exported folder; `out`: the new folder."""

    model: str
    out: str


def export(options: ExportOptions) -> Path:
    """Writes the folder and returns it.

    Raises ValueError for a model that can't be used or a folder that has something in it.
    """
    out = Path(options.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: is not empty; name a new folder")
    model, tokenizer = load_any(options.model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
