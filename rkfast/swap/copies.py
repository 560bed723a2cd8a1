"""What verify, tune and estimate share: the network inside its wrappers, copies of it, and the tensors of a call."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rkfast.swap.fuse import check_model, is_own, unfuse
from rkfast.swap.kind import Kind


def inside(model: nn.Module) -> nn.Module:
    """The network in DistributedDataParallel, DataParallel or torch.compile.

    Raises:
        TypeError: model is no module.
    """
    check_model(model)
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def has_fused(model: nn.Module) -> bool:
    return any(is_fused(module) for module in model.modules())


def is_fused(module: nn.Module) -> bool:
    return isinstance(module, Kind) or (is_own(module) and bool(module.fused))


def stock(model: nn.Module) -> nn.Module:
    """model, in place, without anything fused: also rkfast's own modules, of which ``unfuse`` leaves those fused that
    were made so."""
    unfuse(model)
    for module in model.modules():
        if is_own(module):
            module.fused = False  # type: ignore[assignment]
    return model


@contextlib.contextmanager
def chosen(module: nn.Module, fused: bool) -> Iterator[None]:
    """A candidate, of those that are swapped or rkfast's own, served by kernels or stock; what is inside it stays."""
    kept = module._rkfast.slower if isinstance(module, Kind) else module.fused
    try:
        if isinstance(module, Kind):
            module._rkfast.slower = None if fused else "not now"
        else:
            module.fused = fused  # type: ignore[assignment]
        yield
    finally:
        if isinstance(module, Kind):
            module._rkfast.slower = kept  # type: ignore[assignment]
        else:
            module.fused = kept  # type: ignore[assignment]


def tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in what a network takes or returns, and where it is."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{name}[{i}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name), f"{name}.{field.name}")


def accelerators(values: Iterable[Tensor]) -> list[int]:
    """CUDA devices, whose generators a copy may draw from."""
    return sorted({t.device.index for t in values if t.device.type == "cuda"})


@contextlib.contextmanager
def without_autocast(values: Iterable[Tensor]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in sorted({t.device.type for t in values}):
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
