"""What our operators count in torch.utils.flop_counter, whoever imports it and whenever.

Importing it here would cost every user its time, and where Triton is installed Triton's too. But a FlopCounterMode
copies the table of formulas when it is made, so that one made before our first call would never see what that call
registers. So formulas enter the table at once where the module is there, and otherwise at the end of its import.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"

_formulas: dict[Any, Callable[..., int]] = {}


def register(op: Any, formula: Callable[..., int]) -> None:
    """Count ``formula(*args, out_shape=...)`` for each call of op, with shapes in place of tensors.

    Args:
        op: a packet, such as ``torch.ops.rkfast.dense_block``.
        formula: 2 for each multiplication and addition, as torch counts.
    """
    if COUNTER in sys.modules:
        # By name, which waits for an import that another thread is still at.
        importlib.import_module(COUNTER).register_flop_formula(op)(formula)
        return
    _formulas[op] = formula
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


class _AtItsImport(importlib.abc.MetaPathFinder):
    """Leaves the finding to the other finders, and goes when the module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                while _formulas:
                    op, formula = _formulas.popitem()
                    module.register_flop_formula(op)(formula)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            # Of this instance, which stays all else that tools ask of a module's loader.
            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _AtItsImport()
