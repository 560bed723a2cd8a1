"""1x1 convolutions in Triton that take in what stands around them: they normalise what they read and take the moments
of what they write, and go back through BatchNorm and ReLU on both sides.

Rows are pixels. What is read are up to two ranges of the channels of a tensor, where a buffer has slots; what is
written is dense, and its number of channels is the width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkfast.ops import kernels, launches, layout
from rkfast.ops.channel_moments.reference import moments_dtype
from rkfast.ops.launches import Cut
from rkfast.ops.rk_sum import triton as rk_sum

# Layers differ in these; one compiled kernel serves them all. UNIT tells of the alignment of what is in tiles.
_jit = functools.partial(
    triton.jit,
    do_not_specialize=["rows", "width", "pitch", "begin0", "size0", "begin1", "size1", "share", "programs"],
    do_not_specialize_on_alignment=["x", "total", "other", "grad", "mid", "out"],
)
_PROGRAMS = 1024  # that share the rows: enough for any GPU, few enough for a cheap second stage
Reads = Sequence[tuple[int, int]]  # begin and end of both ranges, the second one empty where one is enough


class _Plan(NamedTuple):
    """How the kernels see one product, channels in units of ``unit`` elements."""

    rows: int
    width: int
    pitch: int
    ranges: tuple[int, ...]  # begin and size of both that are read
    unit: int
    blocks: Cut

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size * self.unit for size in self.ranges[1::2])

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.rows, self.blocks.rows)

    def column_blocks(self, side: int) -> int:
        """How many blocks of this many channels are read; none lies in both ranges."""
        return sum(triton.cdiv(size, side) for size in self.sizes)

    @property
    def width_blocks(self) -> int:
        return triton.cdiv(self.width * self.unit, self.blocks.width)

    def split(self, across: int) -> tuple[int, int]:
        """(tiles of rows that a program takes, how many programs share the rows), where ``across`` share the rest."""
        share = triton.cdiv(self.tiles, max(1, _PROGRAMS // across))
        return share, triton.cdiv(self.tiles, share)

    def launch(self, kernel: Any, lead: Tensor, grid: int, *args: Any, **constants: Any) -> None:
        rows, width, read, warps, stages = self.blocks
        kernels.launch(
            kernel, lead, grid, *args, BLOCK_ROWS=rows, BLOCK_WIDTH=width, BLOCK_READ=read, UNIT=self.unit,
            STAGES=stages, PRECISION=_precision(), **constants, num_warps=warps,
        )  # fmt: skip


def _plan(kernel: str, x: Tensor, reads: Reads, width: int, *tiled: Tensor) -> _Plan:
    """x: of which channels are read, or what is like it; tiled: what the kernel reads and writes besides."""
    (begin0, end0), (begin1, end1) = reads
    pitch = layout.pitches(x, True)[1]
    sizes = (width, pitch, begin0, end0 - begin0, begin1, end1 - begin1)
    unit = kernels.unit_of(x.element_size(), kernels.begin_of([x, *tiled]), *sizes)
    n, *others = (size // unit for size in sizes)
    rows = layout.count(x)
    widest = max(end0 - begin0, end1 - begin1)
    blocks = launches.cut(kernel, _device_name(kernels.device_of(x)), x.element_size(), unit, rows, width, widest)
    return _Plan(rows, n, others[0], tuple(others[1:]), unit, blocks)


def whole(x: Tensor) -> Reads:
    """All channels of x."""
    return ((0, x.shape[1]), (0, 0))


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _precision() -> str:
    """Of float32 products: that of the convolution they stand for."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Meta tensors, for which kernels can be compiled, know no autocast.
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Norm(NamedTuple):
    """A BatchNorm as the kernels take it; vectors in the dtype of moments."""

    mean: Tensor  # of all channels of x, or of what is read
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    own: bool  # mean and var are given of what is read

    def range(self, first: int, begin: int, size: int) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """(weight, bias, mean, var) of the columns from ``first`` on, which are the channels from ``begin`` on."""
        at = first if self.own else begin
        vectors = (self.weight, first), (self.bias, first), (self.mean, at), (self.var, at)
        return tuple(None if v is None else v.narrow(0, start, size) for v, start in vectors)  # type: ignore[return-value]


def as_norm(norm: Sequence[Tensor | None], mean: Tensor, var: Tensor, eps: float) -> Norm:
    """norm: weight, bias, and the mean and var that take the place of these moments, or None."""
    weight, bias, own_mean, own_var = (kernels.vector(v, mean.dtype) for v in norm)
    if own_mean is None or own_var is None:
        return Norm(mean, var, weight, bias, eps, False)
    return Norm(own_mean, own_var, weight, bias, eps, True)


class Incoming(NamedTuple):
    """The gradient of step * BN(dropout(product)) or, with relu, of relu(BN(dropout(product))), and what leads from
    there to that of the product, in the order of the kernels' arguments. Without mid grad is that already."""

    grad: Tensor
    mid: Tensor | None = None  # dropout(product)
    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    step: Tensor | None = None
    eps: float = 1.0
    dweight: Tensor | None = None  # over all that count counts; None where mean and var are no moments
    dbias: Tensor | None = None
    count: float = 1.0
    keep: Tensor | None = None
    keep_scale: float = 1.0
    relu: bool = True

    @property
    def tiled(self) -> list[Tensor]:
        return [t for t in self[:2] if t is not None]


@triton.jit
def _columns(block, begin0, size0, begin1, size1, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """The channels in the buffer of a block of what is read, their columns among that, and which of them exist. A block
    lies in one range."""
    blocks = tl.cdiv(size0 * UNIT, BLOCK)
    second = block >= blocks
    at = (block - tl.where(second, blocks, 0)) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.where(second, begin1, begin0) * UNIT + at
    column = tl.where(second, size0, 0) * UNIT + at
    return channel, column, at < tl.where(second, size1, size0) * UNIT


@triton.jit
def _fold(mean, var, weight, bias, eps, channel, column, exists, OWN: tl.constexpr):
    """(mean, rstd, scale, shift) with BN(x) = scale * (x - mean) + shift; zeros where there is no BN."""
    if mean is None:  # Triton 3.6 returns no None
        zero = tl.zeros((1,), tl.float32)
        return zero, zero, zero, zero
    else:
        at = column if OWN else channel
        center = tl.load(mean + at, mask=exists, other=0.0)
        rstd = tl.rsqrt(tl.load(var + at, mask=exists, other=1.0) + eps)
        scale = rstd
        shift = tl.zeros_like(rstd)
        if weight is not None:
            scale = scale * tl.load(weight + column, mask=exists, other=0.0)
        if bias is not None:
            shift = tl.load(bias + column, mask=exists, other=0.0)
        return center[None, :], rstd, scale[None, :], shift[None, :]


@triton.jit
def _rows(tile, rows, BLOCK: tl.constexpr):
    """The first row of a tile, in 64 bits; its rows counted from there, which of them exist, and how many."""
    start = (tl.full((), 0, tl.int64) + tile) * BLOCK
    row = tl.arange(0, BLOCK)
    count = tl.minimum(rows - start, BLOCK).to(tl.int32)
    return start, row[:, None], (row < count)[:, None], count


@triton.jit
def _read(x, at, there, center, scale, shift, UNIT: tl.constexpr):
    """relu(BN(x)) of a tile, as stored; and the tile itself."""
    v = tl.load(kernels.tile(x, at, UNIT), mask=there, other=0.0).to(tl.float32)
    return kernels.stored(kernels.relu(kernels.normalise(v, center, scale, shift)), x), v


@triton.jit
def _activation(x, mean, at, there, center, scale, shift, UNIT: tl.constexpr):
    """What a product reads: relu(BN(x)) of a tile as stored, or where there is no BN the tile."""
    if mean is None:
        return tl.load(kernels.tile(x, at, UNIT), mask=there, other=0.0)
    else:
        return _read(x, at, there, center, scale, shift, UNIT)[0].to(x.dtype.element_ty)


@triton.jit
def _fold_backward(mean, var, weight, bias, step, eps, dweight, dbias, count, n, exists):
    """(mean, scale, shift) of _fold, the factor of the gradient, and (slope, offset) of what the moments' dependence on
    x adds: slope * (x - mean) + offset. Zeros where there are none."""
    zero = tl.zeros((1,), tl.float32)
    if mean is None:
        return zero, zero, zero, zero, zero, zero
    else:
        center, rstd, scale, shift = _fold(mean, var, weight, bias, eps, n, n, exists, True)
        factor = scale
        if step is not None:
            factor = scale * tl.load(step + n, mask=exists, other=0.0)[None, :]
        if dweight is None:
            return center, scale, shift, factor, zero, zero
        else:
            left = -scale / count
            slope = left * (rstd * tl.load(dweight + n, mask=exists, other=0.0))[None, :]
            return center, scale, shift, factor, slope, left * tl.load(dbias + n, mask=exists, other=0.0)[None, :]


@triton.jit
def _product_gradient(
    grad, mid, mean, dweight, keep, keep_scale, start, at, there, center, scale, shift, factor, slope, offset,
    RELU: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of the product, from that of what was made of it."""
    g = tl.load(kernels.tile(grad + start, at, UNIT), mask=there, other=0.0)
    if mean is None:
        return g
    else:
        d = g.to(tl.float32)
        if RELU:
            act, v = _read(mid + start, at, there, center, scale, shift, UNIT)
            d = tl.where(act <= 0, 0.0, d)
        elif dweight is not None:
            v = tl.load(kernels.tile(mid + start, at, UNIT), mask=there, other=0.0).to(tl.float32)
        d = factor * d
        if dweight is not None:
            d += slope * (v - center) + offset
        if keep is not None:
            d = tl.where(tl.load(keep + start + at, mask=there, other=0) != 0, d * keep_scale, 0.0)
        return tl.where(there, d, 0.0).to(g.dtype)


@_jit
def _product_kernel(
    out,  # [rows, width]
    x,  # [rows, channels], channels at pitch
    conv,  # [width, read]
    mean,  # [channels], or [read] with OWN; None where x itself is read
    var,
    weight,  # [read] or None
    bias,
    eps,
    mean2,  # [width] or None: out is relu(BN(product)) by these
    var2,
    weight2,
    bias2,
    eps2,
    keep,  # [rows, width] or None
    keep_scale,
    partials,  # [3, tiles, width] or None
    rows,
    width,
    pitch,
    begin0,
    size0,
    begin1,
    size1,
    share,
    OWN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_READ: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    width = width * UNIT
    read = (size0 + size1) * UNIT
    column_blocks = tl.cdiv(size0 * UNIT, BLOCK_READ) + tl.cdiv(size1 * UNIT, BLOCK_READ)
    width_blocks = tl.cdiv(width, BLOCK_WIDTH)
    program = tl.program_id(0) // width_blocks
    n = (tl.program_id(0) % width_blocks) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    n_exists = n < width
    for tile in range(program * share, tl.minimum((program + 1) * share, tl.cdiv(rows, BLOCK_ROWS))):
        start, row, row_exists, count = _rows(tile, rows, BLOCK_ROWS)
        v = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
        for block in tl.range(0, column_blocks, num_stages=STAGES):
            channel, column, exists = _columns(block, begin0, size0, begin1, size1, BLOCK_READ, UNIT)
            center, rstd, scale, shift = _fold(mean, var, weight, bias, eps, channel, column, exists, OWN)
            at = row * (pitch * UNIT) + channel[None, :]
            there = row_exists & exists[None, :]
            act = _activation(x + start * (pitch * UNIT), mean, at, there, center, scale, shift, UNIT)
            w = tl.load(
                conv + (n[None, :] * read + column[:, None]), mask=exists[:, None] & n_exists[None, :], other=0.0
            )
            v = tl.dot(act, w, v, input_precision=PRECISION)
        there = row_exists & n_exists[None, :]
        at = row * width + n[None, :]
        if keep is not None:
            v = tl.where(tl.load(keep + start * width + at, mask=there, other=0) != 0, v * keep_scale, 0.0)
        v = kernels.stored(v, out)
        if partials is not None:
            # Of each tile: to merge them here would keep more vectors than there are registers.
            count = count.to(tl.float32)
            middle = tl.sum(tl.where(row_exists, v, 0.0), 0) / count
            apart = tl.where(row_exists, v - middle[None, :], 0.0)
            moments = partials + ((tl.full((), 0, tl.int64) + tile) * width + n)
            plane = tl.cdiv(rows, BLOCK_ROWS).to(tl.int64) * width
            tl.store(moments, tl.zeros_like(middle) + count, mask=n_exists)
            tl.store(moments + plane, middle, mask=n_exists)
            tl.store(moments + 2 * plane, tl.sum(apart * apart, 0), mask=n_exists)
        if mean2 is not None:
            center2, rstd2, scale2, shift2 = _fold(mean2, var2, weight2, bias2, eps2, n, n, n_exists, True)
            v = kernels.relu(kernels.normalise(v, center2, scale2, shift2))
        tl.store(kernels.tile(out + start * width, at, UNIT), v.to(out.dtype.element_ty), mask=there)


@_jit
def _data_gradient_kernel(
    grad,  # [rows, width], of BN2(dropout(product)) or its ReLU; without conv [rows, read], of relu(BN(x))
    mid,  # [rows, width], dropout(product); without it and what follows grad is that of the product
    mean2,  # [width]
    var2,
    weight2,  # [width] or None
    bias2,
    step2,
    eps2,
    dweight2,  # [width], over all that count counts; None where mean2 and var2 are no moments
    dbias2,
    count,
    keep,  # [rows, width] or None
    keep_scale,
    conv,  # [width, read] or None
    x,  # like total; None where the product read it as it is
    total,  # [rows, channels], channels at pitch: other + the gradient of x, but for what its moments add
    other,  # like total, or total itself, or None
    mean,  # [channels], or [read] with OWN
    var,
    weight,  # [read] or None
    bias,
    eps,
    partials,  # [2, programs, read]: sums of g, the gradient of BN(x), and of g * (x - mean); None without x
    rows,
    width,
    pitch,
    begin0,
    size0,
    begin1,
    size1,
    share,
    programs,
    RELU2: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_READ: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    width = width * UNIT
    read = (size0 + size1) * UNIT
    column_blocks = tl.cdiv(size0 * UNIT, BLOCK_READ) + tl.cdiv(size1 * UNIT, BLOCK_READ)
    program = tl.program_id(0) // column_blocks
    channel, column, exists = _columns(tl.program_id(0) % column_blocks, begin0, size0, begin1, size1, BLOCK_READ, UNIT)
    center, rstd, scale, shift = _fold(mean, var, weight, bias, eps, channel, column, exists, OWN)
    s0 = tl.zeros((BLOCK_READ,), tl.float32)
    s1 = tl.zeros((BLOCK_READ,), tl.float32)
    for tile in range(program * share, tl.minimum((program + 1) * share, tl.cdiv(rows, BLOCK_ROWS))):
        start, row, row_exists, _ = _rows(tile, rows, BLOCK_ROWS)
        there = row_exists & exists[None, :]
        if conv is None:
            at = row * read + column[None, :]
            g = tl.load(kernels.tile(grad + start * read, at, UNIT), mask=there, other=0.0).to(tl.float32)
        else:
            g = tl.zeros((BLOCK_ROWS, BLOCK_READ), tl.float32)
            for n0 in tl.range(0, width, BLOCK_WIDTH, num_stages=STAGES):
                n = n0 + tl.arange(0, BLOCK_WIDTH)
                n_exists = n < width
                center2, scale2, shift2, factor2, slope2, offset2 = _fold_backward(
                    mean2, var2, weight2, bias2, step2, eps2, dweight2, dbias2, count, n, n_exists
                )
                d = _product_gradient(
                    grad, mid, mean2, dweight2, keep, keep_scale, start * width, row * width + n[None, :],
                    row_exists & n_exists[None, :], center2, scale2, shift2, factor2, slope2, offset2, RELU2, UNIT,
                )  # fmt: skip
                w = tl.load(
                    conv + (n[:, None] * read + column[None, :]), mask=n_exists[:, None] & exists[None, :], other=0.0
                )
                g = tl.dot(d, w, g, input_precision=PRECISION)
        at = row * (pitch * UNIT) + channel[None, :]
        first = start * (pitch * UNIT)
        if x is not None:
            act, v = _read(x + first, at, there, center, scale, shift, UNIT)
            g = tl.where((act <= 0) | ~there, 0.0, g)
            s0 += tl.sum(g, 0)
            s1 += tl.sum(g * (v - center), 0)
            g = scale * g
        if other is not None:
            g += tl.load(kernels.tile(other + first, at, UNIT), mask=there, other=0.0).to(tl.float32)
        tl.store(kernels.tile(total + first, at, UNIT), g.to(total.dtype.element_ty), mask=there)
    if partials is not None:
        at = partials + (program.to(tl.int64) * read + column)
        tl.store(at, s0, mask=exists)
        tl.store(at + programs.to(tl.int64) * read, s1, mask=exists)


@_jit
def _deferred_kernel(
    partials,  # [2, programs, read]
    mean,  # [channels], or [read] with OWN
    var,
    weight,  # [read] or None
    eps,
    count,
    dweight,  # [read]
    dbias,  # [read]
    slope,  # [channels] or None: what is left to add to the gradient of a slot is slope * (x - mean) + offset
    offset,
    begin0,
    size0,
    begin1,
    size1,
    programs,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
):
    read = (size0 + size1) * UNIT
    channel, column, exists = _columns(tl.program_id(0), begin0, size0, begin1, size1, COLS, UNIT)
    _, rstd, scale, _ = _fold(mean, var, weight, None, eps, channel, column, exists, OWN)
    s0 = kernels.column_sum(partials, programs, read, column, ROWS, COLS, tl.float32)
    s1 = kernels.column_sum(partials + programs.to(tl.int64) * read, programs, read, column, ROWS, COLS, tl.float32)
    s1 = s1 * rstd
    tl.store(dbias + column, s0, mask=exists)
    tl.store(dweight + column, s1, mask=exists)
    if slope is not None:
        p = tl.sum(scale, 0) / count
        left = tl.load(slope + channel, mask=exists, other=0.0)
        tl.store(slope + channel, left - p * rstd * s1, mask=exists)
        left = tl.load(offset + channel, mask=exists, other=0.0)
        tl.store(offset + channel, left - p * s0, mask=exists)


@_jit
def _weight_gradient_kernel(
    grad,  # [rows, width], of BN2(dropout(product)) or its ReLU
    mid,  # [rows, width], dropout(product); without it and what follows grad is that of the product
    mean2,  # [width]
    var2,
    weight2,  # [width] or None
    bias2,
    step2,
    eps2,
    dweight2,  # [width], over all that count counts; None where mean2 and var2 are no moments
    dbias2,
    count,
    keep,  # [rows, width] or None
    keep_scale,
    x,  # [rows, channels], channels at pitch
    mean,  # [channels], or [read] with OWN; None where x itself was read
    var,
    weight,  # [read] or None
    bias,
    eps,
    products,  # [programs, width, read]
    rows,
    width,
    pitch,
    begin0,
    size0,
    begin1,
    size1,
    share,
    RELU2: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_READ: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    width = width * UNIT
    read = (size0 + size1) * UNIT
    column_blocks = tl.cdiv(size0 * UNIT, BLOCK_READ) + tl.cdiv(size1 * UNIT, BLOCK_READ)
    width_blocks = tl.cdiv(width, BLOCK_WIDTH)
    block = tl.program_id(0) % (column_blocks * width_blocks)
    program = tl.program_id(0) // (column_blocks * width_blocks)
    n = block % width_blocks * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    n_exists = n < width
    channel, column, exists = _columns(block // width_blocks, begin0, size0, begin1, size1, BLOCK_READ, UNIT)
    center, rstd, scale, shift = _fold(mean, var, weight, bias, eps, channel, column, exists, OWN)
    center2, scale2, shift2, factor2, slope2, offset2 = _fold_backward(
        mean2, var2, weight2, bias2, step2, eps2, dweight2, dbias2, count, n, n_exists
    )
    product = tl.zeros((BLOCK_WIDTH, BLOCK_READ), tl.float32)
    last = tl.minimum((program + 1) * share, tl.cdiv(rows, BLOCK_ROWS))
    for tile in tl.range(program * share, last, num_stages=STAGES):
        start, row, row_exists, _ = _rows(tile, rows, BLOCK_ROWS)
        d = _product_gradient(
            grad, mid, mean2, dweight2, keep, keep_scale, start * width, row * width + n[None, :],
            row_exists & n_exists[None, :], center2, scale2, shift2, factor2, slope2, offset2, RELU2, UNIT,
        )  # fmt: skip
        at = row * (pitch * UNIT) + channel[None, :]
        act = _activation(
            x + start * (pitch * UNIT), mean, at, row_exists & exists[None, :], center, scale, shift, UNIT
        )
        product = tl.dot(tl.trans(d), act, product, input_precision=PRECISION)
    at = (program.to(tl.int64) * width + n[:, None]) * read + column[None, :]
    tl.store(products + at, product, mask=n_exists[:, None] & exists[None, :])


def product(
    x: Tensor,
    reads: Reads,
    conv: Tensor,
    norm: Norm | None,
    *,
    then: Norm | None = None,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
    moments: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(dropout(conv(what is read)), or with then relu(then(it)); partial moments [3, tiles, width]). What is read is
    relu(norm(x)), or x."""
    width = conv.shape[0]
    shape = (x.shape[0], width, *x.shape[2:])
    out = x.new_empty_strided(shape, layout.strides(shape, True))
    plan = _plan("product", x, reads, width, out)
    share, programs = plan.split(plan.width_blocks)
    partials = x.new_empty((3, plan.tiles, width), dtype=moments_dtype(x.dtype)) if moments else None
    plan.launch(
        _product_kernel, x, plan.width_blocks * programs,
        out, x, _matrix(conv), *_vectors(norm), *_vectors(then), _bytes(keep), keep_scale, partials,
        plan.rows, plan.width, plan.pitch, *plan.ranges, share,
        OWN=norm is not None and norm.own,
    )  # fmt: skip
    return out, partials


def data_gradient(
    incoming: Incoming,
    conv: Tensor | None,
    x: Tensor | None,
    reads: Reads,
    norm: Norm | None,
    total: Tensor,
    other: Tensor | None,
) -> Tensor | None:
    """The gradient of what was read, back through relu(norm(x)) where there is one, and other into total, which may be
    other. Partial sums [2, programs, read] of the norm's gradients. Without conv incoming.grad is that of what was
    read."""
    tiled = [*incoming.tiled, *(t for t in (x, other) if t is not None)]
    plan = _plan("data_gradient", total, reads, incoming.grad.shape[1], *tiled)
    blocks = plan.column_blocks(plan.blocks.read)
    share, programs = plan.split(blocks)
    sums = None if norm is None else norm.mean.new_empty((2, programs, sum(plan.sizes)))
    *given, relu = incoming._replace(keep=_bytes(incoming.keep))
    plan.launch(
        _data_gradient_kernel, total, blocks * programs,
        *given, None if conv is None else _matrix(conv), x, total, other, *_vectors(norm), sums,
        plan.rows, plan.width, plan.pitch, *plan.ranges, share, programs,
        RELU2=relu, OWN=norm is not None and norm.own,
    )  # fmt: skip
    return sums


def norm_gradients(
    sums: Tensor, x: Tensor, reads: Reads, norm: Norm, count: float, left: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Of weight and bias, from what data_gradient returns. What the dependence of the moments on x leaves to be added
    to the gradient of x, slope * (x - mean) + offset, is added to left, (slope, offset) of each channel."""
    plan = _plan("data_gradient", x, reads, 0)
    dweight, dbias = (norm.mean.new_empty(sum(plan.sizes)) for _ in range(2))
    programs, cols = sums.shape[1], 32
    kernels.launch(
        _deferred_kernel, x, plan.column_blocks(cols),
        sums, norm.mean, norm.var, norm.weight, norm.eps, count, dweight, dbias, *(left or (None, None)),
        *plan.ranges, programs,
        OWN=norm.own, ROWS=min(64, triton.next_power_of_2(programs)), COLS=cols, UNIT=plan.unit, num_warps=4,
    )  # fmt: skip
    return dweight, dbias


def weight_gradient(incoming: Incoming, conv: Tensor, x: Tensor, reads: Reads, norm: Norm | None) -> Tensor:
    """Of conv, dense as it is."""
    width = conv.shape[0]
    plan = _plan("weight_gradient", x, reads, width, *incoming.tiled)
    blocks = plan.column_blocks(plan.blocks.read) * plan.width_blocks
    share, programs = plan.split(4 * blocks)
    products = x.new_empty((programs, *conv.shape[:2]), dtype=moments_dtype(x.dtype))
    *given, relu = incoming._replace(keep=_bytes(incoming.keep))
    plan.launch(
        _weight_gradient_kernel, x, blocks * programs,
        *given, x, *_vectors(norm), products, plan.rows, plan.width, plan.pitch, *plan.ranges, share,
        RELU2=relu, OWN=norm is not None and norm.own,
    )  # fmt: skip
    dconv = torch.empty_like(conv)
    out = _matrix(dconv)  # dconv itself, unless its channels are not innermost
    rk_sum.add_up(products.flatten(1), out.view(-1))
    return dconv if out.data_ptr() == dconv.data_ptr() else dconv.copy_(out.view(conv.shape))


def _matrix(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[:2]).contiguous()


def _bytes(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep.view(torch.uint8)


def _vectors(norm: Norm | None) -> tuple[Any, ...]:
    return (None, None, None, None, 1.0) if norm is None else norm[:5]
