"""probe: what it reports of a step, and that it leaves no trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import rkfast
from rkfast import ode, tableau
from rkfast.nn import Period, RKStep


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def slopes(step: RKStep, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y' and k_1, k_2, ..., by the formula."""
    a, b, h = step.coefficients()
    ks: list[Tensor] = []
    for i in range(step.tableau.stages):
        x = y + h * sum((w * k for w, k in zip(a[i], ks, strict=False)), torch.zeros_like(y))
        ks.append(step.branches[i % len(step.branches)](x))
    return y + h * sum((w * k for w, k in zip(b, ks, strict=True)), torch.zeros_like(y)), ks


def expected(steps: Sequence[RKStep], y: Tensor) -> list[tuple[float, tuple[float, ...], float | None]]:
    found = []
    for step in steps:
        (_, b, h), t, size = step.coefficients(), step.tableau, rms(y)
        y, ks = slopes(step, y)
        error = None
        if t.b_embedded is not None:
            difference = [float(v) - float(e) for v, e in zip(t.b, t.b_embedded, strict=True)]
            error = rms(h * sum((d * k for d, k in zip(difference, ks, strict=True)), torch.zeros_like(y)))
        found.append((size, tuple(abs(h * w) * rms(k) for w, k in zip(b, ks, strict=True)), error))
    return found


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize(("method", "layers"), (("rk4", 18), ("fehlberg45", 26), ("verner8", 30)))
def test_a_network(method: str, layers: int, fused: bool) -> None:
    torch.manual_seed(0)
    model = rkfast.create_model(f"ho_resnet-{layers}", method=method, width=6, step=0.5, fused=fused)
    x = torch.randn(4, 3, 8, 8)
    stock = rkfast.create_model(f"ho_resnet-{layers}", method=method, width=6, step=0.5, fused=False).double()
    stock.load_state_dict(model.state_dict())
    found = ode.probe(model, x)
    with torch.no_grad():
        truth = expected(list(stock.period), stock.stem(x.double()))
    assert len(found) == len(truth) == len(model.period)
    for i, (report, (size, increments, error)) in enumerate(zip(found, truth, strict=True)):
        assert (report.name, report.method, report.h) == (f"period.{i}", method, 0.5)
        assert report.size == pytest.approx(size, rel=1e-5)
        assert report.increments == pytest.approx(increments, rel=1e-4)
        assert report.error == (None if error is None else pytest.approx(error, rel=1e-4))
    text = str(found).splitlines()
    assert text[0].split()[:3] == ["step", "method", "h"]
    assert text[1].split()[:3] == ["period.0", method, "0.5"]


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
def test_the_model_is_as_it_was(training: bool, fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(rkfast.create_model("ho_resnet-10", width=6, fused=fused), nn.Dropout()).train(training)
    model[0].period[0].branches[1].eval()
    modes = [module.training for module in model.modules()]
    before, buffers = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    random = torch.get_rng_state()
    x = torch.randn(4, 3, 8, 8)
    torch.set_rng_state(random)
    ode.probe(model, x)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_model_is_as_it_was_when_it_fails() -> None:
    class Fails(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            raise ArithmeticError

    model = nn.Sequential(nn.BatchNorm2d(3), RKStep("euler", Fails()))
    with pytest.raises(ArithmeticError):
        ode.probe(model, torch.randn(2, 3, 4, 4))
    assert model[0].num_batches_tracked == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_learned_step_sizes() -> None:
    torch.manual_seed(0)
    period = Period(*(RKStep("dopri5", nn.Linear(4, 4), learn=learn) for learn in (("h",), ("b",), ())))
    with torch.no_grad():
        period[0].learned["h"].fill_(0.25)
        period[1].learned["b"].mul_(2)
    first, second, third = ode.probe(period, torch.randn(3, 4))
    assert (first.h, second.h, third.h) == (0.25, 1.0, 1.0)
    # With other weights than the tableau's, its embedded ones estimate nothing.
    assert first.error is not None and second.error is None and third.error is not None


def test_a_step_size_per_channel() -> None:
    """As a step that has one says it: h is a list."""

    class PerChannel(RKStep):
        def coefficients(self) -> tuple:  # type: ignore[type-arg]
            return (*super().coefficients()[:2], [0.0, 1.0])

    (report,) = ode.probe(PerChannel("euler", nn.Identity()), torch.full((3, 2, 5), 4.0))
    assert report.h == (0.0, 1.0)
    assert report.increments == pytest.approx([4 / math.sqrt(2)])
    assert "0 to 1" in str(ode.Probe((report,)))


def test_shared_branches_and_steps() -> None:
    """One branch for all stages of two steps, of which the first runs twice."""
    torch.manual_seed(0)
    branch = nn.Linear(4, 4)
    first, second = RKStep("rk4", branch, step=0.5), RKStep("midpoint", branch)
    y = torch.randn(3, 4)
    found = list(ode.probe(nn.ModuleList([first, second]).append(Chain(first, second, first))[2], y))
    assert [report.method for report in found] == ["rk4", "midpoint", "rk4"]
    with torch.no_grad():
        for report, (size, increments, _) in zip(found, expected([first, second, first], y), strict=True):
            assert report.size == pytest.approx(size, rel=1e-5)
            assert report.increments == pytest.approx(increments, rel=1e-5)


class Chain(nn.Module):
    """Unlike a Sequential it may hold a module twice."""

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList(dict.fromkeys(steps))
        self.order = [list(self.steps).index(step) for step in steps]

    def forward(self, y: Tensor) -> Tensor:
        for i in self.order:
            y = self.steps[i](y)
        return y


def test_steps_within_steps() -> None:
    torch.manual_seed(0)
    inner = [RKStep("midpoint", nn.Linear(4, 4), step=0.5) for _ in range(2)]
    outer = RKStep("midpoint", inner)
    y = torch.randn(3, 4)
    found = {report.name: report for report in ode.probe(outer, y)}
    assert list(found) == ["", "branches.0", "branches.1"]
    with torch.no_grad():
        (_, increments, _), (_, below, _) = expected([outer], y)[0], expected(inner[:1], y)[0]
    assert found[""].increments == pytest.approx(increments, rel=1e-5)
    assert found["branches.0"].increments == pytest.approx(below, rel=1e-5)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="model: expected a Module, got function"):
        ode.probe(rms, torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: Linear has no RKStep"):
        ode.probe(nn.Linear(2, 2), torch.ones(2))

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = RKStep(tableau.get("rk4"), nn.Identity())

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(RuntimeError, match="model: none of its RKSteps ran"):
        ode.probe(Unused(), torch.ones(2))
