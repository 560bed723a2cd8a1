"""bn_rk_sum in plain PyTorch: the definition of right, and what runs where no kernel can."""

from __future__ import annotations

import torch
from torch import Tensor

from rkfast.ops import checks, layout
from rkfast.ops.channel_moments import reference as channel_moments
from rkfast.ops.channel_moments.reference import moments_dtype, per_channel, sums
from rkfast.ops.rk_sum.reference import masked, pack


def _scaled_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, step: Tensor | None, eps: float
) -> Tensor:
    """step * BN(x) in float32 (float64)."""
    dtype = moments_dtype(x.dtype)
    scale = torch.rsqrt(var.to(dtype) + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    normed = (x.to(dtype) - per_channel(mean.to(dtype), x)) * per_channel(scale, x)
    if bias is not None:
        normed = normed + per_channel(bias.to(dtype), x)
    return normed if step is None else normed * per_channel(step.to(dtype), x)


def composite(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    terms: list[Tensor],
    coeffs: list[float],
    step: Tensor | None,
    relu: bool,
    eps: float,
    moments: bool,
) -> list[Tensor]:
    """[out], [x's mean and variance where not given], [out's where asked for]; differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        vectors: list[Tensor] = []
        if mean is None or var is None:
            mean, var = channel_moments.forward(x, False)
            vectors = [mean, var]
        total = _scaled_norm(x, weight, bias, mean, var, step, eps)
        for term, c in zip(terms, coeffs, strict=True):
            total = total + c * term.to(total.dtype)
        out = (torch.relu(total) if relu else total).to(x.dtype)
        if moments:
            vectors.extend(channel_moments.forward(out.detach(), False))
        return [out, *vectors]


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
    total, *vectors = composite(x, weight, bias, mean, var, terms, coeffs, step, relu, eps, moments)
    stored = (layout.empty(x, channels_last) if out is None else out).copy_(total)
    return [stored, *([pack(~(total <= 0), channels_last)] if mask else []), *vectors]


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
) -> list[Tensor]:
    dtype = moments_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if relu and mask is None:
            out = _scaled_norm(x, weight, bias, mean, var, step, eps).to(x.dtype)
            mask = pack(~(out <= 0), channels_last)
        g = masked(grad, mask, channels_last).to(dtype)
        rstd = torch.rsqrt(var.to(dtype) + eps)
        x_hat = (x.to(dtype) - per_channel(mean.to(dtype), x)) * per_channel(rstd, x)
        w = rstd.new_ones(x.shape[1]) if weight is None else weight.to(dtype)
        b = rstd.new_zeros(x.shape[1]) if bias is None else bias.to(dtype)
        per_sample = step is not None and step.dim() == 2
        h = rstd.new_ones(x.shape[1]) if step is None else step.to(dtype)
        s0, s1 = sums(g, per_sample), sums(g * x_hat, per_sample)  # [C] or [N, C]
        hs0, hs1 = ((h * s0).sum(0), (h * s1).sum(0)) if per_sample else (h * s0, h * s1)  # [C]
        result = []
        if need_x:
            dx = per_channel(h, x) * g
            if batch_stats:
                count = max(x.numel() // max(x.shape[1], 1), 1)
                dx = dx - per_channel(hs0 / count, x) - x_hat * per_channel(hs1 / count, x)
            result.append(layout.empty(x, channels_last).copy_(per_channel(w * rstd, x) * dx))
        if need_affine:
            result.extend((hs1, hs0))
        if need_step:
            result.append(w * s1 + b * s0)
        return [*result, *(layout.empty(x, channels_last).copy_(c * g) for c in coeffs)]


def gradients(
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
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """What backward gives each input, differentiable in grad, x, weight, bias and step."""
    need_terms, graph = needed[4:], torch.is_grad_enabled()
    with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
        x, weight, bias, step = map(checks.apart, (x, weight, bias, step))
        if batch_stats:
            mean, var = channel_moments.forward(x, channels_last)
        normed = _scaled_norm(x, weight, bias, mean, var, step, eps).to(x.dtype)
        if relu and mask is None:
            mask = pack(~(normed <= 0), channels_last)
        g = masked(grad, mask, channels_last)
        inputs = [t for t, need in zip((x, weight, bias, step), needed, strict=False) if t is not None and need]
        found = iter(torch.autograd.grad(normed, inputs, g, create_graph=graph) if inputs else ())
        return [
            *(
                next(found) if t is not None and need else None
                for t, need in zip((x, weight, bias, step), needed, strict=False)
            ),
            *(c * g if need else None for c, need in zip(coeffs, need_terms, strict=True)),
        ]
