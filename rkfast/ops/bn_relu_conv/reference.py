"""bn_relu_conv in plain PyTorch: the definition of right, and what runs where no kernel can."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import checks
from rkfast.ops.bn_rk_sum import reference as bn_rk_sum
from rkfast.ops.channel_moments import reference as channel_moments
from rkfast.ops.conv.reference import gradients as conv_gradients
from rkfast.ops.conv.reference import laid


def composite(
    x: Tensor,
    conv: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    moments: bool,
) -> list[Tensor]:
    """[out], [x's mean and variance where not given], [out's where asked for]; differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        act, *vectors = bn_rk_sum.composite(x, weight, bias, mean, var, [], [], None, True, eps, False)
        out = F.conv2d(act, conv, padding=conv.shape[2] // 2)
        return [out, *vectors, *(channel_moments.forward(out.detach(), False) if moments else ())]


def forward(
    x: Tensor,
    conv: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    channels_last: bool,
    eps: float,
    moments: bool,
    norms: ModuleType = bn_rk_sum,
    statistics: ModuleType = channel_moments,
) -> list[Tensor]:
    """norms, statistics: a backend's bn_rk_sum and channel_moments."""
    with torch.autocast(x.device.type, enabled=False):
        act, *vectors = norms.forward(x, weight, bias, mean, var, [], [], None, channels_last, True, eps, False, False)
        out = laid(F.conv2d(act, conv, padding=conv.shape[2] // 2), channels_last)
        return [out, *vectors, *(statistics.forward(out, channels_last) if moments else ())]


def backward(
    grad: Tensor,
    x: Tensor,
    conv: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    channels_last: bool,
    batch_stats: bool,
    eps: float,
    need_x: bool,
    need_conv: bool,
    need_affine: bool,
    norms: ModuleType = bn_rk_sum,
) -> list[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        act = norms.forward(x, weight, bias, mean, var, [], [], None, channels_last, True, eps, False, False)[0]
        dact, dconv = conv_gradients(grad, act, conv, need_x or need_affine, need_conv)
        affine: list[Tensor] = []
        result: list[Tensor] = []
        if dact is not None:
            affine = norms.backward(
                dact, x, weight, bias, mean, var, None, None, [], channels_last, True, batch_stats, eps, need_x,
                need_affine, False,
            )  # fmt: skip
            result, affine = (affine[:1], affine[1:]) if need_x else ([], affine)
        if dconv is not None:
            result.append(torch.empty_like(conv).copy_(dconv))
        return [*result, *affine]


def gradients(
    grad: Tensor,
    x: Tensor,
    conv: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """What backward gives each input, differentiable in grad, x, conv, weight and bias. statistics: None for those of
    x."""
    graph = torch.is_grad_enabled()
    mean, var = statistics or (None, None)
    with torch.enable_grad():
        x, conv, weight, bias = inputs = [checks.apart(t) for t in (x, conv, weight, bias)]
        out = composite(x, conv, weight, bias, mean, var, eps, False)[0]
    wanted = [t for t, need in zip(inputs, needed, strict=True) if t is not None and need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=graph))
    return [next(found) if t is not None and need else None for t, need in zip(inputs, needed, strict=True)]
