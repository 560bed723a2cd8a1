"""Fused kernels in Hugging Face's Trainer: ``Trainer(..., callbacks=[rkfast.transformers.FuseCallback()])``.

With accelerate alone, call ``rkfast.fuse(model)`` before or after ``accelerator.prepare``. Importing this raises
MissingExtra where transformers is not installed.
"""

from __future__ import annotations

import contextlib
from typing import Any

from rkfast.extras import require
from rkfast.swap import fuse, fused

TrainerCallback: Any = require("transformers", "transformers").TrainerCallback


class FuseCallback(TrainerCallback):
    """Fuses the model in place when a training starts.

    Args:
        unfuse: undo it when the training ends; what was fused before stays so.
        options: of ``rkfast.fuse``: filter_fn, memory, strict.
    """

    def __init__(self, *, unfuse: bool = False, **options: Any) -> None:
        self.unfuse, self.options = unfuse, options
        self._undo = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if self.unfuse:
            self._undo.enter_context(fused(model, **self.options))
        else:
            fuse(model, **self.options)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._undo.close()
