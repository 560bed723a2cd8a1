"""Tensors made in inference mode, which autograd does not keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rkfast import ops
from rkfast.ops import Norm


def norm(x: Tensor) -> Norm:
    c = x.shape[1]
    counter = torch.zeros((), dtype=torch.int64)
    return Norm(torch.ones(c, requires_grad=True), torch.zeros(c), torch.zeros(c), torch.ones(c), counter)


def bn_rk_sum(x: Tensor, found: Norm) -> Tensor:
    tracked = {"num_batches_tracked": found.num_batches_tracked}
    return ops.bn_rk_sum(x, *found[:4], training=True, momentum=0.1, eps=1e-5, **tracked)


def bn_relu_conv(x: Tensor, found: Norm) -> Tensor:
    return ops.bn_relu_conv(x, torch.ones(4, x.shape[1], 1, 1, dtype=x.dtype), found)


def bn_relu_pool(x: Tensor, found: Norm) -> Tensor:
    return ops.bn_relu_pool(x, found)


def residual_block(x: Tensor, found: Norm) -> Tensor:
    return ops.residual_block(x, [torch.ones(x.shape[1], x.shape[1], 1, 1, dtype=x.dtype)], [found])


@pytest.mark.parametrize("op", (bn_rk_sum, bn_relu_conv, bn_relu_pool, residual_block))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_statistics_stay_where_x_cannot_be_kept(op: Callable[[Tensor, Norm], Tensor], dtype: torch.dtype) -> None:
    with torch.inference_mode():
        x = torch.randn(2, 16, 5, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    found = norm(x)
    with pytest.raises(RuntimeError, match=r"x: an inference tensor .* clone it"):
        op(x, found)
    assert not found.running_mean.any() and found.num_batches_tracked == 0  # type: ignore[union-attr]
    op(x.clone(), found).sum().backward()
    assert found.num_batches_tracked == 1
    with torch.no_grad():
        op(x, found)
    assert found.num_batches_tracked == 2


def test_nor_what_else_is_kept() -> None:
    x = torch.randn(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    found = norm(x)
    with torch.inference_mode():
        step = torch.ones(16)
    with pytest.raises(RuntimeError, match="step: an inference tensor"):
        ops.residual_block(x, [torch.ones(16, 16, 1, 1)], [found], step=step)
    tracked = {"num_batches_tracked": found.num_batches_tracked}
    with pytest.raises(RuntimeError, match="step: an inference tensor"):
        ops.bn_rk_sum(x, *found[:4], step=step, training=True, momentum=0.1, eps=1e-5, **tracked)
    assert not found.running_mean.any() and found.num_batches_tracked == 0  # type: ignore[union-attr]


def test_a_sum_keeps_no_term() -> None:
    with torch.inference_mode():
        x = torch.randn(2, 3, 4, 4)
    y = torch.randn(2, 3, 4, 4, requires_grad=True)
    ops.rk_sum([x, y], [1.0, 2.0]).sum().backward()
    assert torch.equal(y.grad, torch.full_like(y, 2.0))  # type: ignore[arg-type]
