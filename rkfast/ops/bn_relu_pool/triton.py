"""bn_relu_pool in Triton, channels_last: forward one pass once the moments are known; backward one that sums and one
that applies, both over windows and over what a last row or column of an odd size has left."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rkfast.ops import kernels, layout
from rkfast.ops.bn_relu_pool import reference
from rkfast.ops.bn_rk_sum.triton import fold, gradients_kernel
from rkfast.ops.channel_moments.reference import moments_dtype
from rkfast.ops.conv.reference import laid

# Layers differ in these; one compiled kernel serves them all. UNIT tells of the alignment of what is in tiles.
_jit = functools.partial(
    triton.jit,
    do_not_specialize=["total", "height", "width", "blocks", "share"],
    do_not_specialize_on_alignment=["x", "out", "grad", "dx", "x_pitch", "pitch", "channels"],
)


@_jit
def _forward_kernel(
    out,  # [N, C, H // 2, W // 2], dense
    x,  # [N, C, H, W]
    x_pitch,
    mean,  # [C]
    var,  # [C]
    weight,  # [C] or None
    bias,  # [C] or None
    eps,
    total,  # windows
    height,
    width,
    channels,
    blocks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    c = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    i = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dense = channels
    channels *= UNIT
    center, _, scale, shift = fold(mean, var, weight, bias, None, None, eps, 0, c, channels, 0, WIDE)
    exists = (i < total)[:, None] & (c < channels)[None, :]
    row = i // (width // 2)
    first = (row // (height // 2) * height + row % (height // 2) * 2) * width + i % (width // 2) * 2
    acc = tl.zeros((ROWS, COLS), WIDE)
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            v = kernels.load(x, x_pitch, (first + down * width + right)[:, None], c[None, :], exists, UNIT, WIDE)
            acc += kernels.relu(kernels.normalise(v, center, scale, shift))
    kernels.store(out, dense, acc * 0.25, i[:, None], c[None, :], exists, UNIT)


@_jit
def _backward_kernel(
    grad,  # [N, C, H // 2, W // 2]
    pitch,
    x,  # [N, C, H, W]
    x_pitch,
    mean,  # [C]
    var,  # [C]
    weight,  # [C] or None
    bias,  # [C] or None
    eps,
    sums,  # [programs, C] or None: sums of g'
    projections,  # [programs, C] or None: sums of g' * x_hat
    slope,  # [C] or None
    offset,  # [C] or None
    dx,  # [N, C, H, W], dense, or None
    total,  # windows, and parts of some at the edges
    height,
    width,
    channels,
    blocks,
    share,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    c = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    program = (tl.program_id(0) // blocks).to(tl.int64)
    dense = channels
    channels *= UNIT
    center, rstd, scale, shift = fold(mean, var, weight, bias, None, None, eps, 0, c, channels, 0, WIDE)
    if slope is not None:
        along_x = kernels.per_channel(slope, c, channels, 0)
        constant = kernels.per_channel(offset, c, channels, 0)
    s0 = tl.zeros((ROWS, COLS), WIDE)
    s1 = tl.zeros((ROWS, COLS), WIDE)
    high = (height + 1) // 2
    wide = (width + 1) // 2
    for t in range(share):
        i = (program * share + t) * ROWS + tl.arange(0, ROWS)
        line, column = i // wide, i % wide * 2
        image, row = line // high, line % high * 2
        inside = (i < total)[:, None] & (c < channels)[None, :]
        pooled = inside & ((row + 1 < height) & (column + 1 < width))[:, None]
        window = (image * (height // 2) + row // 2) * (width // 2) + column // 2
        g = 0.25 * kernels.load(grad, pitch, window[:, None], c[None, :], pooled, UNIT, WIDE)
        first = (image * height + row) * width + column
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                exists = inside & ((row + down < height) & (column + right < width))[:, None]
                at = (first + down * width + right)[:, None]
                v = kernels.load(x, x_pitch, at, c[None, :], exists, UNIT, WIDE)
                opened = tl.where(kernels.normalise(v, center, scale, shift) <= 0, 0.0, g)
                if sums is not None:
                    s0 += opened
                    s1 += tl.where(pooled, opened * (v - center), 0.0)
                if dx is not None:
                    d = scale * opened
                    if slope is not None:
                        d += along_x * (v - center) + constant
                    kernels.store(dx, dense, d, at, c[None, :], exists, UNIT)
    if sums is not None:
        at = program * channels + c
        tl.store(sums + at, tl.sum(s0, 0), mask=c < channels)
        tl.store(projections + at, tl.sum(s1 * rstd, 0), mask=c < channels)


class _Cut(NamedTuple):
    """How windows and channels are cut into tiles; channels and pitches in units of ``unit`` elements."""

    unit: int
    rows: int
    cols: int
    blocks: int

    def launch(self, kernel: Any, lead: Tensor, tiles: int, *args: Any) -> None:
        kernels.launch(
            kernel, lead, tiles * self.blocks, *args, ROWS=self.rows, COLS=self.cols, UNIT=self.unit,
            WIDE=kernels.WIDE[moments_dtype(lead.dtype)], num_warps=kernels.WARPS,
        )  # fmt: skip


def _cut(x: Tensor, *others: Tensor) -> _Cut:
    channels = x.shape[1]
    sizes = [layout.pitches(t, True)[1] for t in (x, *others)]
    unit = kernels.unit_of(x.element_size(), kernels.begin_of([x, *others]), channels, *sizes)
    cols = min(128, max(8, triton.next_power_of_2(channels)))
    rows = 32 * kernels.WARPS * (kernels.THREAD_BYTES // x.element_size()) // cols
    return _Cut(unit, rows, cols, triton.cdiv(channels, cols))


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    channels_last: bool,
    eps: float,
) -> Tensor:
    if x.numel() == 0:
        return reference.forward(x, weight, bias, mean, var, channels_last, eps)
    dtype = moments_dtype(x.dtype)
    x = layout.conform(x, True)
    n, c, height, width = x.shape
    shape = (n, c, height // 2, width // 2)
    out = x.new_empty_strided(shape, layout.strides(shape, True))
    cut = _cut(x, out)
    total = n * shape[2] * shape[3]
    cut.launch(
        _forward_kernel, x, triton.cdiv(total, cut.rows), out, x, layout.pitches(x, True)[1] // cut.unit,
        *(kernels.vector(v, dtype) for v in (mean, var, weight, bias)), kernels.scalar(eps, dtype), total, height,
        width, c // cut.unit, cut.blocks,
    )  # fmt: skip
    return laid(out, channels_last)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    channels_last: bool,
    batch_stats: bool,
    eps: float,
    need_x: bool,
    need_affine: bool,
) -> list[Tensor]:
    if x.numel() == 0:
        return reference.backward(
            grad, x, weight, bias, mean, var, channels_last, batch_stats, eps, need_x, need_affine
        )  # fmt: skip
    kernels.compile_ahead(
        ("bn_relu_pool_backward", weight is None, bias is None, batch_stats, need_x, need_affine), backward,
        grad, x, weight, bias, mean, var, channels_last, batch_stats, eps, need_x, need_affine,
    )  # fmt: skip
    dtype = moments_dtype(x.dtype)
    grad, x = layout.conform(grad, True), layout.conform(x, True)
    n, c, height, width = x.shape
    dx = layout.empty(x, True) if need_x else None
    cut = _cut(x, grad, *([] if dx is None else [dx]))
    total = n * ((height + 1) // 2) * ((width + 1) // 2)
    tiles = triton.cdiv(total, cut.rows)
    vectors = [kernels.vector(v, dtype) for v in (mean, var, weight, bias)]
    given = (
        grad, layout.pitches(grad, True)[1] // cut.unit, x, layout.pitches(x, True)[1] // cut.unit, *vectors,
        kernels.scalar(eps, dtype),
    )  # fmt: skip

    def launch(share: int, *written: Tensor | None) -> None:
        programs = triton.cdiv(tiles, share)
        cut.launch(
            _backward_kernel, x, programs, *given, *written, total, height, width, c // cut.unit, cut.blocks, share
        )  # fmt: skip

    affine: list[Tensor] = []
    corrections: list[Tensor] = []
    if need_affine or (need_x and batch_stats):
        share = triton.cdiv(tiles, max(1, kernels.PROGRAMS // cut.blocks))
        sums, projections = (x.new_empty((triton.cdiv(tiles, share), c), dtype=dtype) for _ in range(2))
        launch(share, sums, projections, None, None, None)
        affine = [x.new_empty(c, dtype=dtype) for _ in range(2)]
        corrections = [x.new_empty(c, dtype=dtype) for _ in range(2 if need_x and batch_stats else 0)]
        kernels.reduce(
            gradients_kernel, sums, 1, sums.shape[0], c, sums, projections, vectors[2], vectors[3], None, vectors[1],
            kernels.scalar(eps, dtype), kernels.scalar(x.numel() / c, dtype), *affine, None,
            *(corrections or (None, None)),
        )  # fmt: skip
    if dx is not None:
        launch(1, None, None, *(corrections or (None, None)), dx)
    return [*([] if dx is None else [laid(dx, channels_last)]), *(affine if need_affine else [])]
