"""DenseLayer, DenseBlock, ERKStep and TimePeriod against their formulas, written out with torch.nn.functional."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast import dispatch
from rkfast.nn import DenseBlock, ERKStep, TimePeriod


def normed(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """relu(BatchNorm(x)) with the statistics of x, from their definition."""
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    scale, shift = (p.view(1, -1, 1, 1) for p in (norm.weight, norm.bias))
    return torch.clamp((x - mean) / torch.sqrt(var + norm.eps) * scale + shift, min=0)


def growths(block: DenseBlock, y: Tensor, time: float | None = None) -> list[Tensor]:
    parts: list[Tensor] = []
    for i in range(len(block)):
        layer = block[f"denselayer{i + 1}"]
        x = normed(layer.norm1, torch.cat([y, *parts], 1))
        if time is not None:
            x = torch.cat([x, torch.full_like(x[:, :1], time)], 1)
        x = F.conv2d(x, layer.conv1.weight, padding=layer.conv1.weight.shape[2] // 2)
        if hasattr(layer, "conv2"):
            x = F.conv2d(normed(layer.norm2, x), layer.conv2.weight, padding=1)
        parts.append(x)
    return parts


def filled(module: nn.Module) -> Any:
    """In float64, with BatchNorms that do something."""
    torch.manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return module.double()


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize("bottleneck", (None, 6))
def test_dense_block(bottleneck: int | None, fused: bool) -> None:
    block = filled(DenseBlock(3, 5, 4, bottleneck=bottleneck, fused=fused))
    y = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    out = block(y)
    assert out.shape == (2, 5 + 3 * 4, 6, 7)
    torch.testing.assert_close(out, torch.cat([y, *growths(block, y)], 1))


def test_keys_are_torchvisions() -> None:
    names = [n for n, _ in DenseBlock(2, 5, 4, bottleneck=6)["denselayer2"].named_children()]
    assert names == ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"]
    assert [n for n, _ in DenseBlock(2, 5, 4)["denselayer2"].named_children()] == ["norm1", "relu1", "conv1"]


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize("bottleneck", (None, 6))
@pytest.mark.parametrize(("stages", "m"), ((1, 1), (3, 1), (2, 3), (20, 1)))
def test_erk_step(stages: int, m: int, bottleneck: int | None, fused: bool) -> None:
    """Also with more increments than one sum takes terms."""
    k = 2
    step = filled(ERKStep(stages, k, m=m, bottleneck=bottleneck, fused=fused))
    y = torch.randn(2, m * k, 5, 6, dtype=torch.float64)
    before = sum(count for (op, _), count in dispatch.served().items() if op == "rk_sum")
    out = step(y)
    calls = sum(count for (op, _), count in dispatch.served().items() if op == "rk_sum") - before
    assert calls == (0 if not fused else 2 if stages > 15 else 1)
    parts = growths(step, y)
    assert len(parts) == m * stages
    expected = y + sum(torch.cat(parts[i * m : (i + 1) * m], 1) for i in range(stages))
    torch.testing.assert_close(out, expected)
    if fused:
        again, moments = step.forward_with_moments(y, return_moments=True)
        torch.testing.assert_close(again, expected)
        assert moments is not None
        torch.testing.assert_close(moments.mean, expected.mean((0, 2, 3)))
        torch.testing.assert_close(moments.var, expected.var((0, 2, 3), correction=0))


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize("bottleneck", (None, 6))
def test_time_channel(bottleneck: int | None, fused: bool) -> None:
    """y' = y + (h/u) Q(T/u, y), and T is the sum of the steps before."""
    steps = [ERKStep(1, 2, m=2, bottleneck=bottleneck, time_channel=True, fused=fused) for _ in range(3)]
    period = filled(TimePeriod(*steps))
    for step, root in zip(steps, (0.5, -1.5, 2.0), strict=True):
        nn.init.constant_(step.sqrt_step, root)
    y = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected, time = y, 0.0
    for step, size in zip(steps, (0.25, 2.25, 4.0), strict=True):
        expected = expected + size * torch.cat(growths(step, expected, time), 1)
        time += size
    out = period(y)
    torch.testing.assert_close(out, expected)
    assert period.step_sizes() == [0.25, 2.25, 4.0]
    assert period.times() == [0.0, 0.25, 2.5, 6.5]
    out.square().mean().backward()
    # Each but the last moves later times too.
    assert all(step.sqrt_step.grad.abs() > 0 for step in steps)
    steps[0].sqrt_step.grad = None
    torch.testing.assert_close(steps[0](y), steps[0](y, torch.zeros((), dtype=torch.float64)))


def test_dropout_comes_before_the_sum() -> None:
    torch.manual_seed(0)
    step = ERKStep(2, 2, m=2, drop_rate=0.5)
    y = torch.randn(4, 4, 6, 6)
    dropped = (step(y) - y) == 0
    assert 0.15 < dropped.float().mean() < 0.35  # both increments at once
    assert not ((step.eval()(y) - y) == 0).any()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    (
        ((0, 4), {}, "stages: expected at least 1, got 0"),
        ((2, 0), {}, "growth_rate: expected at least 1, got 0"),
        ((2, 4), {"m": 0}, "m: expected at least 1, got 0"),
        ((2, 4), {"time_channel": True}, r"stages: a time channel goes with 1 stage \(the Euler method\), got 2"),
    ),
)
def test_bad_arguments(arguments: tuple[int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ERKStep(*arguments, **options)
    with pytest.raises(RuntimeError, match="step_size: this step has no time channel"):
        ERKStep(1, 2).step_size()
