"""Rows that lie 2^31 elements apart, in memory of which little is touched, by the C++ kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rkfast
from rkfast import native, ops
from rkfast.ops import layout

FAR = 2**31 + 16
BATCH = {"training": True, "momentum": 0.1, "eps": 1e-5}
# Samples that far apart, or the first position from the last.
WAYS = {"contiguous": ((2, 4, 3, 3), (FAR, 9, 3, 1)), "channels_last": ((1, 4, 3, 1), (3 * FAR, 1, FAR // 2, FAR // 2))}


def far(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty(FAR + 64, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


def results(x: Tensor, y: Tensor, grad: Tensor, out: Tensor) -> list[Tensor]:
    leaves = x.requires_grad_(), y.requires_grad_()
    v = torch.linspace(0.5, 1.5, 4)
    with rkfast.use("cpu"):
        total, moments = ops.rk_sum([x, y], [1.0, 0.5], steps=[v, None], relu=True, return_moments=True)
        joined = ops.bn_rk_sum(x, v, v, None, None, terms=[y], coeffs=[1.0], relu=True, **BATCH)
        found = [t for made in (total, joined) for t in torch.autograd.grad(made, leaves, grad)]
        with torch.no_grad():
            ops.rk_sum([x, y], [1.0, -1.0], out=out)
        return [total, *moments[:2], joined, *found, *ops.channel_moments(y.detach())[:2], out.clone()]


@pytest.mark.skipif(native.cpu_reason() is not None, reason="there are no C++ kernels")
@pytest.mark.parametrize("way", WAYS)
def test_offsets_have_64_bits(way: str) -> None:
    shape, strides = WAYS[way]
    torch.manual_seed(0)
    values = [torch.randn(shape).half() for _ in range(4)]
    apart = [far(t, strides) for t in values]
    assert all(layout.is_rows(t, way == "channels_last") for t in apart)
    near = [layout.empty(t, way == "channels_last").copy_(t) for t in values]
    for a, b in zip(results(*apart), results(*near), strict=True):
        assert torch.equal(a, b)
