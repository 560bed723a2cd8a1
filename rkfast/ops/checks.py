"""What every op asks of its arguments, asked once, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rkfast import native
from rkfast.ops import layout

MAX_TERMS = 16
MAX_DIMS = 5

# Bits of what ``survey`` answers, as in csrc/cpu/host.h.
UNIFORM, CHANNELS_LAST, NEEDS_GRAD, PLAIN = 1, 2, 4, 8

_survey: Callable[..., int] | None = None


def survey(tensors: Sequence[object], vectors: Sequence[object], gates: Sequence[object]) -> int:
    """All that the checks below ask, in one call of the C++ extension; a call costs as much as one check in Python.

    0 means nothing is known, and the checks are to be asked one by one: they name what is wrong.
    """
    global _survey
    if torch.compiler.is_compiling():
        return 0
    if _survey is None:
        _survey = native.cpu().survey if native.cpu_reason() is None else lambda *_: 0
    try:
        return _survey(tensors, vectors, gates)
    except TypeError:
        return 0


def activation(x: object, name: str) -> Tensor:
    """x as a floating tensor [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}; convert it with .float()")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}; convert it with .to_dense()")
    if not 2 <= x.dim() <= MAX_DIMS:
        raise ValueError(f"{name}: expected [N, C] to [N, C, D, H, W] (2 to {MAX_DIMS} dimensions), got {x.dim()}")
    return x


def like(x: object, reference: Tensor, name: str, reference_name: str) -> None:
    """x has the shape, dtype and device of the tensor it is combined with."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.shape != reference.shape:
        raise ValueError(
            f"{name}: shape {list(x.shape)} differs from {reference_name}'s {list(reference.shape)}; "
            "expand it first, the op does not broadcast"
        )
    if x.dtype != reference.dtype:
        raise TypeError(
            f"{name}: dtype {x.dtype} differs from {reference_name}'s {reference.dtype}; convert one of them"
        )
    if x.device != reference.device:
        raise ValueError(
            f"{name}: device {x.device} differs from {reference_name}'s {reference.device}; move one of them"
        )


def vector(v: object, x: Tensor, name: str, per_sample: bool = False) -> None:
    """v is None or a floating vector [C] (or [N, C] where a factor per sample is supported) on x's device."""
    if v is None:
        return
    if not isinstance(v, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(v).__name__}")
    if not v.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {v.dtype}")
    shape = tuple(v.shape)
    channels = (x.shape[1],)
    samples = (x.shape[0], x.shape[1])
    if shape != channels and not (per_sample and shape == samples):
        wanted = f"[{channels[0]}]" + (f" or {list(samples)}" if per_sample else "")
        raise ValueError(f"{name}: shape {list(shape)} does not fit; expected one value per channel, {wanted}")
    if v.device != x.device:
        raise ValueError(f"{name}: device {v.device} differs from the input's {x.device}; move one of them")


def coefficients(coeffs: Sequence[float], terms: Sequence[object]) -> list[float]:
    """coeffs as floats, one per term."""
    try:
        values = [float(c) for c in coeffs]
    except (TypeError, ValueError) as error:
        raise TypeError(f"coeffs: expected a sequence of floats, got {coeffs!r} ({error})") from None
    if len(values) != len(terms):
        raise ValueError(f"coeffs: {len(values)} coefficients for {len(terms)} terms; give one per term")
    return values


def promoted(tensors: list[Tensor]) -> list[Tensor]:
    """Under autocast, tensors of different floating dtypes in the widest of them, as eager's sum would have it."""
    if all(isinstance(t, Tensor) for t in tensors) and torch.is_autocast_enabled(tensors[0].device.type):
        widest = tensors[0].dtype
        for t in tensors:
            if t.is_floating_point():
                widest = torch.promote_types(widest, t.dtype)
        return [t.to(widest) if t.is_floating_point() else t for t in tensors]
    return tensors


def slot(out: object, x: Tensor, inputs: Sequence[Tensor], needs_grad: bool) -> bool:
    """Whether out is laid out channels_last; raises where it cannot be written."""
    like(out, x, "out", "the result")
    assert isinstance(out, Tensor)
    if needs_grad:
        raise RuntimeError(
            "out: writing into a given tensor is not differentiable, and an argument requires grad; "
            "call it under torch.no_grad(), or without out"
        )
    channels_last = layout.is_channels_last(out)
    if not layout.is_rows(out, channels_last):
        raise ValueError(
            f"out: strides {out.stride()} are neither dense nor a channel slice of a dense tensor; "
            "give buffer[:, start:stop] of a contiguous or channels_last buffer"
        )
    for t in inputs:
        if layout.overlaps(out, t, channels_last):
            raise ValueError("out: overlaps an input in memory without being the same slice of it; give another slot")
    return channels_last
