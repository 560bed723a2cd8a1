"""CliqueBlock, IRKStep and RKCNNStep against their formulas, one convolution for each pair of stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast.nn import CliqueBlock, IRKStep, RKCNNStep
from tests.nn.test_dense import filled, normed


def pair(block: CliqueBlock, j: int, i: int) -> Tensor:
    """W_ji, from the paper's order W_0i, W_1i, ... without W_ii."""
    c, k = block.in_channels, block.growth_rate
    weight = block.weight1[i - 1]
    if j == 0:
        return weight[:, :c]
    place = [other for other in range(1, block.stages + 1) if other != i].index(j)
    return weight[:, c + place * k : c + (place + 1) * k]


def update(block: CliqueBlock, i: int, inputs: dict[int, Tensor], norm1: nn.Module, norm2: Any) -> Tensor:
    x = normed(norm1, torch.cat(list(inputs.values()), 1))  # type: ignore[arg-type]
    parts = dict(zip(inputs, x.split([t.shape[1] for t in inputs.values()], 1), strict=True))
    kernel = block.weight1[0].shape[2]
    total = sum(F.conv2d(part, pair(block, j, i), padding=kernel // 2) for j, part in parts.items())
    assert isinstance(total, Tensor)
    return total if block.weight2 is None else F.conv2d(normed(norm2, total), block.weight2[i - 1], padding=1)


def expected(block: CliqueBlock, y: Tensor) -> list[Tensor]:
    s, now = block.stages, {0: y}
    neck = block.weight2 is not None
    for i in range(1, s + 1):
        now[i] = update(block, i, dict(now), block.init_norm1[i - 1], block.init_norm2[i - 1] if neck else None)
    for n in range(block.rounds):
        for i in range(1, s + 1):
            place = n * s + i - 1
            # In the order of their numbers, each as it is now: z_j before i, v_j behind it.
            inputs = {j: now[j] for j in range(1, s + 1) if j != i}
            now[i] = update(block, i, inputs, block.update_norm1[place], block.update_norm2[place] if neck else None)
    return [now[i] for i in range(1, s + 1)]


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize("rounds", (1, 2))
@pytest.mark.parametrize("bottleneck", (None, 6))
@pytest.mark.parametrize("stages", (2, 4))
def test_clique_block(stages: int, bottleneck: int | None, rounds: int, fused: bool) -> None:
    block = filled(CliqueBlock(5, 3, stages, bottleneck=bottleneck, rounds=rounds, fused=fused))
    y = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    out = block(y)
    assert out.shape == (2, stages * 3, 6, 7)
    torch.testing.assert_close(out, torch.cat(expected(block, y), 1))
    out.sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    assert all(norm.num_batches_tracked == 1 for norm in block.modules() if isinstance(norm, nn.BatchNorm2d))


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize("bottleneck", (None, 4))
def test_irk_step(bottleneck: int | None, fused: bool) -> None:
    step = filled(IRKStep(3, 4, bottleneck=bottleneck, fused=fused))
    y = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    truth = y + sum(expected(step, y))
    torch.testing.assert_close(step(y), truth)
    out, moments = step.forward_with_moments(y, return_moments=True)
    assert (moments is not None) == fused
    if moments is not None:
        torch.testing.assert_close(moments.mean, out.mean((0, 2, 3)))


def test_initialisation_is_of_each_pair() -> None:
    torch.manual_seed(0)
    block = CliqueBlock(96, 32, 3)
    assert pair(block, 0, 2).std().item() == pytest.approx(math.sqrt(2 / (96 * 9)), rel=0.05)
    assert pair(block, 3, 2).std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.05)
    block = CliqueBlock(96, 32, 3, bottleneck=16)
    assert pair(block, 1, 2).std().item() == pytest.approx(math.sqrt(2 / 32), rel=0.1)
    assert block.weight2 is not None
    assert block.weight2[1].std().item() == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.1)


def rkcnn(step: RKCNNStep, y: Tensor) -> Tensor:
    def unit(names: str, i: int, parts: list[Tensor]) -> Tensor:
        init = names == "init"
        conv1, conv3 = (step.conv_1x1, step.conv_3x3) if init else (step.conv_1x1_update, step.conv_3x3_update)
        norm1, norm3 = (getattr(step, f"{names}_bn_{kernel}") for kernel in ("1x1", "3x3"))
        x = F.conv2d(normed(norm1[i], torch.cat(parts, 1)), conv1[i].weight)  # type: ignore[arg-type]
        return F.conv2d(normed(norm3[i], x), conv3[i].weight, padding=1)  # type: ignore[arg-type]

    s = step.stages
    now: list[Tensor] = []
    for i in range(s):
        now.append(unit("init", i, [y, *now]))
    for _ in range(0 if step.method == "e" else step.rounds):
        before = list(now)
        for i in range(s):
            later = now if step.method == "i" else before
            now[i] = unit("update", i, [y] + [later[j] for j in range(s) if j != i])
    return y + sum(now)


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize("rounds", (1, 2))
@pytest.mark.parametrize("method", ("e", "i", "r"))
def test_rkcnn_step(method: str, rounds: int, fused: bool) -> None:
    step = filled(RKCNNStep(method, 3, 4, neck=2, rounds=rounds, fused=fused))
    y = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(step(y), rkcnn(step, y))
    assert step.init_bn_1x1[0].num_batches_tracked == 1
    assert step.forward_with_moments(y, return_moments=True)[1] is not None or not fused


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (
            lambda: CliqueBlock(4, 4, 1),
            "stages: Stage-II updates each stage from the others; expected at least 2, got 1",
        ),
        (lambda: IRKStep(1, 4), "stages: .* got 1"),
        (lambda: CliqueBlock(4, 0, 2), "growth_rate: expected at least 1, got 0"),
        (lambda: CliqueBlock(0, 4, 2), "in_channels: expected at least 1, got 0"),
        (lambda: IRKStep(2, 4, rounds=0), "rounds: expected at least 1, got 0"),
        (lambda: RKCNNStep("x", 2, 4), "method: expected 'e', 'i' or 'r', got 'x'"),
        (lambda: RKCNNStep("i", 0, 4), "stages: expected at least 1, got 0"),
        (lambda: RKCNNStep("i", 2, 0), "growth_rate: expected at least 1, got 0"),
        (lambda: RKCNNStep("i", 2, 4, neck=0), "neck: expected at least 1, got 0"),
        (lambda: RKCNNStep("i", 2, 4, rounds=0), "rounds: expected at least 1, got 0"),
    ),
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
