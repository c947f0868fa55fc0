"""Pictures: loss curves of runs, side by side, and what a model's state is worth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from gptb_ds.state_use import Score
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
        if lacking := [line["update"] for line in steps if line.get("tokens") is None]:
            raise ValueError(f"{path}: the line of update {lacking[0]} has no 'tokens'; remove it")
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


def plot_state_use(scores: Sequence[Score], out: str) -> None:
    """Draws the loss over the position in the document, and over how often the state is reset; see `Reader.state_use`.

    Lines differ by shade and marker, so that they do in print as well.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(3, 2))
    markers = itertools.cycle("ovs^DP")
    for number, score in enumerate(scores):
        carried = score.reset_every is None
        left.plot(
            [row.first for row in score.by_position],
            [row.loss for row in score.by_position],
            marker="." if carried else next(markers),
            markersize=4,
            linewidth=2.2 if carried else 1,
            color=str(0.0 if carried else 0.75 - 0.5 * number / len(scores)),
            label="carried" if carried else f"reset every {score.reset_every:,}",
        )
    left.set_xlabel(f"position in the document ({scores[-1].read_as})")
    left.set_ylabel("nats per token")
    left.set_xscale("log", base=2)
    left.legend()
    resets = [(score.reset_every, score.loss) for score in scores if score.reset_every is not None]
    right.plot([every for every, _ in resets], [loss for _, loss in resets], "o-", color="0.4", label="reset")
    right.axhline(scores[-1].loss, color="0", linestyle="--", label=f"carried: {scores[-1].loss:.3f}")
    right.set_xlabel("state reset every so many tokens")
    right.set_xscale("log", base=2)
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    plt.close(figure)
