"""Modules one behind the other, and which of them are one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from rkfast.nn.norm import (
    activated,
    batch_norm_relu,
    batch_norm_relu_conv,
    batch_norm_sum,
    fusible,
    plain_conv,
    reads_moments,
    takes_relu,
)
from rkfast.nn.pool import max_pool
from rkfast.nn.step import asks_for_moments, with_moments
from rkfast.ops import Moments


def fused_length(modules: Sequence[nn.Module]) -> int:
    """How many of the first modules are one op: BatchNorm, ReLU and a convolution that bn_relu_conv serves."""
    if not modules:
        return 0
    length = 1 if activated(modules[0]) else 2 if fusible(modules[0]) and _relu_at(modules, 1) else 0
    return length + 1 if length and len(modules) > length and plain_conv(modules[length]) else length


def _relu_at(modules: Sequence[nn.Module], i: int) -> bool:
    return len(modules) > i and takes_relu(modules[i])


def chain(modules: Sequence[nn.Module], x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> Tensor:
    """``modules[-1](... modules[0](x))``, with BatchNorm, ReLU and 1x1 or 3x3 convolution as one op where nobody
    listens between them, and moments that one module leaves for the next.

    call: runs a module that is no part of a fused op; None calls it, with moments where both sides know them.
    """
    return chain_with_moments(modules, x, call=call)[0]


def chain_with_moments(
    modules: Sequence[nn.Module],
    x: Tensor,
    moments: Moments | None = None,
    *,
    return_moments: bool = False,
    call: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Moments | None]:
    """``chain``, taking x's moments if they are known, and leaving those of the result if asked for (and known)."""
    while modules:
        head = modules[0]
        length = fused_length(modules)
        rest = modules[max(length, 1) :]
        wanted = reads(rest) if rest else return_moments
        if length and isinstance(modules[length - 1], nn.Conv2d):
            x, moments = batch_norm_relu_conv(head, modules[length - 1], x, moments, return_moments=wanted)
        elif length:
            x, moments = batch_norm_relu(head, x, moments), None
        elif type(head) is nn.MaxPool2d:
            x, moments = max_pool(head, x, fused=True), None
        elif fusible(head):
            x, moments = batch_norm_sum(head, x, moments=moments), None
        elif call is not None:
            x, moments = call(head, x), None
        elif moments is not None and asks_for_moments(head) and not hasattr(head, "forward_with_moments"):
            x, moments = head(x, moments), None
        else:
            x, moments = with_moments(head, x, moments, return_moments=wanted)
        modules = rest
    return x, moments


def reads(modules: Sequence[nn.Module]) -> bool:
    """Whether the first of them makes use of its input's moments."""
    if fused_length(modules) or fusible(modules[0]):
        return reads_moments(modules[0])
    return asks_for_moments(modules[0])
