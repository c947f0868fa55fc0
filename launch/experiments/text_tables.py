"""The tables of docs/results.md that are about text: the headline, its trials, the grid, and bits by position."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

Line = dict[str, Any]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown."""
    rows = list(rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) if rows else "Not run yet."


def _of_text(lines: list[Line], wanted: Callable[[Line], bool]) -> dict[str, list[Line]]:
    """The lines with bits per byte whose names are wanted, by the text they are of."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if "text" in line["name"] and line.get("eval_bits_per_byte") and wanted(line["name"]):
            found.setdefault(line["name"]["text"], []).append(line)
    return found


def _text_of(title: str) -> str:
    """Which text, without the budget."""
    return title.rsplit(", ", 1)[0]


def _label(name: Line) -> str:
    more = f", {name['tokens'] / 1e6:g} M tokens" if "tokens" in name else ""
    return name["model"] + more


def _best_of(lines: list[Line]) -> list[list[Line]]:
    """The lines of each model at its best rate of seed 0, one list for each model."""
    found = []
    for label in dict.fromkeys(_label(line["name"]) for line in lines):
        same = [line for line in lines if _label(line["name"]) == label]
        first = [line for line in same if line["name"]["seed"] == 0] or same
        rate = min(first, key=lambda line: line["eval_bits_per_byte"])["name"]["lr"]
        found.append(sorted((x for x in same if x["name"]["lr"] == rate), key=lambda x: x["name"]["seed"]))
    return found


def _kind(name: Line) -> str:
    return "twin" if "twin" in name["model"] else name["model"].split(",")[0].split(" of ")[0]


def _best_of_kinds(lines: list[Line]) -> list[list[Line]]:
    """Of each kind of model the one with the fewest bits per byte."""
    best: dict[str, list[Line]] = {}
    for same in sorted(_best_of(lines), key=_mean):
        best.setdefault(_kind(same[0]["name"]), same)
    return list(best.values())


def _mean(lines: list[Line]) -> float:
    return statistics.mean(line["eval_bits_per_byte"] for line in lines)


def _by_tokens(lines: list[Line]) -> list[tuple[str, list[Line]]]:
    """Text and runs of as many tokens of it, without the grid's, the most tokens last."""
    found: dict[tuple[str, int], list[Line]] = {}
    for text, same in _of_text(lines, lambda name: "change" not in name).items():
        for line in same:
            found.setdefault((_text_of(text), round(line["tokens"] / 1e5)), []).append(line)
    return [(text, found[text, tokens]) for text, tokens in sorted(found)]


def _row(same: list[Line], other: list[Line] | None) -> list[str]:
    """Bits per byte of a model beside another one's, and what it costs."""
    bits = [line["eval_bits_per_byte"] for line in same]
    half = f" ±{(max(bits) - min(bits)) / 2:.3f}" if len(bits) > 1 else ""
    line, flops = same[0], same[0]["flops_per_token"]
    row = [line["name"]["model"], f"**{_mean(same):.3f}**{half} ({len(bits)})"]
    row.append(f"{_mean(same) / _mean(other) - 1:+.1%}" if other else "-")
    row += [f"{line['name']['lr']:g}", f"{line['parameters'] / 1e6:.2f} M", f"{flops / 1e6:.1f} M"]
    return [*row, f"{flops * line['tokens']:.1e}", f"{statistics.mean(line['train_seconds'] for line in same):.0f}"]


COSTS = ["lr", "parameters", "FLOPs of a token", "FLOPs", "seconds"]


def headline(lines: list[Line]) -> str:
    """Held-out bits per byte of the best of each kind at equal tokens, with what it costs, and beside GPT-2."""
    rows = []
    for text, found in _by_tokens(lines):
        kinds = {_kind(same[0]["name"]): same for same in _best_of_kinds(found)}
        if "GPTB" in kinds:
            tokens = f"{found[0]['tokens'] / 1e6:.1f} M"
            rows += [[text, tokens, *_row(same, kinds.get("GPT-2"))] for same in kinds.values()]
    return table(["text", "tokens", "model", "bits per byte (seeds)", "against GPT-2", *COSTS], rows)


def equal_arithmetic(lines: list[Line]) -> str:
    """GPTB beside the others with as many FLOPs in all, which is as many more tokens."""
    rows = []
    for text, found in _by_tokens(lines):
        gptb = next((same for same in _best_of_kinds(found) if _kind(same[0]["name"]) == "GPTB"), None)
        if gptb is None:
            continue
        rivals = [
            same
            for other, more in _by_tokens(lines)
            if other == text
            for same in _best_of_kinds(more)
            if "twin" not in same[0]["name"]["model"] and same != gptb and 0.8 < _flops(same) / _flops(gptb) < 1.25
        ]
        if rivals:
            shown = [gptb, *rivals]
            rows += [[text, f"{same[0]['tokens'] / 1e6:.1f} M", *_row(same, gptb)] for same in shown]
    return table(["text", "tokens", "model", "bits per byte (seeds)", "against GPTB", *COSTS], rows)


def _flops(same: list[Line]) -> float:
    return same[0]["flops_per_token"] * same[0]["tokens"]


def trials(lines: list[Line]) -> str:
    """The variants that the headline was chosen from: seed 0, bits per byte at each rate."""
    rows = []
    for text, found in _by_tokens(lines):
        first = [line for line in found if line["name"]["seed"] == 0 and "tokens" not in line["name"]]
        rates = sorted({line["name"]["lr"] for line in first}, reverse=True)
        models = list(dict.fromkeys(line["name"]["model"] for line in first))
        if len(rates) == 1 and len(models) <= len(_best_of_kinds(first)):
            continue
        for model in models:
            bits = {line["name"]["lr"]: line["eval_bits_per_byte"] for line in first if line["name"]["model"] == model}
            each = ", ".join(f"{bits[rate]:.3f} (lr {rate:g})" for rate in rates if rate in bits)
            rows.append([text, f"{first[0]['tokens'] / 1e6:.1f} M", model, each, min(bits.values())])
    rows.sort(key=lambda row: (*row[:2], row[-1]))
    return table(["text", "tokens", "model", "bits per byte"], [row[:-1] for row in rows])


def grid(lines: list[Line]) -> str:
    """One thing differs from the first GPTB and its twin, at the same rate and with as many tokens."""
    rows = []
    for text, found in _of_text(lines, lambda name: "tokens" not in name and name["seed"] == 0).items():
        changes = list(dict.fromkeys(line["name"]["change"] for line in found if "change" in line["name"]))
        like = next((line["name"]["lr"] for line in found if "change" in line["name"]), None)
        for change in ["", *changes] if changes else []:
            same = [x for x in found if x["name"].get("change", "") == change and x["name"]["lr"] == like]
            bits = {_kind(line["name"]): line for line in same if line["name"]["model"] in GRID_MODELS}
            gptb, twin = (bits[kind]["eval_bits_per_byte"] if kind in bits else None for kind in ("GPTB", "twin"))
            shown = ["-" if value is None else f"{value:.3f}" for value in (gptb, twin)]
            worth = "-" if gptb is None or twin is None else f"{twin - gptb:+.3f}"
            line = bits["GPTB"] if "GPTB" in bits else bits["twin"]
            cost = [f"{line['parameters'] / 1e6:.2f} M", f"{line['flops_per_token'] / 1e6:.1f} M"]
            title = f"{_text_of(text)}, {line['tokens'] / 1e6:.1f} M tokens"
            rows.append([title, change or "**nothing**", *shown, worth, *cost])
    head = ["text", "differs by", "GPTB", "its twin", "the state's worth, bits"]
    return table([*head, "parameters", "FLOPs of a token"], rows)


def windows(lines: list[Line]) -> str:
    """What the window is worth: GPTB and the LSTM, each with the same tokens, tokens an update and rate."""
    rows = []
    for text, found in _of_text(lines, lambda name: name.get("change", WINDOWS[1]) in WINDOWS).items():
        changed = [line for line in found if "change" in line["name"] and _kind(line["name"]) != "twin"]
        plain = [{key: value for key, value in line["name"].items() if key != "change"} for line in changed]
        for name in [name for number, name in enumerate(plain) if name not in plain[:number]]:
            names = [name if change == WINDOWS[1] else name | {"change": change} for change in WINDOWS]
            same = [next((line for line in found if line["name"] == one), None) for one in names]
            bits = ["-" if line is None else f"{line['eval_bits_per_byte']:.3f}" for line in same]
            tokens = next(line for line in same if line)["tokens"]
            rows.append([_text_of(text), f"{tokens / 1e6:.1f} M", name["model"], *bits])
    return table(["text", "tokens", "model", "K = 4", "K = 16", "K = 64"], rows)


WINDOWS = ("window 4", "window 16", "window 64")
GRID_MODELS = ("GPTB, 4 recent tokens", "its twin without a state")


def by_position(lines: list[Line]) -> str:
    """Bits a token at the positions of a piece: the best of each kind with seed 0, of the bytes that were read most."""
    texts = [found for text, found in _by_tokens(lines) if "bytes" in text]
    whole = [same for same in map(_best_of_kinds, texts) if any(_kind(x[0]["name"]) == "GPTB" for x in same)]
    most = max(whole, key=lambda same: same[0][0]["tokens"], default=[])
    chosen = [same[0] for same in most if same[0].get("by_position")]
    starts = sorted({row["first"] for line in chosen for row in line["by_position"] if 16 <= row["first"] < 2048})
    rows = []
    for line in chosen:
        bits = {row["first"]: row["loss"] / math.log(2) for row in line["by_position"]}
        rows.append([line["name"]["model"], *(f"{bits[start]:.2f}" for start in starts)])
    return table(["model", *(f"from {start:,}" for start in starts)], rows)


def long_text(lines: list[Line]) -> str:
    """Bits a token by position in one long text, of `long_text.py`."""
    found = [line for line in lines if "long" in line["name"]]
    starts = [row["first"] for row in found[0]["by_position"] if row["first"] >= 128] if found else []
    rows = []
    for line in found:
        bits = {row["first"]: row["bits"] for row in line["by_position"]}
        rows.append([line["name"]["long"], *(f"{bits[start]:.2f}" for start in starts)])
    return table(["model", *(f"from {start:,}" for start in starts)], rows)


TABLES: dict[str, Callable[[list[Line]], str]] = {
    "text": headline,
    "text at equal arithmetic": equal_arithmetic,
    "text trials": trials,
    "text windows": windows,
    "text grid": grid,
    "text by position": by_position,
    "long text": long_text,
}
