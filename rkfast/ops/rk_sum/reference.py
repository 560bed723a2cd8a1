"""rk_sum in plain PyTorch: the definition of right, and what runs where no kernel can."""

from __future__ import annotations

import torch
from torch import Tensor

from rkfast.ops import layout
from rkfast.ops.channel_moments import reference as channel_moments
from rkfast.ops.channel_moments.reference import moments_dtype, per_channel, sums


def weighted_sum(
    terms: list[Tensor], coeffs: list[float], steps: list[Tensor | None], shift: Tensor | None, relu: bool
) -> Tensor:
    """act(sum_j coeffs[j] * steps[j] * terms[j] + shift), accumulated in float32 (float64), rounded once."""
    x = terms[0]  # [N, C, ...]
    dtype = moments_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        total = None
        for term, c, step in zip(terms, coeffs, steps, strict=True):
            scaled = c * term.to(dtype)
            if step is not None:
                scaled = scaled * per_channel(step.to(dtype), x)
            total = scaled if total is None else total + scaled
        assert total is not None
        if shift is not None:
            total = total + per_channel(shift.to(dtype), x)
        return (torch.relu(total) if relu else total).to(x.dtype)


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
) -> list[Tensor]:
    total = weighted_sum(terms, coeffs, steps, shift, relu)
    stored = (layout.empty(total, channels_last) if out is None else out).copy_(total)
    result = [stored]
    if mask:
        result.append(pack(~(total <= 0), channels_last))
    if moments:
        result.extend(channel_moments.forward(stored, channels_last))
    return result


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
    dtype = moments_dtype(grad.dtype)
    g = masked(grad, mask, channels_last).to(dtype)
    scaled = (
        c * g if step is None else c * per_channel(step.to(dtype), grad) * g
        for c, step in zip(coeffs, steps, strict=True)
    )
    return [
        *(layout.empty(grad, channels_last).copy_(each) for each in scaled),
        *(c * sums(g * t.to(dtype), each) for t, c, each in zip(step_terms, step_coeffs, per_sample, strict=True)),
        *([sums(g, False)] if shift else []),
    ]


def gradients(
    grad: Tensor,
    mask: Tensor | None,
    coeffs: list[float],
    step_at: tuple[int, ...],
    steps: list[Tensor],
    step_terms: list[Tensor | None],
    has_shift: bool,
    needed: tuple[bool, ...],
    channels_last: bool,
) -> list[Tensor | None]:
    """What backward gives each input, differentiable in grad, steps and terms."""
    dtype = moments_dtype(grad.dtype)
    n = len(coeffs)
    step_of = dict(zip(step_at, steps, strict=True))
    result: list[Tensor | None] = [None] * len(needed)
    with torch.autocast(grad.device.type, enabled=False):
        g = masked(grad, mask, channels_last).to(dtype)
        for i, c in enumerate(coeffs):
            if needed[i]:
                scaled = c * g if i not in step_of else c * per_channel(step_of[i].to(dtype), grad) * g
                result[i] = scaled.to(grad.dtype)
        for k, (i, step, term) in enumerate(zip(step_at, steps, step_terms, strict=True)):
            if term is not None:
                result[n + k] = (coeffs[i] * sums(g * term.to(dtype), step.dim() == 2)).to(step.dtype)
        if has_shift and needed[-1]:
            result[-1] = sums(g, False)
    return result


def masked(grad: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
    """grad where the mask is set, else 0 (also where grad is not finite)."""
    if mask is None:
        return grad
    return torch.where(unpack(mask, grad, channels_last), grad, torch.zeros((), dtype=grad.dtype, device=grad.device))


def pack(keep: Tensor, channels_last: bool) -> Tensor:
    """Booleans [N, C, ...] as bits, uint8 [rows, ceil(length / 8)], lowest bit first (layout.mask_shape)."""
    outer, inner, length = layout.rows(keep, channels_last)
    bits = (keep.movedim(1, -1) if channels_last else keep).reshape(outer * inner, length)
    bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, -length % 8)).unflatten(1, ((length + 7) // 8, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(-1, dtype=torch.uint8)


def unpack(mask: Tensor, x: Tensor, channels_last: bool) -> Tensor:
    """The booleans that ``pack`` was given, in the shape of x."""
    _, _, length = layout.rows(x, channels_last)
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    bits = bits.flatten(1)[:, :length].bool()
    n, c, *spatial = x.shape
    return bits.reshape(n, *spatial, c).movedim(-1, 1) if channels_last else bits.reshape(x.shape)
