"""Python imports this at its start where this folder is on PYTHONPATH: in recovery runs alone.

It lets tests/planned_faults.py wrap the objectives of every process of the run, the training
processes included, which a test cannot reach otherwise: the product has no hook for faults.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WRAPPED = "elastic.objective"


class _Finder(MetaPathFinder):
    """Finds the objectives once, as everybody does, and has them wrapped when they are loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _WRAPPED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_wrap(module: ModuleType) -> None:
            load(module)
            import planned_faults

            planned_faults.wrap(module)

        spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]  # this one object
        return spec


sys.meta_path.insert(0, _Finder())
