"""What a computation keeps and how much memory it takes at its peak, above what was there before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def saved_bytes(forward: Callable[[], object], parameters: list[Tensor]) -> int:
    """Bytes of the storages that ``forward`` saves for backward, each counted once, without those of ``parameters``."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = forward()
    del kept
    return sum(found.values())


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Largest number of bytes that ``step`` holds at once through PyTorch's allocator, its result included."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = step()
        del kept
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
