"""conv in plain PyTorch: the definition of right, and what runs where no kernel can."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import layout
from rkfast.ops.channel_moments import reference as channel_moments


def composite(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, relu: bool) -> Tensor:
    """Differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        out = F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)
        out = out if other is None else out + other
        return torch.relu(out) if relu else out


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    channels_last: bool,
    relu: bool,
    moments: bool,
    statistics: ModuleType = channel_moments,
) -> list[Tensor]:
    """statistics: a backend's channel_moments."""
    weight = untiled(weight) if weight.dim() == 3 else weight
    out = laid(composite(x, weight, bias, other, relu), channels_last)
    return [out, *(statistics.forward(out, channels_last) if moments else ())]


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    other: Tensor | None,
    channels_last: bool,
    need_x: bool,
    need_weight: bool,
) -> list[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        dx, dweight = gradients(grad, x, weight, need_x, need_weight)
        if dx is not None:
            dx = laid(dx if other is None else dx + other, channels_last)
        return [
            *(() if dx is None else (dx,)),
            *(() if dweight is None else (torch.empty_like(weight).copy_(dweight),)),
        ]


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, stride: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    """Those of ``F.conv2d(x, weight, stride=stride, padding=n // 2)``."""
    pad = weight.shape[2] // 2
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [pad, pad], [1, 1], False, [0, 0], 1, [need_x, need_weight, False]
    )
    return dx, dweight


def laid(out: Tensor, channels_last: bool) -> Tensor:
    """out dense in the layout asked for."""
    if out.stride() == layout.strides(out.shape, channels_last):
        return out
    return layout.empty(out, channels_last).copy_(out)


_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))  # of F(2x2, 3x3): tiles are G w G^T


def _transform(like: Tensor) -> Tensor:
    g = torch.tensor(_G, dtype=torch.float64, device=like.device)
    return torch.kron(g, g)


def tiled(weight: Tensor) -> Tensor:
    """weight, Tensor [K, C, 3, 3], by tiles: [16, C, K]."""
    taps = weight.double().permute(2, 3, 1, 0)
    return (_transform(weight) @ taps.flatten(2).flatten(0, 1)).view(16, *taps.shape[2:]).to(weight.dtype)


def untiled(tiles: Tensor) -> Tensor:
    """The weight, Tensor [K, C, 3, 3], of tiles [16, C, K], to a rounding."""
    taps = torch.linalg.pinv(_transform(tiles)) @ tiles.double().flatten(1)
    return taps.view(3, 3, *tiles.shape[1:]).permute(3, 2, 0, 1).to(tiles.dtype)
