"""rk_sum in Triton: one pass forward, one pass backward, and small kernels that finish the sums per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from rkfast.ops import kernels, layout
from rkfast.ops.channel_moments.reference import moments_dtype
from rkfast.ops.rk_sum import reference


@kernels.jit
def _forward_kernel(
    out,  # [N, C, ...]
    pitch,
    terms,  # tuple of [N, C, ...]
    pitches,  # tuple, kernels.odd
    coeffs,
    steps,  # tuple of [C] or None
    gates,  # tuple of [N, C] or None
    shift,  # [C] or None
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
    factors = ()
    for i in tl.static_range(len(terms)):
        factors = factors + (kernels.factor(coeffs[i], steps[i], gates[i], group, c, channels, AXIS, WIDE),)
    if shift is not None:
        added = kernels.per_channel(shift, c, channels, AXIS)
    n, center, sums, squares = kernels.no_moments(AXIS, ROWS, COLS, WIDE)
    for t in tl.range(first, last, num_stages=STAGES):
        major, minor, exists, count, at, bytes_exist = kernels.place(
            t, group, c0, c, channels, length, chunks, AXIS, ROWS, COLS, UNIT
        )
        total = factors[0] * kernels.load(terms[0], kernels.pitch_of(pitches[0]), major, minor, exists, UNIT, WIDE)
        for i in tl.static_range(1, len(terms)):
            total += factors[i] * kernels.load(terms[i], kernels.pitch_of(pitches[i]), major, minor, exists, UNIT, WIDE)
        if shift is not None:
            total += added
        if RELU:
            total = kernels.relu(total)
        total = kernels.stored(total, out)
        kernels.store(out, pitch, total, major, minor, exists, UNIT)
        if mask is not None:
            tl.store(mask + at, kernels.pack(exists & ~(total <= 0), ROWS, COLS), mask=bytes_exist)
        if partials is not None:
            n, center, sums, squares = kernels.add_moments(
                total, exists, count, t == first, n, center, sums, squares, AXIS
            )
    if partials is not None:
        kernels.store_moments(partials, row, rows, n, center, sums, squares, c, channels, AXIS)


def forward(
    terms: list[Tensor],
    coeffs: list[float],
    steps: list[Tensor | None],
    shift: Tensor | None,
    channels_last: bool,
    relu: bool,
    moments: bool,
    mask: bool,
    out: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    x = terms[0]
    if x.numel() == 0:
        return reference.forward(terms, coeffs, steps, shift, channels_last, relu, moments, mask, out)
    dtype = moments_dtype(x.dtype)
    terms = [layout.conform(t, channels_last) for t in terms]
    if out is None:
        out = layout.empty(x, channels_last)
    bits = x.new_empty(layout.mask_shape(x, channels_last), dtype=torch.uint8) if mask else None
    per_channel = moments or shift is not None or any(step is not None for step in steps)
    view = kernels.view([out, *terms], channels_last, per_channel, mask)
    tiling = view.tiling(
        x.element_size(),
        operands=1 + len(terms),
        vectors=_count(steps),
        sums=2 * moments,
        per_sample=_any_per_sample(steps),
        reduces=moments,
    )
    partials = kernels.empty_partials(x, 3, tiling, dtype) if moments else None
    pitch, *pitches = view.units(tiling)
    tiling.launch(
        _forward_kernel,
        x,
        out,
        pitch,
        tuple(terms),
        kernels.odd(pitches),
        tuple(kernels.scalar(c, dtype) for c in coeffs),
        *_factors(steps, dtype),
        kernels.vector(shift, dtype),
        bits,
        partials,
        tiling.partials,
        RELU=relu,
        WIDE=kernels.WIDE[dtype],
        **kernels.NO_TARGET,
    )
    return [
        out,
        *([] if bits is None else [bits]),
        *([] if partials is None else kernels.merge_moments(partials, into)),
    ]


def _count(steps: Sequence[Tensor | None]) -> int:
    return sum(step is not None for step in steps)


def _any_per_sample(steps: Sequence[Tensor | None]) -> bool:
    return any(step is not None and step.dim() == 2 for step in steps)


def _factors(
    steps: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """The steps per channel and those per sample and channel, each in its place."""
    vectors = [kernels.vector(step, dtype) for step in steps]
    return (
        tuple(v if v is not None and v.dim() == 1 else None for v in vectors),
        tuple(v if v is not None and v.dim() == 2 else None for v in vectors),
    )


@kernels.jit
def _backward_kernel(
    grad,  # [N, C, ...]
    pitch,
    mask,  # [rows of grad, bytes] or None
    outs,  # tuple of [N, C, ...]
    out_pitch,
    coeffs,
    steps,  # tuple of [C] or None
    gates,  # tuple of [N, C] or None
    terms,  # tuple of [N, C, ...], each multiplied with grad and summed
    pitches,  # tuple, kernels.odd
    partials,  # tuple of [rows, C], one per term, then one for the sum of grad itself if there is one more
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
    factors = ()
    for i in tl.static_range(len(outs)):
        factors = factors + (kernels.factor(coeffs[i], steps[i], gates[i], group, c, channels, AXIS, WIDE),)
    sums = ()
    for _ in tl.static_range(len(partials)):
        sums = sums + (tl.zeros((ROWS, COLS), WIDE),)
    for t in tl.range(first, last, num_stages=STAGES):
        major, minor, exists, count, at, bytes_exist = kernels.place(
            t, group, c0, c, channels, length, chunks, AXIS, ROWS, COLS, UNIT
        )
        g = kernels.load(grad, pitch, major, minor, exists, UNIT, WIDE)
        if mask is not None:
            g = tl.where(kernels.unpack(tl.load(mask + at, mask=bytes_exist, other=0), ROWS, COLS), g, 0.0)
        for i in tl.static_range(len(outs)):
            kernels.store(outs[i], out_pitch, factors[i] * g, major, minor, exists, UNIT)
        added = ()
        for i in tl.static_range(len(partials)):
            if i < len(terms):
                v = g * kernels.load(terms[i], kernels.pitch_of(pitches[i]), major, minor, exists, UNIT, WIDE)
            else:
                v = g
            added = added + (sums[i] + v,)
        sums = added
    for i in tl.static_range(len(partials)):
        tl.store(partials[i] + (row.to(tl.int64) * channels + c), tl.sum(sums[i], AXIS), mask=c < channels)


@kernels.jit
def _sums_kernel(
    partials,  # tuple of [groups, rows, C]
    outs,  # tuple of [groups, C]
    coeffs,
    rows,
    channels,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    blocks = tl.cdiv(channels, COLS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    for i in tl.static_range(len(partials)):
        total = kernels.column_sum(partials[i] + group * rows * channels, rows, channels, c, ROWS, COLS, WIDE)
        tl.store(outs[i] + group * channels + c, kernels.scalar_of(coeffs[i], WIDE) * total, mask=c < channels)


def add_up(partials: Tensor, out: Tensor) -> None:
    """The sums over the rows of partials [rows, C] -> out [C], of any dtype."""
    kernels.reduce(_sums_kernel, partials, 1, *partials.shape, (partials,), (out,), (1.0,))


def backward(
    grad: Tensor,
    mask: Tensor | None,
    coeffs: list[float],
    steps: list[Tensor | None],
    step_terms: list[Tensor],
    step_coeffs: list[float],
    per_sample: list[bool],
    shift: bool,
    channels_last: bool,
) -> list[Tensor]:
    if grad.numel() == 0:
        return reference.backward(grad, mask, coeffs, steps, step_terms, step_coeffs, per_sample, shift, channels_last)
    n, c = grad.shape[:2]
    dtype = moments_dtype(grad.dtype)
    grad = layout.conform(grad, channels_last)
    terms = [layout.conform(t, channels_last) for t in step_terms]
    outs = [layout.empty(grad, channels_last) for _ in coeffs]
    by_sample = [*per_sample, *([False] if shift else [])]
    view = kernels.view(
        [grad, *outs, *terms],
        channels_last,
        per_channel=bool(by_sample) or any(step is not None for step in steps),
        mask=mask is not None,
    )
    tiling = view.tiling(
        grad.element_size(),
        operands=1 + len(terms) + len(outs),
        vectors=_count(steps),
        sums=len(by_sample),
        per_sample=any(by_sample) or _any_per_sample(steps),
        reduces=bool(by_sample),
    )
    partials = [grad.new_empty((tiling.partials, c), dtype=dtype) for _ in by_sample]
    units = view.units(tiling)
    tiling.launch(
        _backward_kernel,
        grad,
        grad,
        units[0],
        mask,
        tuple(outs),
        units[1] if outs else 0,
        tuple(kernels.scalar(each, dtype) for each in coeffs),
        *_factors(steps, dtype),
        tuple(terms),
        kernels.odd(units[1 + len(outs) :]),
        tuple(partials),
        WIDE=kernels.WIDE[dtype],
    )
    sums = [grad.new_empty((n, c) if each else (c,), dtype=dtype) for each in by_sample]
    factors = [*step_coeffs, 1.0]
    for groups, selected in (
        (n, [i for i, each in enumerate(by_sample) if each]),
        (1, [i for i, each in enumerate(by_sample) if not each]),
    ):
        if selected:
            kernels.reduce(
                _sums_kernel,
                sums[0],
                groups,
                tiling.partials // groups,
                c,
                tuple(partials[i] for i in selected),
                tuple(sums[i] for i in selected),
                tuple(kernels.scalar(factors[i], dtype) for i in selected),
            )
    return [*outs, *sums]
