"""Packages that only some commands need."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message says how to install it."""


def require(module: str, extra: str) -> Any:
    """Import ``module``, which ``pip install 'rkfast[extra]'`` brings.

    Raises:
        MissingExtra: it is not installed.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(f"{package} is not installed; install it with: pip install 'rkfast[{extra}]'")
    return importlib.import_module(module)
