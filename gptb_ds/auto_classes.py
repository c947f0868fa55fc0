"""Makes transformers' Auto classes know GPTB as soon as they exist, without loading transformers before that."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Where transformers keeps the tables of its Auto classes: of configurations, and of models.
_TABLES = ("transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto")


def register() -> None:
    """After this the Auto classes read folders that hold a GPTB, whoever imports what first.

    transformers has no entry points for the models of others: a model must call `AutoConfig.register` itself, and to do
    so it must import transformers and torch, which takes seconds. `gptb-ds --help`, and a `prepare` that has nothing to
    do, should not pay for that. So `gptb_ds.model`, which registers GPTB, is imported when transformers loads its
    tables, and everybody who uses an Auto class makes it do that.
    """
    if any(name in sys.modules for name in _TABLES):
        import_module("gptb_ds.model")
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


class _TableFinder(MetaPathFinder):
    """Finds the tables as Python would, and has GPTB registered once one of them is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            import_module("gptb_ds.model")

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
