"""What the package imports is declared: nothing hangs on what another library happens to bring along."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for group in ("wandb", "lm-eval") for line in project["optional-dependencies"][group]]
    declared = {_plain(re.split(r"[<>=]", line)[0]) for line in [*project["dependencies"], *optional]}
    distributions = packages_distributions()
    undeclared = {
        f"{file.relative_to(ROOT)}: {module}"
        for file in (ROOT / "gptb_ds").rglob("*.py")
        for module in _imported(ast.parse(file.read_text()))
        if not declared & {_plain(name) for name in distributions.get(module, [module])}
    }
    assert not undeclared


def _imported(tree: ast.Module) -> set[str]:
    """The packages of others that are imported."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - {*sys.stdlib_module_names, "gptb_ds", "_typeshed"}  # the last is known to type checkers only


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
