"""Prints figures of the package's structure: `python -m tests.measure_structure [FOLDER]` (default: gptb_ds).

Lines of functions (with signature and docstring, nested ones counted in both), their arguments, how deep their
statements nest, imports a module, lines of files (not blank), comments for each line of code, lines with `Any`.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from pathlib import Path

NESTS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith)


def depth(node: ast.AST, inside: int = 0) -> int:
    """How deep blocks nest below `node`; an elif is as deep as its if."""
    deepest = inside
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                continue
            is_elif = isinstance(node, ast.If) and field == "orelse" and isinstance(child, ast.If)
            deepest = max(deepest, depth(child, inside + (isinstance(child, NESTS) and not is_elif)))
    return deepest


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + bool(given.vararg) + bool(given.kwarg)


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(folder: Path) -> dict[str, str]:
    """The figures by name."""
    lengths, counts, depths, imports, files = [], [], [], [], []
    comments = code = any_lines = 0
    longest = widest = ""
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text()
        tree = ast.parse(text)
        files.append(sum(bool(line.strip()) for line in text.splitlines()))
        imports.append(sum(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length, count = (node.end_lineno or 0) - node.lineno + 1, arguments(node)
                longest = f"{path.name}:{node.name}" if length > max(lengths, default=0) else longest
                widest = f"{path.name}:{node.name}" if count > max(counts, default=0) else widest
                lengths.append(length)
                counts.append(count)
                depths.append(depth(node))
        # A docstring is code to tokenize; comments are what starts with #.
        lines = {"comment": set[int](), "code": set[int]()}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                lines["comment"].add(token.start[0])
            elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                lines["code"] |= set(range(token.start[0], token.end[0] + 1))
        comments += len(lines["comment"])
        code += len(lines["code"])
        any_lines += sum(bool(re.search(r"\bAny\b", line)) for line in text.splitlines())
    return {
        "functions": f"{len(lengths)}: median {statistics.median(lengths):.0f}, p95 {percentile(lengths, 0.95)},"
        f" max {max(lengths)} lines ({longest})",
        "arguments": f"p95 {percentile(counts, 0.95)}, max {max(counts)} ({widest})",
        "nesting": f"max {max(depths)}",
        "imports a module": f"max {max(imports)}",
        "files": f"{len(files)}: median {statistics.median(files):.0f}, max {max(files)} lines, {sum(files):,} in all",
        "comments / code": f"{comments / code:.1%}",
        "lines with Any": f"{any_lines}",
    }


if __name__ == "__main__":
    for name, figure in measure(Path(sys.argv[1] if len(sys.argv) > 1 else "gptb_ds")).items():
        print(f"{name:<18} {figure}")
