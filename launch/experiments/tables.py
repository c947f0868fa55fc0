"""The tables and pictures of docs/results.md and the README, made from docs/results.jsonl.

    python launch/experiments/tables.py                  writes them
    python launch/experiments/tables.py --add FILE...    takes in the lines of experiments' results.jsonl first

A line that was stopped by a time limit is not taken in; with `--stopped` it is where at least half of the updates were
made, and the tables say so. A table stands between `<!-- NAME -->` and `<!-- end of
NAME -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import text_tables
from text_tables import table

Line = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "results.jsonl"
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
TASKS = {"parity": "parity", "cycle5": "cycle 5", "cycle6": "cycle 6", "s3": "S3", "a5": "A5", "s5": "S5"}
CHANCE = {"parity": "1/2", "cycle5": "1/5", "cycle6": "1/6", "s3": "1/6", "a5": "1/60", "s5": "1/120"}
PUBLISHED = {
    "parity": "sLSTM 2,048 (trained to 40); Mamba-2 and transformers fail",
    "cycle5": "-",
    "cycle6": "tanh RNN 1,000; Mamba-3 100",
    "s3": "tanh RNN 1,000; Mamba-3 fails",
    "a5": "-",
    "s5": "128 (implicit Mamba-2; trained to 32)",
}
MODELS = {"gpt2": "GPT-2", "lstm": "LSTM", "gptb": "GPTB"}
MOST = 10_000  # the longest length that is scored


def lines_of(lines: Iterable[Line], **name: Any) -> list[Line]:
    """The lines whose names have these values, by seed."""
    found = [line for line in lines if all(line["name"].get(key) == value for key, value in name.items())]
    return sorted(found, key=lambda line: line["name"]["seed"])


def best_lines(lines: list[Line], task: str, model: str) -> list[Line]:
    """The runs of a model for a task: GPTB's are the recipe's, of the others those of the best rate."""
    if model == "gptb":
        return lines_of(lines, task=task, model=model, change="")
    changes = {line["name"]["change"] for line in lines_of(lines, task=task, model=model)}
    rates = [change for change in changes if "updates" not in change] or list(changes)
    by_rate = [lines_of(lines, task=task, model=model, change=rate) for rate in sorted(rates)]
    # The one with the most seeds is the one that was chosen with the first.
    return max(by_rate, key=lambda found: (len(found), *_worth(found[0])), default=[])


def _worth(line: Line) -> tuple[float, ...]:
    shares = line["accuracy"].values()
    return (line["longest_99"], line["longest_90"], -(line["tokens_to_99"] or 1e12), sum(shares) / len(shares))


def _lengths(lines: list[Line], key: str = "longest_99") -> str:
    """The lengths of the seeds, one number when they agree."""
    found = [f"{line[key]:,}" for line in lines]
    if not found:
        return "not run"
    agree = len(found) > 1 and len(set(found)) == 1
    text = f"{found[0]} ({len(found)} of {len(found)})" if agree else " / ".join(found)
    shares = [_share(line) for line in lines if line.get("stopped")]
    return f"{text} (stopped at {min(shares):.0%} of the updates)" if shares else text


def _share(line: Line) -> float:
    """How much of its run was made."""
    return line["updates"] / line["keys"].get("train.updates", line["updates"])


def _tokens(lines: list[Line]) -> str:
    found = [line["tokens_to_99"] for line in lines]
    return " / ".join("never" if n is None else f"{n / 1000:,.0f} k" for n in found) or "not run"


def summary(lines: list[Line]) -> str:
    """The longest length with 99% right answers, of each model and seed, beside what was published."""
    head = ["task", "trained to", "chance", "GPT-2", "LSTM", "**GPTB**", "published (longest length >= 90%)"]
    rows = []
    for task, label in TASKS.items():
        cells = [_lengths(best_lines(lines, task, model)) for model in MODELS]
        rows.append([label, "32" if task in ("a5", "s5") else "60", CHANCE[task], *cells[:2], f"**{cells[2]}**"])
        rows[-1].append(PUBLISHED[task])
    return table(head, rows)


def details(lines: list[Line]) -> str:
    """Every model and learning rate on every task."""
    head = ["task", "model", "differs by", "seeds", "parameters", ">= 99% to", ">= 90% to", "tokens to 99%"]
    rows = []
    for task, label in TASKS.items():
        for model, name in MODELS.items():
            changes = {line["name"]["change"] for line in lines_of(lines, task=task, model=model)}
            for change in sorted(c for c in changes if c == "" or c.startswith("lr ") or task in ("a5", "s5")):
                found = lines_of(lines, task=task, model=model, change=change)
                seeds = " ".join(str(line["name"]["seed"]) for line in found)
                each = [_lengths(found), _lengths(found, "longest_90"), _tokens(found)]
                rows.append([label, name, change or "-", seeds, f"{found[0]['parameters'] / 1000:.0f} k", *each])
    return table(head, rows)


def ablations(lines: list[Line]) -> str:
    """What differs from the recipe, on the two hardest of the small tasks."""
    head = [
        "differs from the recipe by",
        "cycle 6: >= 99% to, by seed",
        "tokens to 99%",
        "S3: >= 99% to",
        "tokens to 99%",
    ]
    names = [
        line["name"]
        for line in lines
        if line["name"].get("model") == "gptb" and line["name"]["task"] in ("cycle6", "s3")
    ]
    rows = []
    for change in dict.fromkeys(name["change"] for name in names):
        row = [change or "**nothing: the recipe**"]
        for task in ("cycle6", "s3"):
            found = lines_of(lines, task=task, model="gptb", change=change)
            row += [_lengths(found), _tokens(found)]
        rows.append(row)
    return table(head, sorted(rows, key=lambda row: not row[0].startswith("**")))


def health(lines: list[Line]) -> str:
    """The state's figures at the end of training: least, median and most over the runs that have them."""
    figures = {
        "Lyapunov exponent": "state_lyapunov",
        "gradient at 16 steps": "state_gradient_16",
        "spread": "state_spread",
        "swapped state, nats": "state_swapped",
    }
    measured = [
        line
        for line in lines
        if line["name"].get("task") in TASKS
        and line["name"]["model"] == "gptb"
        and (line.get("health") or {}).get("state_lyapunov") is not None
    ]
    rows = []
    for task, label in TASKS.items():
        for holds in (True, False):
            found = [line for line in lines_of(measured, task=task) if (line["longest_99"] >= MOST) == holds]
            if found:
                row = [label, "yes" if holds else "no", str(len(found))]
                for key in figures.values():
                    values = sorted(line["health"][key] for line in found if line["health"].get(key) is not None)
                    parts = (values[0], statistics.median(values), values[-1]) if len(values) > 1 else values
                    row.append(" / ".join(f"{value:.2g}" for value in parts) or "-")
                rows.append(row)
    return table(["task", f"holds {MOST:,}", "runs", *figures], rows)


def parity_benchmark(lines: list[Line]) -> str:
    """Right answers at each length, the mean of the seeds (the least in brackets)."""
    found = [line for line in lines if "benchmark" in line["name"]]
    lengths = ["10", "20", "40", "80", "128"]
    rows = []
    for model in dict.fromkeys(line["name"]["model"] for line in found):
        seeds = [line["accuracy"] for line in found if line["name"]["model"] == model]
        shares = [[seed[length] for seed in seeds] for length in lengths]
        rows.append([model, str(len(seeds)), *(f"{statistics.mean(s):.1%} ({min(s):.1%})" for s in shares)])
    return table(["model", "seeds", *(f"at {length}" for length in lengths)], rows)


def language(lines: list[Line]) -> str:
    """Loss on held-out documents like the training's, and right answers of the tasks in words by length or distance."""
    head = ["task", "model", "seeds", "held-out loss, nats an answer"]
    head.append("right answers by length (programs: tokens; copy, recall: blanks between)")
    rows = []
    for task in ("programs3", "copy", "recall"):
        for model, label in MODELS.items():
            found = lines_of(lines, task=task, model=model)
            if found:
                means = {key: statistics.mean(line["accuracy"][key] for line in found) for key in found[0]["accuracy"]}
                shares = ", ".join(f"{key}: {share:.0%}" for key, share in means.items())
                losses = " / ".join(f"{line['eval_loss']:.2g}" for line in found)
                rows.append([task, label, str(len(found)), losses, shares])
    return table(head, rows)


def hours(lines: list[Line]) -> str:
    """What was computed."""
    runs = [line for line in lines if "seconds" in line]
    seconds = sum(line["seconds"] for line in runs)
    return f"{len(runs)} runs, {seconds / 3600:.1f} hours of one core (or of a share of a GPU) in all."


TABLES: dict[str, Callable[[list[Line]], str]] = {
    "summary": summary,
    "details": details,
    "ablations": ablations,
    "health": health,
    "parity benchmark": parity_benchmark,
    "language": language,
    "hours": hours,
} | text_tables.TABLES


def filled(page: str, lines: list[Line]) -> str:
    """The page with its tables made anew."""
    for name, made in TABLES.items():
        block = re.compile(rf"<!-- {name} -->\n.*?<!-- end of {name} -->", re.DOTALL)
        if block.search(page):
            page = block.sub(
                lambda _, name=name, made=made: f"<!-- {name} -->\n{made(lines)}\n<!-- end of {name} -->", page
            )
    return page


def picture(lines: list[Line], path: Path) -> None:
    """Right answers by length, a panel for each task: models differ by their markers, too, for print in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in TASKS if best_lines(lines, task, "gptb")]
    figure, panels = pyplot.subplots(2, -(-len(tasks) // 2), figsize=(10, 5.4), sharey=True, squeeze=False)
    looks = {"gptb": ("o", "-", "black"), "lstm": ("^", "--", "0.35"), "gpt2": ("s", ":", "0.55")}
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(panels.flat, tasks, strict=False):
        for model, (marker, style, grey) in looks.items():
            for number, line in enumerate(best_lines(lines, task, model)):
                at = [int(length) for length in line["accuracy"]]
                label = MODELS[model] if number == 0 else None
                axes.plot(at, list(line["accuracy"].values()), marker=marker, ls=style, color=grey, ms=4, label=label)
        axes.axvline(32 if task in ("a5", "s5") else 60, color="0.8", lw=4, zorder=0)
        top, bottom = CHANCE[task].split("/")
        axes.axhline(int(top) / int(bottom), color="0.8", lw=1, zorder=0)
        axes.set(xscale="log", title=TASKS[task], xlabel="length", ylim=(-0.02, 1.05))
    panels[0][0].set_ylabel("right answers")
    panels[1][0].set_ylabel("right answers")
    panels[0][0].legend(loc="lower left", fontsize=8)
    figure.suptitle(
        "Trained to the grey line, tested beyond it: a line for each seed (horizontal: chance)", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def take_in(lines: list[Line], line: Line) -> None:
    """Adds a run's line, or puts it in the place of one of the same name that was stopped after fewer updates."""
    line["keys"] = {key: value for key, value in line.get("keys", {}).items() if key != "data.path"}
    place = next((n for n, known in enumerate(lines) if known["name"] == line["name"]), None)
    if place is None:
        lines.append(line)
    elif lines[place].get("stopped") and line["updates"] > lines[place]["updates"]:
        lines[place] = line


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="*", type=Path, default=[], metavar="FILE", help="take in these lines first")
    parser.add_argument("--stopped", action="store_true", help="lines that were stopped behind the middle, too")
    args = parser.parse_args()
    lines = read_lines(DATA)
    for line in (line for path in args.add for line in read_lines(path)):
        whole = not line.get("stopped") or (args.stopped and _share(line) >= 0.5)
        if whole and "error" not in line:
            take_in(lines, line)
    DATA.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for page in PAGES:
        page.write_text(filled(page.read_text(), lines))
    picture(lines, ROOT / "docs" / "results-lengths.png")


if __name__ == "__main__":
    main()
