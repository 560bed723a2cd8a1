"""dense_block in Triton: 1x1 products that normalise what they read and take the moments of what they write, and the
passes back through BatchNorm and ReLU into the slots, which take the second BatchNorm's as they read. The 3x3
convolutions are PyTorch's."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkfast.ops import collective, kernels, launches, layout
from rkfast.ops.bn_rk_sum import triton as bn_rk_sum
from rkfast.ops.channel_moments.reference import moments_dtype
from rkfast.ops.dense_block.reference import Growth, conv, conv_backward, dropped, growths, like
from rkfast.ops.launches import Cut
from rkfast.ops.rk_sum import triton as rk_sum

# Layers differ in these; one compiled kernel serves them all. UNIT tells of the alignment of what is in tiles.
_jit = functools.partial(
    triton.jit,
    do_not_specialize=["rows", "width", "pitch", "begin0", "size0", "begin1", "size1", "share", "programs"],
    do_not_specialize_on_alignment=["x", "total", "grad", "mid", "out"],
)


_PROGRAMS = 1024  # that share the rows: enough for any GPU, few enough for a cheap second stage


class _Plan(NamedTuple):
    """How the kernels see one growth's rows, channels in units of ``unit`` elements."""

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


def _plan(kernel: str, buffer: Tensor, g: Growth, *tiled: Tensor) -> _Plan:
    """tiled: what the kernel reads and writes besides the buffer."""
    (begin0, end0), (begin1, end1) = g.reads
    width = g.conv1.shape[0]
    channels = buffer.shape[1]
    sizes = (width, channels, begin0, end0 - begin0, begin1, end1 - begin1)
    unit = kernels.unit_of(buffer.element_size(), kernels.begin_of([buffer, *tiled]), *sizes)
    n, *others = (size // unit for size in sizes)
    rows = layout.count(buffer)
    widest = max(end0 - begin0, end1 - begin1)
    blocks = launches.cut(kernel, _device_name(buffer.device), buffer.element_size(), unit, rows, width, widest)
    return _Plan(rows, n, others[0], tuple(others[1:]), unit, blocks)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _precision() -> str:
    """Of float32 products: that of the convolution they stand for."""
    return "ieee" if torch.backends.cudnn.conv.fp32_precision == "ieee" else "tf32"  # type: ignore[attr-defined]


class _Norm(NamedTuple):
    """What _fold takes; vectors in the dtype of moments."""

    mean: Tensor  # of all slots, or of what is read
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    own: bool  # mean and var are of what is read

    def range(self, first: int, begin: int, size: int) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """(weight, bias, mean, var) of the columns from ``first`` on, which are the channels from ``begin`` on."""
        at = first if self.own else begin
        vectors = (self.weight, first), (self.bias, first), (self.mean, at), (self.var, at)
        return tuple(None if v is None else v.narrow(0, start, size) for v, start in vectors)  # type: ignore[return-value]


def _norm(norm: Any, mean: Tensor, var: Tensor, eps: float) -> _Norm:
    weight, bias, own_mean, own_var = (kernels.vector(v, mean.dtype) for v in norm)
    if own_mean is None or own_var is None:
        return _Norm(mean, var, weight, bias, eps, False)
    return _Norm(own_mean, own_var, weight, bias, eps, True)


class _Incoming(NamedTuple):
    """The gradient of relu(BN2(dropout(product))), and what leads from there to that of the product, in the order of
    the kernels' arguments."""

    grad: Tensor
    mid: Tensor | None = None  # dropout(product)
    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1.0
    dweight: Tensor | None = None  # over all that count counts
    dbias: Tensor | None = None
    count: float = 1.0
    keep: Tensor | None = None
    keep_scale: float = 1.0

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
    """(mean, rstd, scale, shift) with BN(x) = scale * (x - mean) + shift."""
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
def _fold_backward(mean, var, weight, bias, eps, dweight, dbias, count, n, exists):
    """_fold, and (slope, offset) of what the moments' dependence on x adds: slope * (x - mean) + offset."""
    center, rstd, scale, shift = _fold(mean, var, weight, bias, eps, n, n, exists, True)
    if dweight is None:
        return center, scale, shift, None, None
    else:
        left = -scale / count
        slope = left * (rstd * tl.load(dweight + n, mask=exists, other=0.0))[None, :]
        return center, scale, shift, slope, left * tl.load(dbias + n, mask=exists, other=0.0)[None, :]


@triton.jit
def _product_gradient(
    grad, mid, keep, keep_scale, start, at, there, center, scale, shift, slope, offset, UNIT: tl.constexpr
):  # fmt: skip
    """A tile of the gradient of the product, from that of relu(BN2(dropout(product)))."""
    act, v = _read(mid + start, at, there, center, scale, shift, UNIT)
    g = tl.load(kernels.tile(grad + start, at, UNIT), mask=there, other=0.0).to(tl.float32)
    d = scale * tl.where(act <= 0, 0.0, g)
    if slope is not None:
        d += slope * (v - center) + offset
    if keep is not None:
        d = tl.where(tl.load(keep + start + at, mask=there, other=0) != 0, d * keep_scale, 0.0)
    return tl.where(there, d, 0.0).to(grad.dtype.element_ty)


@_jit
def _bottleneck_kernel(
    out,  # [rows, width]
    x,  # [rows, channels], channels at pitch
    conv,  # [width, read]
    mean,  # [channels], or [read] with OWN
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
            act, stored = _read(x + start * (pitch * UNIT), at, there, center, scale, shift, UNIT)
            w = tl.load(
                conv + (n[None, :] * read + column[:, None]), mask=exists[:, None] & n_exists[None, :], other=0.0
            )
            v = tl.dot(act.to(x.dtype.element_ty), w, v, input_precision=PRECISION)
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
def _read_backward_kernel(
    grad,  # [rows, width], of relu(BN2(dropout(product))); without conv [rows, read], of relu(BN(x))
    mid,  # [rows, width], dropout(product); what follows is None without conv
    mean2,  # [width]
    var2,
    weight2,  # [width] or None
    bias2,
    eps2,
    dweight2,  # [width], over all that count counts; None where mean2 and var2 are no moments
    dbias2,
    count,
    keep,  # [rows, width] or None
    keep_scale,
    conv,  # [width, read] or None
    x,  # [rows, channels], channels at pitch
    total,  # like x: what the readers of the slots add up to
    mean,  # [channels], or [read] with OWN
    var,
    weight,  # [read] or None
    bias,
    eps,
    partials,  # [2, programs, read]: sums of g and of g * (x - mean)
    rows,
    width,
    pitch,
    begin0,
    size0,
    begin1,
    size1,
    share,
    programs,
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
                center2, scale2, shift2, slope2, offset2 = _fold_backward(
                    mean2, var2, weight2, bias2, eps2, dweight2, dbias2, count, n, n_exists
                )
                d = _product_gradient(
                    grad, mid, keep, keep_scale, start * width, row * width + n[None, :],
                    row_exists & n_exists[None, :], center2, scale2, shift2, slope2, offset2, UNIT,
                )  # fmt: skip
                w = tl.load(
                    conv + (n[:, None] * read + column[None, :]), mask=n_exists[:, None] & exists[None, :], other=0.0
                )
                g = tl.dot(d, w, g, input_precision=PRECISION)
        at = row * (pitch * UNIT) + channel[None, :]
        first = start * (pitch * UNIT)
        act, v = _read(x + first, at, there, center, scale, shift, UNIT)
        g = tl.where((act <= 0) | ~there, 0.0, g)
        s0 += tl.sum(g, 0)
        s1 += tl.sum(g * (v - center), 0)
        at = kernels.tile(total + first, at, UNIT)
        so_far = tl.load(at, mask=there, other=0.0).to(tl.float32)
        tl.store(at, (so_far + scale * g).to(total.dtype.element_ty), mask=there)
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
    grad,  # [rows, width], of relu(BN2(dropout(product)))
    mid,  # [rows, width], dropout(product)
    mean2,  # [width]
    var2,
    weight2,  # [width] or None
    bias2,
    eps2,
    dweight2,  # [width], over all that count counts; None where mean2 and var2 are no moments
    dbias2,
    count,
    keep,  # [rows, width] or None
    keep_scale,
    x,  # [rows, channels], channels at pitch
    mean,  # [channels], or [read] with OWN
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
    center2, scale2, shift2, slope2, offset2 = _fold_backward(
        mean2, var2, weight2, bias2, eps2, dweight2, dbias2, count, n, n_exists
    )
    product = tl.zeros((BLOCK_WIDTH, BLOCK_READ), tl.float32)
    last = tl.minimum((program + 1) * share, tl.cdiv(rows, BLOCK_ROWS))
    for tile in tl.range(program * share, last, num_stages=STAGES):
        start, row, row_exists, _ = _rows(tile, rows, BLOCK_ROWS)
        d = _product_gradient(
            grad, mid, keep, keep_scale, start * width, row * width + n[None, :], row_exists & n_exists[None, :],
            center2, scale2, shift2, slope2, offset2, UNIT,
        )  # fmt: skip
        at = row * (pitch * UNIT) + channel[None, :]
        act, v = _read(x + start * (pitch * UNIT), at, row_exists & exists[None, :], center, scale, shift, UNIT)
        product = tl.dot(tl.trans(d), act.to(x.dtype.element_ty), product, input_precision=PRECISION)
    at = (program.to(tl.int64) * width + n[:, None]) * read + column[None, :]
    tl.store(products + at, product, mask=n_exists[:, None] & exists[None, :])


class _Block:
    """The slots of one call, and the kernels on them."""

    def __init__(self, buffer: Tensor, mean: Tensor, var: Tensor, keep_scale: float, group: str) -> None:
        self.buffer, self.mean, self.var = buffer, mean, var
        self.keep_scale = keep_scale
        self.group = group
        self.precision = _precision()
        self.zeros = torch.zeros_like(mean)

    def put(self, slot: slice, x: Tensor, moments: bool = True) -> None:
        """x into its slot, and its moments into theirs."""
        x = layout.conform(x, True)
        own = self.mean[slot], self.var[slot]
        into = own if moments and not self.group else None
        found = rk_sum.forward([x], [1.0], [None], None, True, False, moments, False, self.buffer[:, slot], into)
        if moments and self.group:
            shared = collective.moments(found[1], found[2], layout.count(x), self.group)
            torch._foreach_copy_(list(own), list(shared))

    def norm1(self, g: Growth) -> _Norm:
        return _norm(g.norm1, self.mean, self.var, g.eps1)

    def read(self, g: Growth, norm: _Norm) -> Tensor:
        """relu(BN(what the growth reads))."""
        act = layout.empty(like(self.buffer, g.conv1.shape[1]), True)
        first = 0
        for begin, end in g.reads:
            size = end - begin
            if size:
                x, out = self.buffer[:, begin:end], act[:, first : first + size]
                weight, bias, mean, var = norm.range(first, begin, size)
                bn_rk_sum.forward(x, weight, bias, mean, var, [], [], None, True, True, norm.eps, False, False, out)
            first += size
        return act

    def bottleneck(self, g: Growth, norm: _Norm, norm2: _Norm | None, moments: bool) -> tuple[Tensor, Tensor | None]:
        """(the first convolution, or with norm2 relu(norm2(it)); partial moments [3, tiles, width])."""
        width = g.conv1.shape[0]
        out = layout.empty(like(self.buffer, width), True)
        plan = _plan("bottleneck", self.buffer, g, out)
        share, programs = plan.split(plan.width_blocks)
        partials = self.mean.new_empty((3, plan.tiles, width)) if moments else None
        then = (None, None, None, None, 1.0) if norm2 is None else norm2[:5]
        keep = None if g.keep1 is None else g.keep1.view(torch.uint8)
        self._launch(
            _bottleneck_kernel, plan, plan.width_blocks * programs,
            out, self.buffer, _matrix(g.conv1), *norm[:5], *then, keep, self.keep_scale, partials,
            plan.rows, plan.width, plan.pitch, *plan.ranges, share,
            OWN=norm.own, PRECISION=self.precision,
        )  # fmt: skip
        return out, partials

    def incoming(
        self, g: Growth, norm2: _Norm, grad: Tensor, mid: Tensor, gradients: tuple[Tensor, Tensor], count: Tensor
    ) -> _Incoming:
        """gradients: of weight and bias of the second norm, by this process."""
        left: tuple[Tensor | None, Tensor | None] = (None, None) if norm2.own else gradients
        values = float(layout.count(mid))
        if self.group and not norm2.own:
            dweight, dbias = (collective.total(torch.stack(gradients), self.group) / count).to(self.mean.dtype)
            left, values = (dweight, dbias), 1.0
        keep = None if g.keep1 is None else g.keep1.view(torch.uint8)
        mean, var, weight, bias, eps, _ = norm2
        return _Incoming(grad, mid, mean, var, weight, bias, eps, *left, values, keep, self.keep_scale)

    def read_backward(
        self, g: Growth, norm: _Norm, incoming: _Incoming, total: Tensor, left: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """From the gradient behind the bottleneck, or else of what was read, back into the slots; the gradients of
        weight and bias. ``left`` is what the BatchNorms leave to be added: slope and offset of each channel."""
        neck = incoming.mid is not None
        plan = _plan("read_backward", self.buffer, g, total, *incoming.tiled)
        blocks = plan.column_blocks(plan.blocks.read)
        share, programs = plan.split(blocks)
        partials = self.mean.new_empty((2, programs, sum(plan.sizes)))
        self._launch(
            _read_backward_kernel, plan, blocks * programs,
            *incoming, _matrix(g.conv1) if neck else None, self.buffer, total, *norm[:5], partials, plan.rows,
            plan.width, plan.pitch, *plan.ranges, share, programs,
            OWN=norm.own, PRECISION=self.precision,
        )  # fmt: skip
        dweight, dbias = (self.mean.new_empty(sum(plan.sizes)) for _ in range(2))
        cols = 32
        with torch.cuda.device_of(self.buffer):
            _deferred_kernel[(plan.column_blocks(cols),)](
                partials, norm.mean, norm.var, norm.weight, norm.eps,
                1.0 if self.group else float(plan.rows), dweight, dbias,
                *((None, None) if norm.own else left), *plan.ranges, programs,
                OWN=norm.own, ROWS=min(64, triton.next_power_of_2(programs)), COLS=cols, UNIT=plan.unit, num_warps=4,
            )  # fmt: skip
        return dweight, dbias

    def weight_gradient(self, g: Growth, norm: _Norm, incoming: _Incoming) -> Tensor:
        """Of the first convolution of a bottleneck."""
        plan = _plan("weight_gradient", self.buffer, g, *incoming.tiled)
        blocks = plan.column_blocks(plan.blocks.read) * plan.width_blocks
        share, programs = plan.split(4 * blocks)
        products = self.mean.new_empty((programs, *g.conv1.shape[:2]))
        self._launch(
            _weight_gradient_kernel, plan, blocks * programs,
            *incoming, self.buffer, *norm[:5], products, plan.rows, plan.width, plan.pitch, *plan.ranges, share,
            OWN=norm.own, PRECISION=self.precision,
        )  # fmt: skip
        dconv = torch.empty_like(g.conv1)
        out = _matrix(dconv)  # dconv itself, unless its channels are not innermost
        rk_sum.add_up(products.flatten(1), out.view(-1))
        return dconv if out.data_ptr() == dconv.data_ptr() else dconv.copy_(out.view(g.conv1.shape))

    def finished(self, slot: slice, total: Tensor, left: tuple[Tensor, Tensor], count: Tensor) -> Tensor:
        """The gradient of a slot, all of whose readers are done: total + slope * (x - mean) + offset. In a group these
        are sums, to be divided by the count of all."""
        slope, offset = (v[slot] for v in left)
        if self.group:
            slope, offset = (collective.total(torch.stack([slope, offset]), self.group) / count).to(slope.dtype)
        return bn_rk_sum.forward(
            self.buffer[:, slot], slope, offset, self.mean[slot], self.zeros[slot],
            [total[:, slot]], [1.0], None, True, False, 1.0, False, False,
        )[0]  # fmt: skip

    def _launch(self, kernel: Any, plan: _Plan, grid: int, *args: Any, **constants: Any) -> None:
        rows, width, read, warps, stages = plan.blocks
        with torch.cuda.device_of(self.buffer):
            kernel[(grid,)](
                *args, BLOCK_ROWS=rows, BLOCK_WIDTH=width, BLOCK_READ=read, UNIT=plan.unit, STAGES=stages,
                **constants, num_warps=warps,
            )  # fmt: skip


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Meta tensors, for which kernels can be compiled, know no autocast.
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _matrix(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[:2]).contiguous()


def forward(
    x: Tensor,
    conv1: list[Tensor],
    conv2: list[Tensor],
    norms: list[Tensor | None],
    keeps: list[Tensor | None],
    keep_scale: float,
    reads: list[int],
    writes: list[int],
    eps: list[float],
    channels: int,
    summed: list[int],
    mean: Tensor | None,
    var: Tensor | None,
    keep: bool,
    total_moments: bool,
    group: str,
) -> list[Tensor]:
    dtype = moments_dtype(x.dtype)
    inputs = x.shape[1]
    with _without_autocast(x):
        buffer = layout.empty(like(x, channels), True)
        moments = (x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype))
        block = _Block(buffer, *moments, keep_scale, group)
        order = list(growths(conv1, conv2, norms, keeps, reads, writes, eps))
        wanted = keep or total_moments or any(g.norm1[2] is None for g in order)
        block.put(slice(0, inputs), x, wanted and mean is None)
        if mean is not None and var is not None:
            torch._foreach_copy_([block.mean[:inputs], block.var[:inputs]], [mean, var])
        mids: list[Tensor] = []
        mid_moments: list[Tensor] = []
        for g in order:
            norm = block.norm1(g)
            if g.conv2 is None:
                growth = dropped(conv(block.read(g, norm), g.conv1), g.keep1, keep_scale)
            else:
                own = g.norm2[2] is not None
                norm2 = _norm(g.norm2, block.mean, block.var, g.eps2)
                in_tile = own and not keep
                mid, partials = block.bottleneck(g, norm, norm2 if in_tile else None, not own)
                act = mid
                if not in_tile:
                    moments = norm2[:2]
                    if partials is not None:
                        moments = collective.moments(*kernels.merge_moments(partials), layout.count(x), group)
                    mids.append(mid)
                    mid_moments.extend(m.clone() if own else m for m in moments)  # no result is an argument
                    act = _normalised(mid, norm2, moments)
                growth = dropped(conv(act, g.conv2), g.keep2, keep_scale)
            block.put(g.slot, growth, wanted)
        result = [buffer, block.mean, block.var]
        if keep:
            result += [*mid_moments, *mids]
        if summed:
            result += _summed(buffer, [0, *summed], inputs, total_moments)
        return result


def _normalised(mid: Tensor, norm: _Norm, moments: Any) -> Tensor:
    mean, var = moments
    return bn_rk_sum.forward(
        mid, norm.weight, norm.bias, mean, var, [], [], None, True, True, norm.eps, False, False
    )[0]  # fmt: skip


def _summed(buffer: Tensor, firsts: list[int], channels: int, moments: bool) -> list[Tensor]:
    """The sum of some slots, and its mean and variance if asked for; at most 16 terms in one pass."""
    terms = [buffer[:, first : first + channels] for first in firsts]
    total: list[Tensor] = []
    while terms:
        some, terms = [*total[:1], *terms[: 16 - len(total[:1])]], terms[16 - len(total[:1]) :]
        n = len(some)
        total = rk_sum.forward(some, [1.0] * n, [None] * n, None, True, False, moments and not terms, False)
    return total


def _spread(grad: Tensor, total: Tensor, firsts: list[int]) -> None:
    """grad into the slots that were added up, 0 into the others; those that adjoin at once."""
    width, end = grad.shape[1], 0
    while firsts:
        run = [first for i, first in enumerate(firsts) if first == firsts[0] + i * width]
        if run[0] > end:
            total[:, end : run[0]].zero_()
        end = run[-1] + width
        total[:, run[0] : end].unflatten(1, (-1, width)).copy_(grad[:, None])
        firsts = firsts[len(run) :]
    if end < total.shape[1]:
        total[:, end:].zero_()


def backward(
    grad: Tensor,
    buffer: Tensor,
    mean: Tensor,
    var: Tensor,
    mid_moments: list[Tensor],
    mids: list[Tensor],
    conv1: list[Tensor],
    conv2: list[Tensor],
    norms: list[Tensor | None],
    keeps: list[Tensor | None],
    keep_scale: float,
    reads: list[int],
    writes: list[int],
    eps: list[float],
    inputs: int,
    summed: list[int],
    group: str,
) -> list[Tensor]:
    with _without_autocast(buffer):
        block = _Block(buffer, mean, var, keep_scale, group)
        count = collective.count(layout.count(buffer), mean, group)
        total = layout.empty(buffer, True)
        if summed:
            _spread(grad, total, [0, *summed])
        else:
            total.copy_(grad)
        left = (torch.zeros_like(mean), torch.zeros_like(mean))
        found: list[list[Tensor]] = []
        order = list(growths(conv1, conv2, norms, keeps, reads, writes, eps))
        for i, g in reversed(list(enumerate(order))):
            norm = block.norm1(g)
            d = block.finished(g.slot, total, left, count)
            second: list[Tensor] = []
            if g.conv2 is None:
                d = dropped(d, g.keep1, keep_scale)
                d, dconv1 = conv_backward(d, block.read(g, norm), g.conv1)
                dweight, dbias = block.read_backward(g, norm, _Incoming(_dense(d)), total, left)
            else:
                d = dropped(d, g.keep2, keep_scale)
                mid = mids[i] if mids else block.bottleneck(g, norm, None, False)[0]
                mean2, var2 = mid_moments[2 * i : 2 * i + 2]
                norm2 = _norm(g.norm2, mean2, var2, g.eps2)
                dact = _dense(conv_backward(d, mid, g.conv2, need_weight=False)[0])
                act = layout.empty(mid, True)
                dweight2, dbias2 = bn_rk_sum.backward(
                    dact, mid, norm2.weight, norm2.bias, mean2, var2, None, None, [], True, True, False, norm2.eps,
                    False, True, False, act,
                )  # fmt: skip
                dconv2 = conv_backward(d, act, g.conv2, need_x=False)[1]
                incoming = block.incoming(g, norm2, dact, mid, (dweight2, dbias2), count)
                second = [dconv2, dweight2, dbias2]
                dconv1 = block.weight_gradient(g, norm, incoming)
                dweight, dbias = block.read_backward(g, norm, incoming, total, left)
            found.append([dconv1, dweight, dbias, *second])
        dx = block.finished(slice(0, inputs), total, left, count)
        return [dx, *(t for gradients in reversed(found) for t in gradients)]
