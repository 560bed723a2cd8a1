"""Transition, Attention, NormPool and MultiscaleHead against their formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast.nn import Attention, MultiscaleHead, NormPool, Transition
from rkfast.ops import channel_moments
from tests.nn.test_dense import filled, normed


def gated(attention: Attention, x: Tensor) -> Tensor:
    hidden = torch.clamp(x.mean((2, 3)) @ attention.fc1.weight.T + attention.fc1.bias, min=0)
    return x / (1 + torch.exp(-(hidden @ attention.fc2.weight.T + attention.fc2.bias)))[:, :, None, None]


def test_attention() -> None:
    attention = filled(Attention(5))
    assert attention.fc1.out_features == 2
    assert Attention(1).fc1.out_features == 1
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(attention(x), gated(attention, x))


@pytest.mark.parametrize("known", (False, True), ids=("", "moments"))
@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize("attention", (False, True))
@pytest.mark.parametrize("size", ((6, 8), (7, 5)))
def test_transition(size: tuple[int, int], attention: bool, fused: bool, known: bool) -> None:
    """At odd sizes the pool leaves out a row and a column, which the attention's mean does not."""
    transition = filled(Transition(5, 4, attention=attention, fused=fused))
    y = torch.randn(2, 5, *size, dtype=torch.float64)
    expected = F.conv2d(normed(transition.norm, y), transition.conv.weight)
    if attention:
        expected = gated(transition.attention, expected)
    expected = F.avg_pool2d(expected, 2)
    out = transition(y, channel_moments(y)) if known else transition(y)
    torch.testing.assert_close(out, expected)


def convolved(transition: Transition, y: Tensor) -> int:
    """The height that the convolution reads."""
    seen: list[int] = []
    conv2d = F.conv2d
    torch.nn.functional.conv2d = lambda x, *args: (seen.append(x.shape[2]), conv2d(x, *args))[1]
    try:
        transition(y)
    finally:
        torch.nn.functional.conv2d = conv2d
    (height,) = seen
    return height


def test_pools_first_where_that_commutes() -> None:
    y = torch.randn(2, 5, 8, 8)
    assert convolved(Transition(5, 4), y) == 4
    assert convolved(Transition(5, 4, attention=True), y) == 4
    assert convolved(Transition(5, 4, drop_rate=0.5).eval(), y) == 4
    assert convolved(Transition(5, 4, drop_rate=0.5), y) == 8
    assert convolved(Transition(5, 4, fused=False), y) == 8
    for name in ("conv", "pool", "attention"):
        hooked = Transition(5, 4, attention=True)
        hooked.get_submodule(name).register_forward_hook(lambda *_: None)
        assert convolved(hooked, y) == 8, name
    replaced = Transition(5, 4)
    replaced.pool = nn.MaxPool2d(2)  # type: ignore[assignment]
    assert convolved(replaced, y) == 8
    torch.testing.assert_close(replaced.eval()(y), replaced.pool(replaced.conv(torch.relu(replaced.norm(y)))))


def test_dropout_comes_before_the_attention() -> None:
    torch.manual_seed(0)
    transition = Transition(5, 64, drop_rate=0.999, attention=True)
    assert (transition(torch.randn(2, 5, 2, 2)) == 0).float().mean() > 0.9


@pytest.mark.parametrize("module", (Transition(5, 4), NormPool(5)), ids=("transition", "pool"))
def test_reads_moments(module: Any) -> None:
    module = copy.deepcopy(module)
    assert module.reads_moments()
    assert not module.eval().reads_moments()
    module.train().fused = False
    assert not module.reads_moments()


def test_names_of_the_norm() -> None:
    assert "bn.weight" in Transition(5, 4, norm_name="bn").state_dict()
    assert "bn.weight" in NormPool(5, norm_name="bn").state_dict()
    assert [name for name, _ in Transition(5, 4).named_children()] == ["norm", "conv", "pool"]


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
def test_multiscale_head(fused: bool) -> None:
    head = filled(MultiscaleHead((3, 5), 4, fused=fused))
    states = [torch.randn(2, c, size, size, dtype=torch.float64) for c, size in ((3, 6), (5, 3))]
    pooled = torch.cat([normed(pool.norm, y).mean((2, 3)) for pool, y in zip(head.pools, states, strict=True)], 1)
    torch.testing.assert_close(head(states, pre_logits=True), pooled)
    torch.testing.assert_close(head(states), pooled @ head.fc.weight.T + head.fc.bias)
    torch.testing.assert_close(head(states, [channel_moments(y) for y in states], pre_logits=True), pooled)
    assert MultiscaleHead((3, 5), 0)([y.float() for y in states]).shape == (2, 8)
    with pytest.raises(ValueError, match="shorter"):
        head(states[:1])
