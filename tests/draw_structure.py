"""Draws the pictures of CONTRIBUTING.md from the imports: `python -m tests.draw_structure` brings them up to date.

The packages, an arrow from each to what it imports; and three ways through the code, each step of which must be an
import between the two modules, so that no picture can tell of a way that is not there.
"""

from __future__ import annotations

import itertools
from graphlib import TopologicalSorter
from pathlib import Path

from tests.harness.structure import MODULES, PACKAGES, modules_of, packages_of

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
BEGIN, END = "<!-- drawn by tests/draw_structure.py -->", "<!-- end of what is drawn -->"

# What travels, and the modules that it passes; after each arrow, in what shape it arrives there.
WAYS = {
    "A token, from text to a gradient": [
        ("data/sources", ""),
        ("data/build", "raw records"),
        ("data/encoding", "batches of records"),
        ("data/build", "tokens"),
        ("data/writer", "documents"),
        ("data/documents", "store on disk"),
        ("data/corpus", "memory-mapped store"),
        ("data/window", "several stores"),
        ("data/collator", "window (K, B)"),
        ("training/trainer", "window, made ahead"),
        ("training/updates", "window"),
        ("training/engine", "lane groups"),
        ("model/objective", "columns, time first"),
        ("model/window_model", "columns"),
        ("model/modeling", "columns of a GPTB"),
        ("model/recurrence", "the same, unrolled"),
        ("model/step", "one column a step"),
    ],
    "The state of a lane": [
        ("model/step", ""),
        ("model/recurrence", "outputs become inputs"),
        ("model/modeling", "the newest state"),
        ("model/window_model", ""),
        ("model/objective", "new state (B, S-1, E)"),
        ("training/engine", "detached at the window's edge"),
        ("training/updates", "kept until the next window"),
        ("training/trainer", "state_BSE"),
        ("training/checkpointer", "at a save"),
        ("checkpoint/writer", "lanes by global number"),
    ],
    "A checkpoint, and back": [
        ("training/fp32_state", ""),
        ("training/engine", "fp32 weights, moments by name"),
        ("training/checkpointer", "with counters, lanes, random state"),
        ("checkpoint/writer", "snapshot"),
        ("checkpoint/format", "files, manifest last"),
        ("checkpoint/reader", "verified"),
        ("training/checkpointer", "tensors by name and by lane"),
        ("training/trainer", "TrainState"),
    ],
}


def drawing() -> str:
    """The text between the marks: four pictures in mermaid."""
    parts = [_packages(), *(_way(title, steps) for title, steps in WAYS.items())]
    return "\n\n".join(parts)


def _packages() -> str:
    edges = {package: set[str]() for package in PACKAGES if not package.startswith("__")}
    for module in MODULES:
        if module.parts[0] in edges:
            edges[module.parts[0]] |= packages_of(module) & edges.keys()
    edges["cli"].add("commands")  # by name, when a verb is asked for
    edges["auto_classes"].add("model")  # by name, when transformers asks
    reach: dict[str, set[str]] = {}
    for package in TopologicalSorter(edges).static_order():
        reach[package] = edges[package] | {far for near in edges[package] for far in reach[near]}
    lines = ["```mermaid", "flowchart TD"]
    for package in sorted(edges):
        is_folder = any(len(module.parts) > 1 and module.parts[0] == package for module in MODULES)
        lines.append(f"    {package}{f'[[{package}/]]' if is_folder else f'[{package}]'}")
    for package in sorted(edges):
        # An arrow to what a nearer one leads to anyway would only hide the others.
        near = {to for to in edges[package] if not any(to in reach[other] for other in edges[package] - {to})}
        lines += [f"    {package} --> {to}" for to in sorted(near)]
    return "\n".join(["**Packages**: an arrow points to what is imported.", "", *lines, "```"])


def _way(title: str, steps: list[tuple[str, str]]) -> str:
    lines = ["```mermaid", "flowchart LR"]
    for number, (module, _) in enumerate(steps):
        assert Path(module) in MODULES, f"{title}: there is no module {module}"
        lines.append(f'    s{number}["{module.replace("/", ".")}"]')
    for number, ((before, _), (after, shape)) in enumerate(itertools.pairwise(steps)):
        one, other = Path(before), Path(after)
        assert other in modules_of(one) or one in modules_of(other), f"{title}: {one} and {other} don't know each other"
        lines.append(f'    s{number} -- "{shape}" --> s{number + 1}')
    return "\n".join([f"**{title}**", "", *lines, "```"])


def main() -> None:
    text = CONTRIBUTING.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    CONTRIBUTING.write_text(f"{before}{BEGIN}\n{drawing()}\n{END}{after}")


if __name__ == "__main__":
    main()
