"""Owns the claim that imports flow one way (CONTRIBUTING.md): read from the source, nothing is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "gptb_ds"
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))


def imports_of(module: Path) -> set[str]:
    tree = ast.parse((PACKAGE / module).with_suffix(".py").read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def uses(module: Path, prefix: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for name in imports_of(module))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_flow_one_way(module: Path):
    if module.parts[0] == "data":
        assert not uses(module, "gptb_ds.model") and not uses(module, "gptb_ds.training")
    if module.parts[0] == "model":
        assert not uses(module, "gptb_ds.data") and not uses(module, "gptb_ds.training")
    if module == Path("config"):
        assert not any(name.startswith("gptb_ds") for name in imports_of(module))
    if module != Path("training/engine"):
        assert not uses(module, "deepspeed"), "only training/engine.py imports deepspeed"
    if module not in (Path("cli"), Path("__main__")):
        assert not uses(module, "gptb_ds.cli")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_first_line_says_what_the_file_owns(module: Path):
    text = (PACKAGE / module).with_suffix(".py").read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring"


def test_a_command_that_needs_no_model_loads_none():
    program = "import sys; sys.argv = ['gptb-ds', '--help']; from gptb_ds.cli import main; code = 1\n"
    program += "try: main()\nexcept SystemExit as done: code = done.code\n"
    program += "sys.exit(code or ('torch' in sys.modules and 3))"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0
