"""LMStep, LeapfrogStep and MultistepPeriod, and PolyStep beside them: the recurrences, moments, hooks."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rkfast.nn import (
    LeapfrogStep,
    LMStep,
    MultistepPeriod,
    Period,
    PolyStep,
    PreActBranch,
    SymmetricBranch,
    poly_branches,
)
from tests.nn.test_step import Decay, calls, trained

both = pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))


@both
def test_second_order(fused: bool) -> None:
    """y'' = -y from rest: with the state before the first half a step back, cos(t) to second order."""
    errors = []
    for steps in (16, 32, 64):
        h = 1 / steps
        period = MultistepPeriod(*(LeapfrogStep(Decay(), step=h, fused=fused) for _ in range(steps)))
        y = period(torch.ones(1, 1, dtype=torch.float64))
        # Rest between t = -h and 0.
        errors.append(abs(y.item() - math.cos(1 + h / 2) / math.cos(h / 2)))
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([2, 2], abs=0.1)


@both
def test_linear_two_step_recurrence(fused: bool) -> None:
    """F(y) = -y: y_{n+1} = -k (y_n - y_{n-1}), with k = 0 zero at once."""
    period = MultistepPeriod(*(LMStep(Decay(), first=i == 0, fused=fused) for i in range(4))).double()
    ks = [step.learned["k"] for step in list(period)[1:]]
    for k, value in zip(ks, (-0.5, 0.25, 2.0), strict=True):
        nn.init.constant_(k, value)
    y = torch.randn(2, 3, 4, dtype=torch.float64)
    ys = [y, torch.zeros_like(y)]
    for k in ks:
        ys.append(-k * (ys[-1] - ys[-2]))
    torch.testing.assert_close(period(y), ys[-1])
    period(y).sum().backward()
    assert all(k.grad is not None and k.grad.shape == () for k in ks)


@both
def test_poly_is_a_polynomial(fused: bool) -> None:
    step = PolyStep(nn.Linear(4, 4, bias=False), fused=fused).double()
    y = torch.randn(3, 4, dtype=torch.float64)
    a, one = step.branches[0].weight, torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(step(y), y @ (one + a + a @ a).T)
    step = PolyStep([step.branches[0], nn.Linear(4, 4, bias=False).double()], fused=fused)
    torch.testing.assert_close(step(y), y @ (one + a + step.branches[1].weight @ a).T)
    with pytest.raises(ValueError, match="branches: expected F, or F and G, got 3 modules"):
        PolyStep([Decay() for _ in range(3)])


def test_jacobian_of_the_symmetric_branch() -> None:
    branch = SymmetricBranch(2).double().eval()
    branch.norm = nn.Identity()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(branch, x).view(18, 18)
    torch.testing.assert_close(jacobian, jacobian.T)
    assert torch.linalg.eigvalsh(jacobian).max() <= 1e-12
    assert torch.linalg.eigvalsh(jacobian).min() < -0.1


MODULES: dict[str, Callable[[bool], nn.Sequential]] = {
    "lm": lambda fused: MultistepPeriod(*(LMStep(branch(fused), first=i == 0, fused=fused) for i in range(3))),
    "leapfrog": lambda fused: MultistepPeriod(*(LeapfrogStep(branch(fused), step=0.7, fused=fused) for _ in range(3))),
    "poly": lambda fused: Period(*(PolyStep(poly_branches(4, fused=fused), fused=fused) for _ in range(3))),
}


def branch(fused: bool) -> nn.Module:
    return PreActBranch(4, fused=fused)


def made(name: str, fused: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return MODULES[name](fused)


@pytest.mark.parametrize("name", MODULES)
def test_moments_come_from_the_sums(name: str) -> None:
    module, x = made(name), torch.randn(5, 4, 6, 7)
    heard: list[bool] = []
    for step in module:
        for f in step.branches if name == "poly" else [step.branch]:
            f.register_forward_pre_hook(lambda _, args: heard.append(len(args) == 2))
    y, moments = module.forward_with_moments(x, return_moments=True)  # type: ignore[operator]
    expected = [False, False, True, False, True, False] if name == "poly" else [False, True, True]
    assert heard == expected
    assert moments is not None
    torch.testing.assert_close(moments.mean, y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.var, y.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)
    heard.clear()
    before = calls("rk_sum")
    module.eval()(x)
    assert not any(heard)
    assert calls("rk_sum") == before + 3  # one pass per step
    made(name, False)(x)
    assert calls("rk_sum") == before + 3


@pytest.mark.parametrize("name", MODULES)
def test_autocast_hooks_and_copies(name: str) -> None:
    x = torch.randn(5, 4, 6, 7)
    module = made(name)
    expected = trained(copy.deepcopy(module), x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(trained(twin, x), expected, rtol=0, atol=0)
    seen: list[Tensor] = []
    for step in module:
        step.register_forward_hook(lambda *args: seen.append(args[2]))
    torch.testing.assert_close(trained(module, x), expected)
    assert len(seen) == 3 and all(isinstance(y, Tensor) for y in seen)
    ours, eager = trained(made(name), x, autocast=True), trained(made(name, False), x, autocast=True)
    assert ours["out"].dtype == eager["out"].dtype
    torch.testing.assert_close(ours["out"], eager["out"], rtol=0.05, atol=0.05)


def test_repr_and_bad_step() -> None:
    text = repr(made("lm")) + repr(made("leapfrog")) + repr(made("poly")) + repr(SymmetricBranch(2))
    assert "first, fused=True" in text and "step=0.7, fused=True" in text
    with pytest.raises(ValueError, match="step: expected a finite number, got inf"):
        LeapfrogStep(Decay(), step=math.inf)
