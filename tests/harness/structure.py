"""The structure of the package, read from the imports in its source; nothing is imported."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "gptb_ds"
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
PACKAGES = {module.parts[0] for module in MODULES}


def imports_of(module: Path) -> set[str]:
    """Full names of all that a module imports, wherever in it. `import_module` of the verbs counts as `commands`."""
    tree = ast.parse((PACKAGE / module).with_suffix(".py").read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level == 1 and module.parts[0] == "model", f"{module}: relative import"
            base = ".".join(["gptb_ds", *module.parts[:-1]]) + "." if node.level else ""
            names |= {
                f"{base}{node.module or ''}",
                *(f"{base}{node.module or ''}.{alias.name}" for alias in node.names),
            }
    return names


def modules_of(module: Path) -> set[Path]:
    """The modules of ours that a module imports, as paths below the package."""
    found = set()
    for name in imports_of(module):
        path = Path(*name.split(".")[1:]) if name.startswith("gptb_ds.") else None
        if path in MODULES and path != module:
            found.add(path)
    return found


def packages_of(module: Path) -> set[str]:
    """The packages of ours, other than its own, that a module imports."""
    own = module.parts[0]
    found = {name.split(".")[1] for name in imports_of(module) if name.startswith("gptb_ds.")}
    return {name for name in found if name in PACKAGES} - {own}
