"""Swap fused blocks into a network, and take them out again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from rkfast.ops import checks
from rkfast.swap.dense import FusedDenseBlock, FusedTransition
from rkfast.swap.kind import Kind, Options, agrees, parts_of, restore, stock_class, swap, takes_more, unserved
from rkfast.swap.residual import FusedBlock
from rkfast.swap.sequential import FusedResNet, FusedSequential

KINDS: tuple[type[Kind], ...] = (FusedDenseBlock, FusedTransition, FusedBlock, FusedResNet, FusedSequential)
BY_CLASS = (FusedResNet, FusedSequential)
"""Kinds whose forward is known from the class."""


def fuse(
    model: nn.Module,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    memory: str = "speed",
    strict: bool = False,
) -> nn.Module:
    """Let fused kernels do the work of a network's blocks, in place.

    Served are dense blocks and transitions of DenseNet, residual blocks and the stem of ResNet, Wide ResNet, ResNeXt
    and SE-ResNet, by torchvision and timm and alike, also with torchvision's FrozenBatchNorm2d or nn.SyncBatchNorm;
    BatchNorm with a ReLU (and a 1x1 or 3x3 convolution) behind it in an nn.Sequential; and rkfast's own modules that
    were made with ``fused=False``. A block is known by its layers, and swapped where a small copy of it computes in
    float64 what the fused one does, gradients included; what such a block reads besides (attributes of its own that
    change later) is not followed.

    Only the class of these modules changes, to a subclass of what it was: parameters, keys of the state_dict,
    optimizers, hooks, copies and wrappers are what they were. What a call cannot serve (a hook on a layer inside, a
    dtype, torch.func, ...) goes through the stock forward; ``report`` tells.

    Args:
        model: a network; also one in DistributedDataParallel.
        filter_fn: ``filter_fn(module, name)`` is False for modules to leave alone.
        memory: "speed", or "min" to keep less for the backward and compute it again.
        strict: raise where a candidate that filter_fn lets through is not served.

    Returns:
        model.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or value.
        RuntimeError: strict, and not all candidates are served. The model is as before.
    """
    check_model(model)
    checks.memory(memory)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: expected a function of a module and its name, got {type(filter_fn).__name__}")
    chosen: list[tuple[nn.Module, type[Kind] | None]] = []
    refused: list[str] = []
    for name, module, kind, reason in survey(model):
        if filter_fn is not None and not filter_fn(module, name):
            continue
        if reason is not None:
            refused.append(f"{name or type(module).__name__}: {reason}")
        else:
            chosen.append((module, kind))
    if strict and refused:
        raise RuntimeError("strict: not all of the model can be fused: " + "; ".join(refused))
    for module, kind in chosen:
        fuse_one(module, kind, memory)
    return model


def fuse_one(module: nn.Module, kind: type[Kind] | None, memory: str) -> None:
    """Swap a module that ``survey`` has found; kind is None for rkfast's own."""
    if isinstance(module, Kind):
        module._rkfast.memory = memory
    elif kind is None:
        module.__dict__.setdefault("_rkfast_own", (module.fused, getattr(module, "memory", None)))
        module.fused = True  # type: ignore[assignment]
        if hasattr(module, "memory"):
            module.memory = memory  # type: ignore[assignment]
    else:
        swap(module, kind, Options(memory, parts=() if kind in BY_CLASS else parts_of(module)))


def unfuse(model: nn.Module) -> nn.Module:
    """Undo ``fuse``, in place: every module has the class that it had.

    Returns:
        model.

    Raises:
        TypeError: model is no module.
    """
    check_model(model)
    for module in model.modules():
        _unfuse(module)
    return model


def _unfuse(module: nn.Module) -> None:
    if isinstance(module, Kind):
        restore(module)
    elif "_rkfast_own" in module.__dict__:
        module.fused, memory = module.__dict__.pop("_rkfast_own")
        if memory is not None:
            module.memory = memory


@contextlib.contextmanager
def fused(model: nn.Module, **options: Any) -> Iterator[nn.Module]:
    """``with rkfast.fused(model): ...`` is ``fuse`` for a while; what was fused before stays so.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``fuse``.
    """
    check_model(model)
    before = {module for module in model.modules() if isinstance(module, Kind) or "_rkfast_own" in module.__dict__}
    kept = {module: module._rkfast.memory for module in before if isinstance(module, Kind)}
    modules = list(model.modules())  # of which some may be taken out meanwhile
    try:
        yield fuse(model, **options)
    finally:
        for module in modules:
            if module not in before:
                _unfuse(module)
            elif module in kept:
                module._rkfast.memory = kept[module]


def survey(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Kind] | None, str | None]]:
    """Every candidate: its name, its kind (None for rkfast's own) and why it cannot be served."""
    opaque: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if opaque and name.startswith(opaque):
            continue
        reason = unserved(module)
        if reason is not None and not isinstance(module, Kind):
            opaque = (*opaque, f"{name}." if name else "")
        if is_own(module):
            yield name, module, None, None
            continue
        for kind in KINDS:
            if isinstance(module, Kind) and not isinstance(module, kind):
                continue
            found = kind.reads(module)
            if found is None:
                continue
            reason = reason or takes_more(module)
            if reason is None and isinstance(found, str):
                reason = found
            if reason is None and kind not in BY_CLASS and not isinstance(module, Kind) and not agrees(module, kind):
                reason = f"{stock_class(module).__name__}.forward computes something else"
            if kind is FusedDenseBlock and reason is None:
                opaque = (*opaque, f"{name}." if name else "")  # a layer that concatenates would be a block itself
            yield name, module, kind, reason
            break


def is_own(module: nn.Module) -> bool:
    """Whether module is one of rkfast that has a stock form."""
    return type(module).__module__.startswith("rkfast.") and isinstance(getattr(module, "fused", None), bool)


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
