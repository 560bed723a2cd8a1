"""A network that is looked at, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def as_it_was(model: nn.Module, *, evaluating: bool = False) -> Iterator[None]:
    """Buffers, modes and random numbers, whatever happens between; ``evaluating`` sets eval mode meanwhile."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [
        (module, name, b, None if b is None else b.clone()) for module in modules for name, b in module._buffers.items()
    ]
    devices = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(devices)):
            if evaluating:
                model.eval()
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                if buffer is not None and before is not None:
                    buffer.copy_(before)
                module._buffers[name] = buffer
