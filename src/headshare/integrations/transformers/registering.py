"""The registration of the checkpoint format with transformers, which waits until transformers is imported.

`import headshare` would take seconds if it imported transformers only to register there. transformers loads no model
before its module of models is imported. So that is when the quantizer and its configuration register.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Once either is imported, the tables of quantizers are there. As a rule the second is imported by the first.
MODELS = "transformers.modeling_utils"
QUANTIZERS = "transformers.quantizers"


def register() -> None:
    """Register the format with transformers: now if its models are imported already, else as soon as they are."""
    if MODELS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Waiting)]
    for name in ("config", "quantizer"):  # each registers its class as it is imported
        import_module(f"headshare.integrations.transformers.{name}")


class _Waiting:
    """A finder that finds what the others find, and registers the format once one of the two modules is imported."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in (MODELS, QUANTIZERS):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            _register_after(spec)
        return spec


def _register_after(spec: ModuleSpec) -> None:
    """Make the loader of this module register the format when the module has been run."""
    loader = spec.loader
    assert loader is not None
    run = loader.exec_module

    def run_and_register(module: ModuleType) -> None:
        run(module)
        if spec.name == MODELS or MODELS not in sys.modules:  # else the models are half imported, and will come here
            _register()

    loader.exec_module = run_and_register  # type: ignore[method-assign]  # of this one module's loader
