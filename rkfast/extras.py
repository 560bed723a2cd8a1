"""Packages that only some commands need."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message says how to install it."""


def require(module: str, extra: str) -> Any:
    """Import ``module``, which ``pip install 'rkfast[extra]'`` brings.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Something else that is missing inside an installed module is another error.
        if error.name is None or error.name != module.split(".")[0]:
            raise
        raise MissingExtra(f"{error.name} is not installed; install it with: pip install 'rkfast[{extra}]'") from error
