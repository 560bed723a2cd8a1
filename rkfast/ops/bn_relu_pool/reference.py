"""bn_relu_pool in plain PyTorch: the definition of right, and what runs where no kernel can."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import checks
from rkfast.ops.bn_rk_sum import reference as bn_rk_sum
from rkfast.ops.conv.reference import laid


def composite(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """[out], [x's mean and variance where not given]; differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        act, *vectors = bn_rk_sum.composite(x, weight, bias, mean, var, [], [], None, True, eps, False)
        return [F.avg_pool2d(act, 2), *vectors]


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    channels_last: bool,
    eps: float,
) -> Tensor:
    return laid(composite(x, weight, bias, mean, var, eps)[0], channels_last)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    channels_last: bool,
    batch_stats: bool,
    eps: float,
    need_x: bool,
    need_affine: bool,
) -> list[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        dact = torch.ops.aten.avg_pool2d_backward(grad, x, [2, 2], [2, 2], [0, 0], False, True, None)
        return bn_rk_sum.backward(
            dact, x, weight, bias, mean, var, None, None, [], channels_last, True, batch_stats, eps, need_x,
            need_affine, False,
        )  # fmt: skip


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """What backward gives each input, differentiable in grad, x, weight and bias. statistics: None for those of x."""
    graph = torch.is_grad_enabled()
    mean, var = statistics or (None, None)
    with torch.enable_grad():
        x, weight, bias = inputs = [checks.apart(t) for t in (x, weight, bias)]
        out = composite(x, weight, bias, mean, var, eps)[0]
    wanted = [t for t, need in zip(inputs, needed, strict=True) if t is not None and need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=graph))
    return [next(found) if t is not None and need else None for t, need in zip(inputs, needed, strict=True)]
