"""The two memory layouts of the kernels, and the one place that brings tensors into them.

A tensor [N, C, *spatial] with P positions per sample is seen as ``outer x inner x length`` elements, the last of them
with stride 1:

- contiguous: N x C x P, a row is one channel of one sample;
- channels_last, and where P = 1: N x P x C, a row is one position of one sample.

Rows are evenly spaced, so that a slice of the channels of a larger tensor (a slot) is served as it is.
csrc/common/layout.h says the same to the C++ kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x is laid out with its channels innermost. One that is both (C = 1 or P = 1) counts as contiguous."""
    return not x.is_contiguous() and x.dim() > 2 and x.stride(1) == 1 and x.shape[1] > 1


def _dense(sizes: Sequence[int], strides: Sequence[int], innermost: int) -> bool:
    """Whether the positions of a sample are evenly spaced, ``innermost`` apart."""
    expected = innermost
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def is_rows(x: Tensor, channels_last: bool) -> bool:
    """Whether x is dense, or a channel slice of something dense, in the layout asked for."""
    n, c, *spatial = x.shape
    stride_n, stride_c, *strides = x.stride()
    positions = math.prod(spatial)
    if x.numel() == 0:
        return True
    if channels_last:
        if positions == 1:
            return (c == 1 or stride_c == 1) and (n == 1 or stride_n >= c)
        pitch = next(stride for size, stride in zip(reversed(spatial), reversed(strides), strict=True) if size != 1)
        return (
            (c == 1 or stride_c == 1)
            and pitch >= c
            and _dense(spatial, strides, pitch)
            and (n == 1 or stride_n == positions * pitch)
        )
    return _dense(spatial, strides, 1) and (c == 1 or stride_c == positions) and (n == 1 or stride_n >= c * positions)


def conform(x: Tensor, channels_last: bool) -> Tensor:
    """x itself where its rows are evenly spaced in the layout asked for, else a dense copy of it in that layout."""
    if is_rows(x, channels_last):
        return x
    return empty(x, channels_last).copy_(x)


def empty(x: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """A dense tensor of x's shape in the layout asked for."""
    return x.new_empty_strided(x.shape, strides(x.shape, channels_last), dtype=dtype or x.dtype)  # batched where x is


def strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Strides of a dense tensor of this shape."""
    order = [0, *range(2, len(shape)), 1] if channels_last else list(range(len(shape)))
    result = [0] * len(shape)
    step = 1
    for axis in reversed(order):
        result[axis] = step
        step = step * max(shape[axis], 1)
    return tuple(result)


def by_channel(x: Tensor, channels_last: bool) -> bool:
    """Whether rows run along the channels. With one position a channel either layout is the same memory."""
    return channels_last or math.prod(x.shape[2:]) == 1


def rows(x: Tensor, channels_last: bool) -> tuple[int, int, int]:
    """(outer, inner, length) of x in this layout."""
    n, c, *spatial = x.shape
    positions = math.prod(spatial)
    return (n, positions, c) if by_channel(x, channels_last) else (n, c, positions)


def count(x: Tensor) -> int:
    """Values per channel, N * P."""
    return x.numel() // max(x.shape[1], 1)


def pitches(x: Tensor, channels_last: bool) -> tuple[int, int]:
    """Elements between neighbouring samples and between neighbouring rows of a conforming x."""
    n, c, *spatial = x.shape
    positions = math.prod(spatial)
    if positions == 1:
        row = x.stride(0) if n > 1 else c
        return row, row
    if not channels_last:
        return (x.stride(0) if n > 1 else c * positions), positions
    row = next(stride for size, stride in zip(reversed(spatial), reversed(x.stride()[2:]), strict=True) if size != 1)
    return positions * row, row


def mask_shape(x: Tensor, channels_last: bool) -> tuple[int, int]:
    """Shape of x's ReLU mask: one bit per element, uint8 [outer * inner, ceil(length / 8)], lowest bit first."""
    outer, inner, length = rows(x, channels_last)
    return outer * inner, (length + 7) // 8


def overlaps(out: Tensor, x: Tensor, channels_last: bool) -> bool:
    """Whether writing out could change elements of x that are read later: shared memory, unless it is the same slice or
    another channel slice of the same buffer."""
    if torch.compiler.is_compiling():  # there every write is one to a tensor of its own
        return False
    if out.numel() == 0 or x.numel() == 0 or out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        return False
    apart = int(out.storage_offset()) - int(x.storage_offset())
    if x.dtype != out.dtype:
        return True
    reach = [sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in (out, x)]
    if not -reach[0] <= apart <= reach[1]:
        return False
    if x.shape == out.shape and x.stride() == out.stride():
        if apart == 0:
            return False
        outer, row = pitches(out, channels_last)
        span, width = (row, out.shape[1]) if by_channel(out, channels_last) else (outer, out.shape[1] * row)
        apart = abs(apart) % span
        return not (width <= apart <= span - width)
    return True


def outputs_last(weight: Tensor) -> Tensor:
    """A convolution's weight [K, C, n, m] that lies in memory as [n, m, C, K], as the C++ kernels multiply by it;
    others they turn in every call."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
