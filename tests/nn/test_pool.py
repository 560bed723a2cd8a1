"""rkfast.nn.pool beside PyTorch's operations; average is tested with the transitions that use it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rkfast.nn.pool import global_average, max_pool


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_gradient_of_a_global_average_is_in_the_layout_of_its_input(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    y = x * 1
    seen: list[torch.Tensor] = []
    y.register_hook(seen.append)
    result = global_average(y)
    torch.testing.assert_close(result, x.mean((2, 3)))
    result.backward(torch.arange(6.0, dtype=torch.float64).view(2, 3))
    assert seen[0].stride() == y.stride()
    torch.testing.assert_close(seen[0], (torch.arange(6.0, dtype=torch.float64).view(2, 3, 1, 1) / 20).expand_as(x))


def test_global_average_is_mapped_and_differentiated_by_torch_func() -> None:
    x = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64)

    def squared(sample: torch.Tensor) -> torch.Tensor:
        return global_average(sample.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)).square().sum()

    found = torch.func.vmap(torch.func.grad(squared))(x)
    expected = torch.stack([2 * s.mean((2, 3))[..., None, None].expand_as(s) / 25 for s in x])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("size", ((8, 8), (7, 9)))
def test_max_pool(size: tuple[int, int], layout: torch.memory_format) -> None:
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    x = torch.randn(2, 5, *size).contiguous(memory_format=layout)
    grads = []
    for fused in (True, False):
        t = x.clone().requires_grad_()
        y = max_pool(pool, t, fused=fused)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        grads.append((y.detach(), t.grad))
        assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_max_pool_compiles_where_nothing_is_kept() -> None:
    pool, x = nn.MaxPool2d(3, 2, 1), torch.randn(2, 3, 9, 9)
    compiled = torch.compile(lambda x: max_pool(pool, x, fused=True), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), pool(x))
    x.requires_grad_()
    assert torch.equal(compiled(x), pool(x))
