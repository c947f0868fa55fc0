"""The tables of docs/results.md that are about text: the headline, its trials, the grid, and bits by position."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

Line = dict[str, Any]
TRIALS = ", trials"


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
    return title.split(TRIALS)[0].rsplit(", ", 1)[0]


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
    """Of each kind of model the one with the fewest bits per byte, and each with more tokens."""
    best: dict[object, list[Line]] = {}
    for same in sorted(_best_of(lines), key=_mean):
        name = same[0]["name"]
        more = None if TRIALS in name["text"] else name.get("tokens")
        best.setdefault((_kind(name), more), same)
    return list(best.values())


def _mean(lines: list[Line]) -> float:
    return statistics.mean(line["eval_bits_per_byte"] for line in lines)


def headline(lines: list[Line]) -> str:
    """Held-out bits per byte of the best of each kind, with what it costs, and beside GPT-2 at equal tokens."""
    head = ["text", "tokens", "model", "bits per byte (seeds)", "against GPT-2"]
    head += ["lr", "parameters", "FLOPs of a token", "FLOPs", "seconds"]
    rows = []
    by_text = _of_text(lines, lambda name: "change" not in name)
    for text, found in sorted(by_text.items(), key=lambda item: (_text_of(item[0]), item[1][0]["tokens"])):
        best = _best_of_kinds(found)
        equal = {_kind(same[0]["name"]): same for same in reversed(best) if same[0]["tokens"] == best[0][0]["tokens"]}
        for same in best:
            bits = [line["eval_bits_per_byte"] for line in same]
            half = f" ±{(max(bits) - min(bits)) / 2:.3f}" if len(bits) > 1 else ""
            line, flops = same[0], same[0]["flops_per_token"]
            row = [_text_of(text), f"{line['tokens'] / 1e6:.1f} M", line["name"]["model"]]
            row.append(f"**{_mean(same):.3f}**{half} ({len(bits)})")
            row.append(f"{_mean(same) / _mean(equal['GPT-2']) - 1:+.1%}" if "GPT-2" in equal else "-")
            row += [f"{line['name']['lr']:g}", f"{line['parameters'] / 1e6:.2f} M", f"{flops / 1e6:.1f} M"]
            seconds = statistics.mean(line["train_seconds"] for line in same)
            rows.append([*row, f"{flops * line['tokens']:.1e}", f"{seconds:.0f}"])
    return table(head, rows)


def trials(lines: list[Line]) -> str:
    """The variants that the headline was chosen from: seed 0, bits per byte at each rate."""
    rows = []
    for text, found in _of_text(lines, lambda name: TRIALS in name["text"] and "change" not in name).items():
        rates = sorted({line["name"]["lr"] for line in found}, reverse=True)
        for model in dict.fromkeys(line["name"]["model"] for line in found):
            bits = {line["name"]["lr"]: line["eval_bits_per_byte"] for line in found if line["name"]["model"] == model}
            each = ", ".join(f"{bits[rate]:.3f} (lr {rate:g})" for rate in rates if rate in bits)
            tokens = f"{found[0]['tokens'] / 1e6:.1f} M"
            rows.append([_text_of(text), tokens, model, each, min(bits.values())])
    rows.sort(key=lambda row: (*row[:2], row[-1]))
    return table(["text", "tokens", "model", "bits per byte"], [row[:-1] for row in rows])


def grid(lines: list[Line]) -> str:
    """One thing differs from the headline's GPTB and its twin, with the trials' tokens."""
    rows = []
    for found in _of_text(lines, lambda name: TRIALS in name["text"]).values():
        changed = [line for line in found if "change" in line["name"]]
        base = {(x["name"]["model"], x["name"]["lr"]): x for x in found if "change" not in x["name"]}
        pairs = {(x["name"]["model"], x["name"]["lr"]) for x in changed}
        same = [{"change": "nothing", "line": base[pair]} for pair in pairs if pair in base]
        every = same + [{"change": x["name"]["change"], "line": x} for x in changed]
        for change in dict.fromkeys(entry["change"] for entry in every):
            bits = {_kind(e["line"]["name"]): e["line"] for e in every if e["change"] == change}
            gptb, twin = (bits[kind]["eval_bits_per_byte"] if kind in bits else None for kind in ("GPTB", "twin"))
            shown = ["-" if value is None else f"{value:.3f}" for value in (gptb, twin)]
            worth = "-" if gptb is None or twin is None else f"{twin - gptb:+.3f}"
            flops = next(iter(bits.values()))["flops_per_token"]
            rows.append([change, *shown, worth, f"{flops / 1e6:.1f} M"])
    return table(["differs by", "GPTB", "its twin", "the state's worth, bits", "FLOPs of a token"], rows)


def by_position(lines: list[Line]) -> str:
    """Bits a token at the positions of a piece: the best of each kind with seed 0, of the bytes that were read most."""
    texts = _of_text(lines, lambda name: "bytes" in name["text"] and "change" not in name)
    most = max(texts.values(), key=lambda found: found[0]["tokens"], default=[])
    chosen = [same[0] for same in _best_of_kinds(most) if same[0].get("by_position")]
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
    "text trials": trials,
    "text grid": grid,
    "text by position": by_position,
    "long text": long_text,
}
