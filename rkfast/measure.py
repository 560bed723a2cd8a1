"""What a computation keeps for backward, and how much memory it needs at its peak."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def saved_bytes(compute: Callable[[], Any], exclude: Iterable[Tensor] = (), *, exclude_result: bool = False) -> int:
    """Bytes that autograd keeps while ``compute`` runs forward: each storage once, those of ``exclude`` not at all,
    nor, with ``exclude_result``, that of the Tensor it returns. Fake tensors count as those that they stand for."""
    excluded = {t.untyped_storage()._cdata for t in exclude}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in excluded:
            saved[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = compute()
    if exclude_result:
        saved.pop(result.untyped_storage()._cdata, None)
    total = sum(saved.values())
    del result  # until here it kept every storage alive, so that no address was counted for two
    return total


def peak_bytes(compute: Callable[[], Any], device: torch.device | str) -> int | None:
    """Peak memory of ``compute`` above what was in use before; None where it cannot be measured.

    CUDA: PyTorch's allocator. CPU: resident memory, on Linux. Call ``compute`` once before, so that what is allocated
    for good is there.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        compute()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that malloc holds free would hide what compute allocates
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = _status("VmRSS")
        compute()
        return _status("VmHWM") - before
    except (AttributeError, OSError, TypeError):
        return None


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return 1024 * int(found[1])
