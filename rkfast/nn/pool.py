"""Averages and maxima over positions, of which backward needs less than PyTorch keeps or writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast.nn.norm import activated, as_norm, batch_norm_relu, hooked, serves
from rkfast.ops import Moments, bn_relu_pool
from rkfast.ops.bn_relu_pool import kernel_reason


def global_average(x: Tensor) -> Tensor:
    """``x.mean((2, 3))``, Tensor [N, C], whose gradient is in the layout of x."""
    if torch.is_grad_enabled() and x.requires_grad and x.stride(1) == 1:
        return x.permute(0, 2, 3, 1).mean((1, 2))
    return x.mean((2, 3))


class _Pool(torch.autograd.Function):
    """nn.AvgPool2d(2), which keeps all of its input for the backward to know its size."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.given = (inputs[0].shape, inputs[0].stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        shape, strides = ctx.given
        like = grad.new_empty_strided(shape, strides)
        return torch.ops.aten.avg_pool2d_backward(grad, like, [2, 2], [2, 2], [0, 0], False, True, None)


def average(pool: nn.Module, x: Tensor) -> Tensor:
    """``pool(x)`` with an nn.AvgPool2d, which where it is one over 2x2 keeps nothing."""
    return _Pool.apply(x) if _halves(pool) else pool(x)


def _halves(pool: nn.Module) -> bool:
    given = pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.divisor_override
    return given == (2, 2, 0, False, None)


def average_of_norm(pool: nn.Module, norm: nn.Module, x: Tensor, moments: Moments | None = None) -> Tensor:
    """``average(pool, batch_norm_relu(norm, x, moments))``, in one pass where that is the better choice."""
    if _halves(pool) and (serves(norm, x) or activated(norm)) and kernel_reason(x) is None:
        given = as_norm(norm)
        return bn_relu_pool(x, given, moments=moments if given.batch and not given.group else None)
    return average(pool, batch_norm_relu(norm, x, moments))


class _MaxPool(torch.autograd.Function):
    """nn.MaxPool2d, which keeps all of its input for the backward to know its size."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *window: Any) -> tuple[Tensor, Tensor]:
        return F.max_pool2d_with_indices(x, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *ctx.window = inputs
        ctx.given = (x.shape, x.stride())
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        if grad is None:
            return (None,) * 6
        (indices,) = ctx.saved_tensors
        shape, strides = ctx.given
        like = grad.new_empty_strided(shape, strides)
        *window, ceil_mode = ctx.window
        pairs = [[v, v] if isinstance(v, int) else list(v) for v in window]
        dx = torch.ops.aten.max_pool2d_with_indices_backward(grad, like, *pairs, ceil_mode, indices)
        return (dx, None, None, None, None, None)


def max_pool(pool: nn.Module, x: Tensor, *, fused: bool) -> Tensor:
    """``pool(x)``, which where pool is an nn.MaxPool2d without hooks keeps where the maxima are, and nothing else."""
    if not fused or type(pool) is not nn.MaxPool2d or hooked(pool) or pool.return_indices:
        return pool(x)
    if not (torch.is_grad_enabled() and x.requires_grad):  # nothing is kept, and Dynamo would not take the function
        return pool(x)
    return _MaxPool.apply(x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)[0]
