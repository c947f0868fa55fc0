"""Imports flow one way (CONTRIBUTING.md): every edge between packages is read from the source, nothing is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.draw_structure import BEGIN, CONTRIBUTING, END, drawing
from tests.harness.structure import MODULES, PACKAGE, PACKAGES, imports_of, packages_of

# What each package, or module beside the packages, may import of the others.
MAY_IMPORT: dict[str, set[str]] = {
    "exit_codes": set(),
    "atomic_files": set(),
    "suggestions": set(),
    "extension_builds": set(),
    "phases": set(),
    "config": {"suggestions"},
    "model": set(),
    "data": {"atomic_files", "config"},
    "distributed": {"exit_codes", "phases"},
    "checkpoint": {"atomic_files", "config", "distributed"},
    "model_choice": {"baselines", "config", "model"},
    "loading": {"baselines", "checkpoint", "data", "distributed", "model", "model_choice"},
    "state_use": {"data", "distributed", "model"},
    "state_health": {"data", "distributed", "model"},
    "evaluation": {"config", "data", "distributed", "loading", "model", "state_use"},
    "text_stream": set(),
    "sampling": set(),
    "generation": {"data", "loading", "model", "sampling", "text_stream"},
    "prefix_tree": {"model"},
    "lm_eval": {"data", "generation", "loading", "model", "prefix_tree"},
    "export": {"atomic_files", "baselines", "data", "loading", "model"},
    "training": {"atomic_files", "checkpoint", "config", "data", "distributed", "exit_codes", "model"}
    | {"evaluation", "extension_builds", "loading", "model_choice", "phases", "state_health"},
    "plot": {"state_use", "training"},
    "doctor": {"data", "extension_builds"},
    "commands": {"checkpoint", "config", "data", "doctor", "evaluation", "export", "generation", "plot"}
    | {"state_use", "training"},
    "cli": {"commands", "exit_codes", "suggestions"},
    "__main__": {"cli"},
    "auto_classes": {"lm_eval", "model"},
    "baselines": {"model"},
    "__init__": {"auto_classes", "model"},
}
# Libraries that only these modules may import: their inner workings are kept in one place.
ONLY_IN = {"deepspeed": {Path("training/engine"), Path("training/fp32_state")}}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_only_what_its_package_may(module: Path):
    assert packages_of(module) <= MAY_IMPORT[module.parts[0]]
    for library, homes in ONLY_IN.items():
        if module not in homes:
            assert not any(name.split(".")[0] == library for name in imports_of(module))


def test_packages_have_no_cycle_and_no_edge_is_allowed_in_vain():
    assert MAY_IMPORT.keys() == PACKAGES
    list(TopologicalSorter(MAY_IMPORT).static_order())  # raises CycleError
    used: dict[str, set[str]] = {name: set() for name in MAY_IMPORT}
    for module in MODULES:
        used[module.parts[0]] |= packages_of(module)
    used["cli"].add("commands")  # by name, when a verb is asked for
    used["auto_classes"] |= {"lm_eval", "model"}  # by name, when transformers or lm_eval asks
    assert used == MAY_IMPORT


def test_the_pictures_in_contributing_show_the_imports_as_they_are():
    shown = CONTRIBUTING.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert shown == drawing(), "python -m tests.draw_structure draws them anew"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_says_what_it_is_for(module: Path):
    text = (PACKAGE / module).with_suffix(".py").read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring"


def test_a_command_that_needs_no_model_loads_none():
    program = "import sys; sys.argv = ['gptb-ds', '--help']; from gptb_ds.cli import main; code = 1\n"
    program += "try: main()\nexcept SystemExit as done: code = done.code\n"
    program += "sys.exit(code or ('torch' in sys.modules and 3))"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0
