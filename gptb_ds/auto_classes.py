"""Makes transformers' Auto classes, and lm_eval, know GPTB as soon as they exist, without loading them before that."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Where transformers defines AutoConfig, which finds the class of a configuration by its `model_type`.
_TABLE = "transformers.models.auto.configuration_auto"
# Where lm_eval finds the class of a model by the name that `--model` gives. It has no entry points either.
_HARNESS = "lm_eval.api.registry"


def register() -> None:
    """After this the Auto classes read folders with a GPTB, and lm_eval has a model "gptb", in any order of import.

    transformers has no entry points for the models of others: a model must call `AutoConfig.register` itself, and to do
    so it must import transformers and torch, which takes seconds. `gptb-ds --help`, and a `prepare` that has nothing to
    do, should not pay for that. So what is registered is a stand-in, and that when transformers loads its table.
    """
    for name, tell in _TOLD.items():
        if name in sys.modules:
            tell(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Late(type):
    """A class whose attributes, and whose instances, are those of a configuration of ours, imported at their first use.

    Importing `gptb_ds.model` registers the class itself in place of its stand-in, and the models. It can't be done
    while transformers loads its table: that may happen amid the import of the very GPT-2 that our model stands on.
    """

    stands_for: str

    def __getattr__(cls, name: str) -> object:
        return getattr(getattr(import_module("gptb_ds.model"), cls.stands_for), name)

    def __call__(cls, *args: object, **kwargs: object) -> object:
        return getattr(import_module("gptb_ds.model"), cls.stands_for)(*args, **kwargs)


class _StandIn(metaclass=_Late):
    model_type = "gptb"
    stands_for = "GPTBConfig"


class _DecoderStandIn(metaclass=_Late):
    model_type = "gptb_decoder"
    stands_for = "GPTBDecoderConfig"


def _register_stand_in(table: ModuleType) -> None:
    if "gptb_ds.model" not in sys.modules:  # else it has registered itself
        for stand_in in (_StandIn, _DecoderStandIn):
            table.AutoConfig.register(stand_in.model_type, stand_in)


def _register_harness(registry: ModuleType) -> None:
    if "gptb" not in registry.model_registry:
        registry.model_registry.register("gptb", target="gptb_ds.lm_eval:GPTBLM")


_TOLD = {_TABLE: _register_stand_in, _HARNESS: _register_harness}


class _Finder(MetaPathFinder):
    """Finds these modules as Python would, and tells them of GPTB once they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TOLD:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _TOLD[fullname](module)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
