"""channel_moments in Triton: one pass that leaves partial moments, a small one that merges them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkfast.ops import kernels, layout
from rkfast.ops.channel_moments import reference
from rkfast.ops.channel_moments.reference import moments_dtype

STATS_BLOCK = 1024
STATS_AT_ONCE = (1, 4, 16)  # pairs of running statistics per launch: few, for each is a kernel to compile


@kernels.jit
def _moments_kernel(
    x,  # [N, C, ...]
    pitch,
    partials,  # [3, rows, C]
    rows,
    channels,
    length,
    chunks,
    blocks,
    splits,
    pieces,
    span,
    share,
    tiles,
    AXIS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    c0, c, channels, group, row, first, last = kernels.assignment(
        channels, blocks, splits, pieces, span, share, tiles, AXIS, ROWS, COLS, UNIT
    )
    n, center, total, squares = kernels.no_moments(AXIS, ROWS, COLS, WIDE)
    for t in tl.range(first, last, num_stages=STAGES):
        major, minor, exists, count, at, bytes_exist = kernels.place(
            t, group, c0, c, channels, length, chunks, AXIS, ROWS, COLS, UNIT
        )
        v = kernels.load(x, pitch, major, minor, exists, UNIT, WIDE)
        n, center, total, squares = kernels.add_moments(v, exists, count, t == first, n, center, total, squares, AXIS)
    kernels.store_moments(partials, row, rows, n, center, total, squares, c, channels, AXIS)


def forward(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return reference.forward(x, channels_last)
    x = layout.conform(x, channels_last)
    dtype = moments_dtype(x.dtype)
    view = kernels.view([x], channels_last, per_channel=True, mask=False)
    tiling = view.tiling(x.element_size(), operands=1, sums=2, reduces=True)
    partials = kernels.empty_partials(x, 3, tiling, dtype)
    tiling.launch(
        _moments_kernel,
        x,
        x,
        *view.units(tiling),
        partials,
        tiling.partials,
        WIDE=kernels.WIDE[dtype],
        **({"maxnreg": 80} if channels_last and x.element_size() == 2 else {}),  # as NO_TARGET, for more warps
    )
    return kernels.merge_moments(partials)


@triton.jit
def _move(running, batch, weight, c, exists):
    old = tl.load(running + c, mask=exists, other=0.0)
    WIDE: tl.constexpr = tl.float64 if old.dtype == tl.float64 else tl.float32
    old = old.to(WIDE)
    new = old + weight.to(WIDE) * (batch.to(WIDE) - old)
    tl.store(running + c, new.to(running.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["tracked"])
def _running_stats_kernel(
    mean,  # [C]
    var,  # [C]
    running_mean,  # tuple of vectors, each of the first channels
    running_var,
    counters,  # of batches, the first `tracked` of which are one more afterwards; with CUMULATIVE they are that already
    tracked,
    sizes,
    unbias,
    momentum,
    CUMULATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(running_mean)):
        if CUMULATIVE:
            weight = 1.0 / tl.load(counters[i]).to(tl.float64)
        else:
            weight = kernels.scalar_of(momentum, tl.float64)
        exists = c < sizes[i]
        m = tl.load(mean + c, mask=exists, other=0.0)
        v = tl.load(var + c, mask=exists, other=0.0)
        _move(running_mean[i], m, weight, c, exists)
        _move(running_var[i], v * kernels.scalar_of(unbias, tl.float64).to(v.dtype), weight, c, exists)
    if not CUMULATIVE:
        for i in tl.static_range(len(counters)):
            here = (tl.program_id(0) == 0) & (i < tracked)
            tl.store(counters[i], tl.load(counters[i], mask=here, other=0) + 1, mask=here)


def update_running_stats(
    mean: Tensor,
    var: Tensor,
    count: int,
    running_mean: list[Tensor],
    running_var: list[Tensor],
    num_batches_tracked: list[Tensor],
    momentum: float | None,
) -> None:
    cumulative = momentum is None
    nothing = count == 0 or mean.numel() == 0
    here = all(n.device == mean.device for n in num_batches_tracked) and len(num_batches_tracked) <= len(running_mean)
    in_kernel = here and not cumulative and not nothing
    if num_batches_tracked and not in_kernel:
        torch._foreach_add_(num_batches_tracked, 1)
    if nothing:
        return
    mean, var = mean.contiguous(), var.contiguous()
    dense = [[r.contiguous() for r in each] for each in (running_mean, running_var)]
    counters = [n.to(mean.device) for n in num_batches_tracked] if in_kernel or cumulative else []
    most = STATS_AT_ONCE[-1]
    for i in range(0, len(running_mean), most):
        means, variances, tracked = (each[i : i + most] for each in (*dense, counters))
        sizes = [r.shape[0] for r in means]
        places = next(n for n in STATS_AT_ONCE if n >= len(means))
        kernels.launch(
            _running_stats_kernel,
            mean,
            triton.cdiv(max(sizes), STATS_BLOCK),
            mean,
            var,
            *(_filled(each, each[-1], places) for each in (means, variances)),
            _filled(tracked, tracked[-1], places) if tracked else (),
            len(tracked),
            _filled(sizes, 0, places),
            # PyTorch keeps the unbiased variance; one value per channel has none.
            kernels.scalar(count / max(count - 1, 1), torch.float64),
            kernels.scalar(0.0 if momentum is None else momentum, torch.float64),
            CUMULATIVE=cumulative,
            BLOCK=STATS_BLOCK,
        )
    for given, copy in zip((*running_mean, *running_var), (*dense[0], *dense[1]), strict=True):
        if copy is not given:
            given.copy_(copy)


def _filled(given: list[Any], rest: Any, places: int) -> tuple[Any, ...]:
    return (*given, *[rest] * (places - len(given)))
