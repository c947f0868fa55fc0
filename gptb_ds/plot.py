"""Pictures: loss curves of runs, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from gptb_ds.training.metrics import read_metrics


def plot_runs(runs: Sequence[str], out: str) -> None:
    """Draws training loss (thin, in bits per token) and held-out bits per byte (dots) over tokens.

    Raises ValueError for a folder without metrics, and for an ending that matplotlib can't write.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run in runs:
        path = Path(run) / "metrics.jsonl"
        if not path.is_file():
            raise ValueError(f"{run}: has no metrics.jsonl; is it the folder of a run (--run.dir)?")
        lines = read_metrics(path)
        steps = [line for line in lines if line.get("loss") is not None]
        if not steps:
            raise ValueError(f"{path}: holds no update yet; train first")
        tokens = {0: 0} | {line["update"]: line["tokens"] for line in lines if "tokens" in line}
        (drawn,) = axes.plot(
            [line["tokens"] for line in steps],
            [line["loss"] / math.log(2) for line in steps],
            linewidth=0.6,
            alpha=0.5,
            label=f"{Path(run).name}: training, bits per token",
        )
        held_out = [line for line in lines if line.get("eval_bits_per_byte") is not None and line["update"] in tokens]
        if held_out:
            axes.plot(
                [tokens[line["update"]] for line in held_out],
                [line["eval_bits_per_byte"] for line in held_out],
                "o-",
                color=drawn.get_color(),
                label=f"{Path(run).name}: held out, bits per byte (last {held_out[-1]['eval_bits_per_byte']:.2f})",
            )
    axes.set_xlabel("tokens")
    axes.set_ylabel("bits")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(out, dpi=120)
    except ValueError as error:
        raise ValueError(f"--out {out}: {error}") from None
    finally:
        plt.close(figure)
