"""Fused kernels in Lightning: ``Trainer(callbacks=[rkfast.lightning.FuseCallback()])``.

Importing this raises MissingExtra where neither lightning nor pytorch_lightning is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

from rkfast.extras import require
from rkfast.swap import fuse, fused

_OLD = importlib.util.find_spec("lightning") is None and importlib.util.find_spec("pytorch_lightning") is not None
Callback: Any = require("pytorch_lightning" if _OLD else "lightning.pytorch", "lightning").Callback


class FuseCallback(Callback):
    """Fuses the LightningModule in place when a fit starts.

    Args:
        unfuse: undo it when the fit ends, also by an error; what was fused before stays so.
        options: of ``rkfast.fuse``: filter_fn, memory, strict.
    """

    def __init__(self, *, unfuse: bool = False, **options: Any) -> None:
        self.unfuse, self.options = unfuse, options
        self._undo = contextlib.ExitStack()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.unfuse:
            self._undo.enter_context(fused(pl_module, **self.options))
        else:
            fuse(pl_module, **self.options)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._undo.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._undo.close()
