"""What the Triton kernels share: the tiling of both layouts, the rules for a single element, and two-stage reductions.

A tile is ROWS x COLS elements, the innermost dimension along its columns. Contiguous: rows are channels, columns are
positions of one sample. channels_last: rows are positions, columns are channels. AXIS is the tile's axis of positions:
reductions run along it, and what is per channel lies along the other one. A program owns one block of channels and a
run of tiles of one group: the whole batch, or one sample where a factor differs from sample to sample.

Lengths and pitches reach the kernels in units of UNIT elements, and tensors begin at multiples of them, so that the
compiler may load UNIT at once: from a slot of a buffer, too, which seldom begins at the 16 bytes that Triton looks for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context, ContextVar
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkfast.ops import layout
from rkfast.ops.launches import NARROW

THREAD_BYTES = 16  # of one tensor, loaded by one thread at once
WARPS = 4
MOST_HELD = 96  # registers of a thread that may stay occupied while tiles pass; a thread has 255
PROGRAMS = 4096  # enough for a small tail on any GPU, few enough for a cheap second stage
PARTIAL_ROWS = (32, 512)  # read at once by the second stage: few, for each is a kernel to compile
MOST_PARTIAL = 2048  # for one program to merge
MANY_CHANNELS = 4096  # programs enough, so that each may read wide pieces of few rows
# For those of which ptxas, left alone, spills a register or two in order to fit more warps.
NO_TARGET = {"maxnreg": 255}
GEOMETRY = ("channels", "length", "chunks", "blocks", "splits", "pieces", "span", "share", "tiles")
PITCHES = ("pitch", "pitches", "x_pitch", "out_pitch")
TILED = ("x", "terms", "out", "grad", "act", "dx", "outs")  # read and written by load and store

# Alignment is told by UNIT; without this, new shapes would compile again. (A length or pitch of 1 is still a constant.)
jit = functools.partial(
    triton.jit,
    do_not_specialize_on_alignment=[*GEOMETRY, *PITCHES, *TILED],
    do_not_specialize=[*GEOMETRY[3:], "rows", "every"],
)


_ahead: ContextVar[torch.device | None] = ContextVar("ahead", default=None)  # what is compiled for
_compiled: set[Any] = set()


def launch(kernel: Any, lead: Tensor, programs: int, *args: Any, **constants: Any) -> None:
    """Launch on the device of ``lead``; within ``compile_ahead`` have the kernel compiled."""
    with torch.cuda.device_of(lead):
        if _ahead.get() is not None:
            kernel.warmup(*args, grid=(programs,), **constants)
        else:
            kernel[(programs,)](*args, **constants)


def compile_ahead(key: Any, call: Callable[..., Any], *args: Any) -> None:
    """Before a first step: all cores compile what ``call`` launches, which is given meta tensors that lie as args do.
    Once for each key, device and dtype of the first of them. What does not compile raises where it is launched."""
    lead = args[0]
    key = (key, lead.device, lead.dtype)
    if lead.is_cpu or key in _compiled or _ahead.get() is not None:
        return
    _compiled.add(key)
    # A context of its own: Triton's mode stays in the one that an interrupt leaves.
    Context().run(_compile, lead, call, [_meta(arg) for arg in args])


def _compile(lead: Tensor, call: Callable[..., Any], args: list[Any]) -> None:
    _ahead.set(lead.device)
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    with torch.cuda.device_of(lead), pool, triton.AsyncCompileMode(_Launchable(pool), ignore_errors=True):
        call(*args)


class _Launchable(NamedTuple):
    """The pool, which also makes what launches a kernel: Triton 3.6 compiles that in C, else at the first launch."""

    pool: ThreadPoolExecutor

    def submit(self, compiled: Callable[[], Any]) -> Future[Any]:
        return self.pool.submit(_with_launcher, compiled)


def _with_launcher(compiled: Callable[[], Any]) -> Any:
    kernel = compiled()
    with contextlib.suppress(Exception):  # it raises where the kernel is launched
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


def _meta(t: Any) -> Any:
    if isinstance(t, list):
        return [_meta(each) for each in t]
    if not isinstance(t, Tensor):
        return t
    begin = t.data_ptr() % THREAD_BYTES // t.element_size()
    extent = begin + 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return torch.empty(extent, dtype=t.dtype, device="meta").as_strided(t.shape, t.stride(), begin)


def device_of(x: Tensor) -> torch.device:
    """Where x is, or within ``compile_ahead`` what it stands for."""
    return _ahead.get() or x.device


class Tiling(NamedTuple):
    """How a kernel's work is cut; the first nine fields are the kernels' trailing arguments of these names."""

    channels: int
    length: int  # positions of a row (contiguous) or rows of a group (channels_last)
    chunks: int  # tiles that cover one row (contiguous)
    blocks: int  # of channels
    splits: int  # programs per group and block
    pieces: int  # programs that share a span
    span: int
    share: int  # tiles of one program
    tiles: int  # of one group
    groups: int
    warps: int
    constants: dict[str, int]

    @property
    def partials(self) -> int:
        """Partial results per channel."""
        return self.groups * self.splits

    def launch(self, kernel: Any, lead: Tensor, *args: Any, **constants: Any) -> None:
        constants |= self.constants | {"num_warps": self.warps}
        launch(kernel, lead, self.blocks * self.partials, *args, *self[: len(GEOMETRY)], **constants)


class View(NamedTuple):
    """Tensors of one shape as the kernels see them."""

    samples: int
    channels: int
    positions: int
    channels_last: bool
    pitches: tuple[int, ...]  # between samples (contiguous) or positions (channels_last)
    begin: int = THREAD_BYTES  # divides every address

    def tiling(
        self,
        itemsize: int,
        operands: int,
        vectors: int = 0,
        sums: int = 0,
        per_sample: bool = False,
        reduces: bool = False,
    ) -> Tiling:
        """operands: tensors read and written; vectors: per channel; sums: kept for each element of a tile."""
        row = self.channels if self.channels_last else self.positions
        unit = unit_of(itemsize, self.begin, row, *self.pitches)
        per_thread = THREAD_BYTES // itemsize
        held = (sums + vectors * self.channels_last) * max(1, itemsize // 4)  # registers
        while held * per_thread > MOST_HELD and per_thread > 1:
            per_thread //= 2
        if sums and unit * itemsize < NARROW and per_thread > 1:
            per_thread //= 2
        elements = 32 * WARPS * per_thread * (2 if operands + sums <= 4 else 1)
        return _tiling(*self[:4], itemsize, unit, per_thread, elements, per_sample, reduces)

    def units(self, tiling: Tiling) -> tuple[int, ...]:
        return tuple(pitch // tiling.constants["UNIT"] for pitch in self.pitches)


def odd(pitches: Iterable[int]) -> tuple[int, ...]:
    """Pitches of a tuple of tensors, for ``pitch_of`` to read: within a tuple Triton compiles again for a 1 and for
    multiples of 16, and an odd number is neither."""
    return tuple(2 * pitch + 1 for pitch in pitches)


def view(tensors: Sequence[Tensor], channels_last: bool, per_channel: bool, mask: bool) -> View:
    """The longest rows that conforming ``tensors`` allow: where nothing is per channel, whole samples or everything."""
    n, c, *spatial = tensors[0].shape
    p = math.prod(spatial)
    channels_last = layout.by_channel(tensors[0], channels_last)
    pitches = tuple(layout.pitches(t, channels_last)[channels_last] for t in tensors)
    row, dense = (c, c) if channels_last else (p, c * p)
    begin = begin_of(tensors)
    if not per_channel and not (mask and row % 8):
        if all(pitch == dense for pitch in pitches):
            return View(1, 1, n * c * p, False, (n * c * p,) * len(pitches), begin)
        if not channels_last:
            return View(n, 1, c * p, False, pitches, begin)
    return View(n, c, p, channels_last, pitches, begin)


@functools.lru_cache(maxsize=4096)
def _tiling(
    samples: int,
    channels: int,
    positions: int,
    channels_last: bool,
    itemsize: int,
    unit: int,
    per_thread: int,
    elements: int,
    per_sample: bool,
    reduces: bool,
) -> Tiling:
    groups = samples if per_sample else 1
    if channels_last:
        length = positions * samples // groups
        # As few as memory is read by at once: the fewer, the less of a program's reads are vectors per channel.
        cols = _width(channels, _widths(channels, 128 // itemsize, 256))
        rows = min(elements // cols, triton.next_power_of_2(length))
        chunks, tiles = 1, _cdiv(length, rows)
        block = cols
    else:
        length = positions
        least = max(256, elements // triton.next_power_of_2(channels))
        cols = _width(length, _widths(length, least, elements)[::-1])
        rows = min(elements // cols, triton.next_power_of_2(channels))
        chunks = _cdiv(length, cols)
        tiles = chunks * samples // groups
        block = rows
    blocks = _cdiv(channels, block)
    total = tiles * groups * blocks
    if reduces:
        share = max(1, total // PROGRAMS, min(4, total // 512))
    else:  # channels_last: a program's vectors per channel are as long as its rows, so that it should use them often
        share = max(1, min(8, total // (4 * PROGRAMS))) if channels_last else 1
    # The first tile of a program must not be smaller than its others (see add_moments): start at the start of a row.
    if channels_last or share < chunks:
        span = tiles if channels_last else chunks
        share = _cdiv(span, _cdiv(span, share))
        pieces = _cdiv(span, share)
    else:
        span = share = share // chunks * chunks
        pieces = 1
    return Tiling(
        channels=channels // unit if channels_last else channels,
        length=length if channels_last else length // unit,
        chunks=chunks,
        blocks=blocks,
        splits=_cdiv(tiles, span) * pieces,
        pieces=pieces,
        span=span,
        share=share,
        tiles=tiles,
        groups=groups,
        warps=max(1, min(WARPS, rows * cols // (32 * per_thread))),
        constants={
            "AXIS": 0 if channels_last else 1,
            "ROWS": rows,
            "COLS": cols,
            "UNIT": unit,
            "STAGES": 3 if reduces else 1,
        },
    )


def _widths(length: int, least: int, most: int) -> list[int]:
    """The powers of two between these that are no longer than ``length`` needs."""
    most = max(8, min(most, triton.next_power_of_2(length)))  # 8: a byte of the mask
    return [1 << i for i in range(most.bit_length()) if min(least, most) <= 1 << i <= most]


def _width(length: int, widths: Sequence[int]) -> int:
    """The first of the widths that pads ``length`` by at most an eighth, else the one that pads it least."""
    padded = {width: _cdiv(length, width) * width for width in widths}
    return next((width for width in widths if 8 * padded[width] <= 9 * length), min(padded, key=lambda w: padded[w]))


def begin_of(tensors: Iterable[Tensor]) -> int:
    """Bytes at whose multiples all of them begin: THREAD_BYTES, unless some lie in between, as slots do."""
    return math.gcd(THREAD_BYTES, *(t.data_ptr() for t in tensors))


def unit_of(itemsize: int, begin: int, *sizes: int) -> int:
    """Elements that a thread may load at once where rows have these sizes and tensors begin at multiples of begin."""
    return math.gcd(THREAD_BYTES // itemsize, max(1, begin // itemsize), *sizes)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def scalar(value: float, dtype: torch.dtype) -> Any:
    """value as a kernel argument. Triton passes floats as float32, so that a double travels as three of them."""
    if dtype != torch.float64:
        return value
    parts = []
    for _ in range(3):
        part = ctypes.c_float(value).value
        parts.append(part)
        value -= part
    return tuple(parts)


def vector(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if v is None else v.to(dtype).contiguous()


WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


def reduce(kernel: Any, lead: Tensor, groups: int, rows: int, channels: int, *args: Any) -> None:
    """Launch a second stage, which reduces ``rows`` partial results per group and channel."""
    height = PARTIAL_ROWS[rows > PARTIAL_ROWS[0] and channels < MANY_CHANNELS]
    width = min(max(4, 2048 // height), 32)
    launch(
        kernel, lead, groups * _cdiv(channels, width), *args, rows, channels,
        ROWS=height, COLS=width, WIDE=WIDE[lead.dtype], num_warps=max(1, min(8, height * width // 256)),
    )  # fmt: skip


def merge_moments(partials: Tensor, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance from partials [3, rows, C]: counts, means and sums of squared deviations. into: where
    they are written, if not into new vectors."""
    _, rows, c = partials.shape
    if rows > MOST_PARTIAL:  # by more programs than there are blocks of channels
        span = max(2, math.isqrt(rows))
        groups = _cdiv(rows, span)
        merged = partials.new_empty((3, groups, c))
        reduce(_merge_kernel, partials, groups, span, c, partials, merged, None, None, rows)
        partials, rows = merged, groups
    mean, var = into or (partials.new_empty(c), partials.new_empty(c))
    reduce(_merge_kernel, partials, 1, rows, c, partials, None, mean, var, rows)
    return mean, var


def empty_partials(x: Tensor, planes: int, tiling: Tiling, dtype: torch.dtype) -> Tensor:
    return x.new_empty((planes, tiling.partials, x.shape[1]), dtype=dtype)


@triton.jit
def scalar_of(value, WIDE: tl.constexpr):
    if tl.float64 == WIDE:
        return tl.full((), 0.0, tl.float64) + value[0] + value[1] + value[2]
    else:
        return value


@triton.jit
def assignment(
    channels, blocks, splits, pieces, span, share, tiles,
    AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """What this program works on: its first channel, all its channels, C in elements, its group, its row among the
    partial results, its first tile and the one after its last."""
    BLOCK: tl.constexpr = COLS if AXIS == 0 else ROWS
    pid = tl.program_id(0)
    c0 = (pid % blocks) * BLOCK
    row = pid // blocks
    split = row % splits
    first = split // pieces * span + split % pieces * share
    last = tl.minimum(tl.minimum(first + share, (split // pieces + 1) * span), tiles)
    return c0, c0 + tl.arange(0, BLOCK), channels * (UNIT if AXIS == 0 else 1), row // splits, row, first, last


@triton.jit
def place(
    t, group, c0, c, channels, length, chunks,
    AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where tile t lies: (major, minor), which put an element at major * pitch + minor; which elements exist; how many
    of each channel; the bytes of the mask, and which of them exist."""
    BYTES: tl.constexpr = COLS // 8
    t = tl.full((), 0, tl.int64) + t
    if AXIS == 1:
        chunk = t % chunks
        sample = t // chunks + group
        count = tl.minimum(length - chunk * (COLS // UNIT), COLS // UNIT).to(tl.int32) * UNIT
        row_exists = (c < channels)[:, None]
        exists = row_exists & (tl.arange(0, COLS) < count)[None, :]
        bytes_exist = row_exists & (tl.arange(0, BYTES) * 8 < count)[None, :]
        line = c.to(tl.int64)[:, None]
        minor = (line * length * UNIT + chunk * COLS) + tl.arange(0, COLS)[None, :]
        at = ((sample * channels + line) * tl.cdiv(length * UNIT, 8) + chunk * BYTES) + tl.arange(0, BYTES)[None, :]
        return sample, minor, exists, count, at, bytes_exist
    else:
        count = tl.minimum(length - t * ROWS, ROWS).to(tl.int32)
        row_exists = (tl.arange(0, ROWS) < count)[:, None]
        exists = row_exists & (c < channels)[None, :]
        line = ((t * ROWS + group * length) + tl.arange(0, ROWS))[:, None]
        byte = (c0 // 8 + tl.arange(0, BYTES))[None, :]
        width = tl.cdiv(channels, 8)
        return line, c[None, :], exists, count, line * width + byte, row_exists & (byte < width)


@triton.jit
def per_channel(v, c, channels, AXIS: tl.constexpr):
    """v [C] along a tile's axis of channels."""
    return tl.expand_dims(tl.load(v + c, mask=c < channels, other=0.0), AXIS)


@triton.jit
def factor(coeff, step, gate, group, c, channels, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """coeff * step [C] * gate [N, C]."""
    f = scalar_of(coeff, WIDE)
    if step is not None:
        f = f * per_channel(step, c, channels, AXIS)
    if gate is not None:
        f = f * per_channel(gate + group.to(tl.int64) * channels, c, channels, AXIS)
    return f


@triton.jit
def tile(x, at, UNIT: tl.constexpr):
    """Pointers to x [at], of which the compiler may take each UNIT at once."""
    BYTES: tl.constexpr = UNIT * (x.dtype.element_ty.primitive_bitwidth // 8)
    # Bytes; and of a sum taken in another function it would forget them.
    return tl.multiple_of(x + at, [1, BYTES])


@triton.jit
def load(x, pitch, major, minor, exists, UNIT: tl.constexpr, WIDE: tl.constexpr):
    return tl.load(tile(x, major * pitch * UNIT + minor, UNIT), mask=exists, other=0.0).to(WIDE)


@triton.jit
def pitch_of(odd):
    return odd >> 1


@triton.jit
def store(out, pitch, v, major, minor, exists, UNIT: tl.constexpr):
    tl.store(tile(out, major * pitch * UNIT + minor, UNIT), v.to(out.dtype.element_ty), mask=exists)


@triton.jit
def normalise(x, center, scale, shift):
    # An explicit fma: backward decides by this value's sign, and must see forward's to the last bit.
    return tl.fma(x - center, tl.broadcast_to(scale, x.shape), tl.broadcast_to(shift, x.shape))


@triton.jit
def relu(v):
    return tl.where(v <= 0, 0.0, v)  # NaN passes


@triton.jit
def stored(v, out):
    """v after rounding to the dtype of out."""
    return v.to(out.dtype.element_ty).to(v.dtype)


@triton.jit
def pack(keep, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Bits of booleans, lowest first."""
    bits = tl.reshape(keep.to(tl.int32), (ROWS, COLS // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, 2).to(tl.uint8)


@triton.jit
def unpack(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    bits = packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, (ROWS, COLS)) != 0


@triton.jit
def no_moments(AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Where add_moments starts from."""
    zero = tl.zeros((ROWS, COLS), WIDE)
    return 0, tl.zeros((COLS if AXIS == 0 else ROWS,), WIDE), zero, zero


@triton.jit
def add_moments(v, exists, count, is_first, n, center, total, squares, AXIS: tl.constexpr):
    """Add a tile to the sums of (v - center) and (v - center)^2, which are kept per element of a tile.

    The center is the mean of the program's first tile. That tile is at least 1 / share of the program's values, so that
    its distance from their mean outweighs their deviation at most share times, and little cancels.
    """
    if is_first:
        # A Newton step in place of a division of doubles, around which ptxas would spill.
        inverse = (1.0 / count.to(tl.float32)).to(v.dtype)
        inverse += inverse * (1.0 - inverse * count)
        center = tl.sum(tl.where(exists, v, 0.0), AXIS) * inverse
    apart = tl.where(exists, v - tl.expand_dims(center, AXIS), 0.0)
    return n + count, center, total + apart, squares + apart * apart


@triton.jit
def store_moments(partials, row, rows, n, center, total, squares, c, channels, AXIS: tl.constexpr):
    """Count, mean and sum of squared deviations of this program's values -> partials [3, rows, C]."""
    at = partials + (row.to(tl.int64) * channels + c)
    plane = rows.to(tl.int64) * channels
    total = tl.sum(total, AXIS)
    offset = total / n
    squares = tl.sum(squares, AXIS) - total * offset
    tl.store(at, tl.zeros_like(offset) + n, mask=c < channels)
    tl.store(at + plane, center + offset, mask=c < channels)
    tl.store(at + 2 * plane, tl.where(squares < 0, 0.0, squares), mask=c < channels)


@triton.jit
def column_sum(partials, rows, channels, c, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Sum of partials [rows, C] over its rows, for channels c."""
    acc = tl.zeros((ROWS, COLS), WIDE)
    for start in range(0, rows, ROWS):
        r = (start + tl.arange(0, ROWS))[:, None]
        at = r.to(tl.int64) * channels + c[None, :]
        acc += tl.load(partials + at, mask=(r < rows) & (c < channels)[None, :], other=0.0)
    return tl.sum(acc, 0)


# mean and var may be slots of vectors, which begin anywhere.
@jit(do_not_specialize_on_alignment=["channels", "mean", "var"])
def _merge_kernel(
    partials,  # [3, every, C]
    merged,  # [3, groups, C] or None
    mean,  # [C] or None
    var,
    every,
    rows,  # of a group
    channels,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    blocks = tl.cdiv(channels, COLS)
    group = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    plane = every.to(tl.int64) * channels
    last = tl.minimum((group + 1) * rows, every)
    n = tl.zeros((COLS,), WIDE)
    m = tl.zeros((COLS,), WIDE)
    m2 = tl.zeros((COLS,), WIDE)
    for start in range(group * rows, last, ROWS):
        r = (start + tl.arange(0, ROWS))[:, None]
        at = partials + (r.to(tl.int64) * channels + c[None, :])
        exists = (r < last) & (c < channels)[None, :]
        part_n = tl.load(at, mask=exists, other=0.0)
        part_mean = tl.load(at + plane, mask=exists, other=0.0)
        part_m2 = tl.load(at + 2 * plane, mask=exists, other=0.0)
        # Chan's merging of all rows at once; the second sum takes the first one's rounding error out of the mean.
        tile_n = tl.sum(part_n, 0)
        tile_mean = tl.sum(part_n * part_mean, 0) / tile_n
        tile_mean += tl.sum(part_n * (part_mean - tile_mean[None, :]), 0) / tile_n
        apart = part_mean - tile_mean[None, :]
        tile_m2 = tl.sum(part_m2 + part_n * apart * apart, 0)
        delta = tile_mean - m
        share = tile_n / (n + tile_n)
        m += delta * share
        m2 += tile_m2 + delta * delta * n * share
        n += tile_n
    if merged is None:
        tl.store(mean + c, m, mask=c < channels)
        tl.store(var + c, m2 / n, mask=c < channels)
    else:
        at = merged + (group.to(tl.int64) * channels + c)
        plane = tl.cdiv(every, rows).to(tl.int64) * channels
        tl.store(at, n, mask=c < channels)
        tl.store(at + plane, m, mask=c < channels)
        tl.store(at + 2 * plane, m2, mask=c < channels)
