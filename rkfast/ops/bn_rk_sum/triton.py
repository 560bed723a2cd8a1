"""bn_rk_sum in Triton: forward one pass once the moments are known; backward one that sums and one that applies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkfast.ops import kernels, layout
from rkfast.ops.bn_rk_sum import reference
from rkfast.ops.channel_moments import triton as channel_moments
from rkfast.ops.channel_moments.reference import moments_dtype


@triton.jit
def fold(mean, var, weight, bias, step, gate, eps, group, c, channels, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """(mean, rstd, scale, shift) with step * BN(x) = scale * (x - mean) + shift."""
    center = kernels.per_channel(mean, c, channels, AXIS)
    rstd = tl.rsqrt(kernels.per_channel(var, c, channels, AXIS) + kernels.scalar_of(eps, WIDE))
    scale = rstd
    shift = tl.zeros_like(rstd)
    if weight is not None:
        scale = scale * kernels.per_channel(weight, c, channels, AXIS)
    if bias is not None:
        shift = kernels.per_channel(bias, c, channels, AXIS)
    if step is not None:
        h = kernels.per_channel(step, c, channels, AXIS)
        scale, shift = scale * h, shift * h
    if gate is not None:
        h = kernels.per_channel(gate + group.to(tl.int64) * channels, c, channels, AXIS)
        scale, shift = scale * h, shift * h
    return center, rstd, scale, shift


@kernels.jit
def _forward_kernel(
    out,  # [N, C, ...]
    pitch,
    x,  # [N, C, ...]
    x_pitch,
    mean,  # [C]
    var,  # [C]
    weight,  # [C] or None
    bias,  # [C] or None
    step,  # [C] or None
    gate,  # [N, C] or None
    eps,
    terms,  # tuple of [N, C, ...]
    pitches,  # tuple, kernels.odd
    coeffs,
    mask,  # [rows of out, bytes] or None
    partials,  # [3, rows, C] or None
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
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
):
    c0, c, channels, group, row, first, last = kernels.assignment(
        channels, blocks, splits, pieces, span, share, tiles, AXIS, ROWS, COLS, UNIT
    )
    center, _, scale, shift = fold(mean, var, weight, bias, step, gate, eps, group, c, channels, AXIS, WIDE)
    n, middle, sums, squares = kernels.no_moments(AXIS, ROWS, COLS, WIDE)
    for t in tl.range(first, last, num_stages=STAGES):
        major, minor, exists, count, at, bytes_exist = kernels.place(
            t, group, c0, c, channels, length, chunks, AXIS, ROWS, COLS, UNIT
        )
        total = kernels.normalise(kernels.load(x, x_pitch, major, minor, exists, UNIT, WIDE), center, scale, shift)
        for i in tl.static_range(len(terms)):
            coeff = kernels.scalar_of(coeffs[i], WIDE)
            total += coeff * kernels.load(terms[i], kernels.pitch_of(pitches[i]), major, minor, exists, UNIT, WIDE)
        if RELU:
            total = kernels.relu(total)
        total = kernels.stored(total, out)
        kernels.store(out, pitch, total, major, minor, exists, UNIT)
        if mask is not None:
            tl.store(mask + at, kernels.pack(exists & ~(total <= 0), ROWS, COLS), mask=bytes_exist)
        if partials is not None:
            n, middle, sums, squares = kernels.add_moments(
                total, exists, count, t == first, n, middle, sums, squares, AXIS
            )
    if partials is not None:
        kernels.store_moments(partials, row, rows, n, middle, sums, squares, c, channels, AXIS)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    terms: list[Tensor],
    coeffs: list[float],
    step: Tensor | None,
    channels_last: bool,
    relu: bool,
    eps: float,
    moments: bool,
    mask: bool,
    out: Tensor | None = None,
) -> list[Tensor]:
    if x.numel() == 0:
        return reference.forward(
            x, weight, bias, mean, var, terms, coeffs, step, channels_last, relu, eps, moments, mask, out
        )
    dtype = moments_dtype(x.dtype)
    x = layout.conform(x, channels_last)
    terms = [layout.conform(t, channels_last) for t in terms]
    found: tuple[Tensor, ...] = ()
    if mean is None or var is None:
        steps = None if step is None else step.dim()
        key = ("bn_rk_sum", len(terms), steps, channels_last, relu, moments, mask, weight is None, bias is None)
        args = (x, weight, bias, terms, coeffs, step, channels_last, relu, eps, moments, mask)
        kernels.compile_ahead(key, _train, *args)
        mean, var = found = channel_moments.forward(x, channels_last)
    if out is None:
        out = layout.empty(x, channels_last)
    bits = x.new_empty(layout.mask_shape(x, channels_last), dtype=torch.uint8) if mask else None
    view = kernels.view([out, x, *terms], channels_last, per_channel=True, mask=mask)
    tiling = view.tiling(
        x.element_size(),
        operands=2 + len(terms),
        sums=2 * moments,
        per_sample=step is not None and step.dim() == 2,
        reduces=moments,
    )
    partials = kernels.empty_partials(x, 3, tiling, dtype) if moments else None
    pitch, x_pitch, *pitches = view.units(tiling)
    tiling.launch(
        _forward_kernel,
        x,
        out,
        pitch,
        x,
        x_pitch,
        *_vectors(mean, var, weight, bias, step, dtype),
        kernels.scalar(eps, dtype),
        tuple(terms),
        kernels.odd(pitches),
        tuple(kernels.scalar(c, dtype) for c in coeffs),
        bits,
        partials,
        tiling.partials,
        RELU=relu,
        WIDE=kernels.WIDE[dtype],
    )
    return [
        out,
        *([] if bits is None else [bits]),
        *found,
        *([] if partials is None else kernels.merge_moments(partials)),
    ]


def _train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    terms: list[Tensor],
    coeffs: list[float],
    step: Tensor | None,
    channels_last: bool,
    relu: bool,
    eps: float,
    moments: bool,
    masks: bool,
) -> None:
    """forward by the batch's statistics, and backward."""
    out, *found = forward(
        x, weight, bias, None, None, terms, coeffs, step, channels_last, relu, eps, moments, masks
    )  # fmt: skip
    mask = found.pop(0) if masks else None
    backward(
        out, x, weight, bias, found[0], found[1], step, mask, coeffs, channels_last, relu, True, eps, True, True,
        step is not None,
    )  # fmt: skip


def _vectors(
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    step: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor | None]:
    """What fold takes, the step as one per channel or as one per sample and channel."""
    gated = step is not None and step.dim() == 2
    steps = (None, step) if gated else (step, None)
    return [kernels.vector(v, dtype) for v in (mean, var, weight, bias, *steps)]


@kernels.jit
def _backward_kernel(
    grad,  # [N, C, ...]
    pitch,
    x,  # [N, C, ...] or None where nothing needs it
    x_pitch,
    mask,  # [rows of grad, bytes] or None
    mean,  # [C]
    var,  # [C]
    weight,  # [C] or None
    bias,  # [C] or None
    step,  # [C] or None
    gate,  # [N, C] or None
    eps,
    sums,  # [rows, C] or None: sums of g'
    projections,  # [rows, C] or None: sums of g' * x_hat
    slope,  # [C] or None
    offset,  # [C] or None
    act,  # [N, C, ...] or None: relu(BN(x)), where that is recomputed
    dx,  # [N, C, ...] or None
    outs,  # tuple of [N, C, ...]
    out_pitch,
    coeffs,
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
    RECOMPUTE: tl.constexpr,
    WIDE: tl.constexpr,
):
    c0, c, channels, group, row, first, last = kernels.assignment(
        channels, blocks, splits, pieces, span, share, tiles, AXIS, ROWS, COLS, UNIT
    )
    center, rstd, scale, shift = fold(mean, var, weight, bias, step, gate, eps, group, c, channels, AXIS, WIDE)
    if slope is not None:
        along_x = kernels.per_channel(slope, c, channels, AXIS)
        constant = kernels.per_channel(offset, c, channels, AXIS)
    s0 = tl.zeros((ROWS, COLS), WIDE)
    s1 = tl.zeros((ROWS, COLS), WIDE)
    for t in tl.range(first, last, num_stages=STAGES):
        major, minor, exists, count, at, bytes_exist = kernels.place(
            t, group, c0, c, channels, length, chunks, AXIS, ROWS, COLS, UNIT
        )
        g = kernels.load(grad, pitch, major, minor, exists, UNIT, WIDE)
        if x is not None:
            v = kernels.load(x, x_pitch, major, minor, exists, UNIT, WIDE)
        if mask is not None:
            g = tl.where(kernels.unpack(tl.load(mask + at, mask=bytes_exist, other=0), ROWS, COLS), g, 0.0)
        elif RECOMPUTE:
            normed = kernels.stored(kernels.normalise(v, center, scale, shift), x)
            g = tl.where(normed <= 0, 0.0, g)
            if act is not None:
                kernels.store(act, out_pitch, kernels.relu(normed), major, minor, exists, UNIT)
        if sums is not None:
            s0 += g
            s1 += tl.where(exists, g * (v - center), 0.0)
        if dx is not None:
            d = scale * g
            if slope is not None:
                d += along_x * (v - center) + constant
            kernels.store(dx, out_pitch, d, major, minor, exists, UNIT)
        for i in tl.static_range(len(outs)):
            kernels.store(outs[i], out_pitch, kernels.scalar_of(coeffs[i], WIDE) * g, major, minor, exists, UNIT)
    if sums is not None:
        at = row.to(tl.int64) * channels + c
        tl.store(sums + at, tl.sum(s0, AXIS), mask=c < channels)
        tl.store(projections + at, tl.sum(s1 * rstd, AXIS), mask=c < channels)


@kernels.jit
def gradients_kernel(
    sums,  # [groups, rows, C]
    projections,  # [groups, rows, C]
    weight,  # [C] or None
    bias,  # [C] or None
    step,  # [groups, C] or None
    var,  # [C]
    eps,
    count,
    dweight,  # [groups, C]
    dbias,  # [groups, C]
    dstep,  # [groups, C] or None
    slope,  # [C] or None
    offset,  # [C] or None
    rows,
    channels,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    blocks = tl.cdiv(channels, COLS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    exists = c < channels
    at = group * channels + c
    s0 = kernels.column_sum(sums + group * rows * channels, rows, channels, c, ROWS, COLS, WIDE)
    s1 = kernels.column_sum(projections + group * rows * channels, rows, channels, c, ROWS, COLS, WIDE)
    w = tl.full((COLS,), 1.0, WIDE)
    if weight is not None:
        w = tl.load(weight + c, mask=exists, other=0.0)
    if dstep is not None:
        d = w * s1
        if bias is not None:
            d += tl.load(bias + c, mask=exists, other=0.0) * s0
        tl.store(dstep + at, d, mask=exists)
    if step is not None:
        h = tl.load(step + at, mask=exists, other=0.0)
        s0, s1 = h * s0, h * s1
    tl.store(dweight + at, s1, mask=exists)
    tl.store(dbias + at, s0, mask=exists)
    if slope is not None:
        rstd = tl.rsqrt(tl.load(var + c, mask=exists, other=1.0) + kernels.scalar_of(eps, WIDE))
        p = w * rstd / kernels.scalar_of(count, WIDE)
        tl.store(slope + c, -p * rstd * s1, mask=exists)
        tl.store(offset + c, -p * s0, mask=exists)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    step: Tensor | None,
    mask: Tensor | None,
    coeffs: list[float],
    channels_last: bool,
    relu: bool,
    batch_stats: bool,
    eps: float,
    need_x: bool,
    need_affine: bool,
    need_step: bool,
    act: Tensor | None = None,
) -> list[Tensor]:
    """act: where relu(BN(x)) is written as well, dense; of a ReLU without mask and step, by the pass that sums."""
    if x.numel() == 0:
        return reference.backward(
            grad, x, weight, bias, mean, var, step, mask, coeffs, channels_last, relu, batch_stats, eps, need_x,
            need_affine, need_step,
        )  # fmt: skip
    n, c = x.shape[:2]
    dtype = moments_dtype(x.dtype)
    grad, x = layout.conform(grad, channels_last), layout.conform(x, channels_last)
    dx = layout.empty(x, channels_last) if need_x else None
    outs = [layout.empty(x, channels_last) for _ in coeffs]
    vectors = _vectors(mean, var, weight, bias, step, dtype)
    recompute = relu and mask is None
    # dx waits for the sums where the statistics were taken from x.
    corrects = need_x and batch_stats
    reduces = corrects or need_affine or need_step

    def launch(reduces: bool, writes: bool, slope: Tensor | None = None, offset: Tensor | None = None) -> list[Tensor]:
        reads_x = reduces or recompute or slope is not None
        written = [*([] if dx is None else [dx]), *outs] if writes else []
        remade = act if reduces else None
        written += [] if remade is None else [remade]
        per_channel = reads_x or (writes and need_x)
        view = kernels.view([grad, x if reads_x else grad, *written], channels_last, per_channel, mask is not None)
        tiling = view.tiling(
            x.element_size(),
            operands=2 + len(written),
            sums=2 * reduces,
            per_sample=per_channel and step is not None and step.dim() == 2,
            reduces=reduces,
        )
        partials = [x.new_empty((tiling.partials, c), dtype=dtype) for _ in range(2 if reduces else 0)]
        pitch, x_pitch, *pitches = view.units(tiling)
        tiling.launch(
            _backward_kernel,
            x,
            grad,
            pitch,
            x if reads_x else None,
            x_pitch,
            mask,
            *vectors,
            kernels.scalar(eps, dtype),
            *(partials or (None, None)),
            slope,
            offset,
            remade,
            dx if writes else None,
            tuple(outs) if writes else (),
            pitches[0] if written else 0,
            tuple(kernels.scalar(each, dtype) for each in coeffs) if writes else (),
            RECOMPUTE=recompute,
            WIDE=kernels.WIDE[dtype],
            **({} if reduces else kernels.NO_TARGET),
        )
        return partials

    affine: list[Tensor] = []
    dstep = x.new_empty(step.shape, dtype=dtype) if need_step and step is not None else None
    corrections = [x.new_empty(c, dtype=dtype) for _ in range(2 if corrects else 0)]
    if reduces:
        sums, projections = launch(reduces=True, writes=not corrects)
        _, var_, weight_, bias_, step_, gate = vectors
        constants = (kernels.scalar(eps, dtype), kernels.scalar(x.numel() / c, dtype))
        if gate is not None:
            by_sample = [x.new_empty((n, c), dtype=dtype) for _ in range(2)]
            kernels.reduce(
                gradients_kernel, sums, n, sums.shape[0] // n, c,
                sums, projections, weight_, bias_, gate, var_, *constants, *by_sample, dstep, None, None,
            )  # fmt: skip
            projections, sums = by_sample
        affine = [x.new_empty(c, dtype=dtype) for _ in range(2)]
        kernels.reduce(
            gradients_kernel, sums, 1, sums.shape[0], c,
            sums, projections, weight_, bias_, step_, var_, *constants,
            *affine, dstep if gate is None else None, *(corrections or (None, None)),
        )  # fmt: skip
    if corrects or not reduces:
        launch(False, True, *corrections)
    return [
        *([] if dx is None else [dx]),
        *(affine if need_affine else []),
        *([] if dstep is None else [dstep]),
        *outs,
    ]
