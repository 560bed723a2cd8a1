"""integrate: right numbers, the step sizes of equation 6, exact counts, and clear ends."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rkfast import ode, tableau
from rkfast.nn import RKStep
from rkfast.ode.order import LimitCycle

ONE = torch.ones((), dtype=torch.float64)
PAIRS = ("fehlberg45", "dopri5", "verner89")


def decay(_: float, y: Tensor) -> Tensor:
    """TSC, Figure 1."""
    return -4 * y


def pendulum(t: float, y: Tensor) -> Tensor:
    """Driven and damped, so that errors do not grow."""
    return torch.stack([y[1], math.cos(t) - y[0].sin() - y[1]])


@pytest.mark.parametrize("method", tableau.names())
def test_fixed_steps_are_those_of_a_network(method: str) -> None:
    field = LimitCycle()
    y = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    found = ode.integrate(lambda _, y: field(y), y, 1.0, 2.0, method, h=0.25)
    step = RKStep(method, field, step=0.25, fused=False)
    expected = torch.stack(list(itertools.accumulate(range(4), lambda y, _: step(y), initial=y)))
    torch.testing.assert_close(found.states, expected, rtol=1e-14, atol=1e-14)
    assert found.times.tolist() == [1.0, 1.25, 1.5, 1.75, 2.0]
    assert (found.accepted, found.rejected) == (4, 0)
    # The last stage of Dormand and Prince's is the next step's first.
    assert found.evaluations == (1 + 4 * 6 if method == "dopri5" else 4 * step.tableau.stages)


@pytest.mark.parametrize("method", ("midpoint", "rk3", "gill4", "nystrom5", "dopri5", "huta6", "verner8"))
def test_time_is_that_of_the_stages(method: str) -> None:
    """y' = y cos t."""
    errors = []
    for n in (8, 16):
        found = ode.integrate(lambda t, y: y * math.cos(t), ONE, 0.0, 2.0, method, h=2 / n)
        errors.append(abs(found.states[-1].item() - math.exp(math.sin(2))))
    assert math.log2(errors[0] / errors[1]) > tableau.get(method).order - 0.5


@pytest.mark.parametrize(
    ("h", "n"), ((0.3, 4), (0.25, 4), (0.1, 10), (1 / 3, 3), (1 / 3 - 1e-9, 4), (2.0, 1), (1 / 49, 49))
)
def test_the_last_fixed_step_ends_there(h: float, n: int) -> None:
    for start, end in ((0.0, 1.0), (1.0, 0.0), (-3.0, -2.0)):
        found = ode.integrate(decay, ONE, start, end, "euler", h=h)
        assert (found.accepted, found.times[0], found.times[-1]) == (n, start, end)
        sizes = found.times.diff()
        torch.testing.assert_close(sizes[:-1].abs(), torch.full((n - 1,), h, dtype=torch.float64))
        assert ((sizes > 0) == (end > start)).all()
        torch.testing.assert_close(found.states[1:], found.states[:-1] * (1 - 4 * sizes))


def test_figure_1_of_tsc() -> None:
    exact = math.exp(-4 * 5)
    small = ode.integrate(decay, ONE, 0, 5, "euler", h=0.05)
    large = ode.integrate(decay, ONE, 0, 5, "euler", h=0.55)
    adaptive = ode.integrate(decay, ONE, 0, 5, "fehlberg45", tol=1e-3)
    assert (small.accepted, large.accepted, adaptive.accepted, adaptive.rejected) == (100, 10, 11, 0)
    assert small.states[-1].item() == pytest.approx(exact, abs=1e-8)
    assert (large.states.diff()[:-1].sign().diff().abs() == 2).all() and large.states.abs().max() > 5
    assert (adaptive.states - (-4 * adaptive.times).exp()).abs().max() < 1e-3


@pytest.mark.parametrize("kappa", (0.9, 0.5))
def test_step_sizes_are_those_of_equation_6(kappa: float) -> None:
    """On y' = -4 y, with z = -4 h, Fehlberg's step of fourth order multiplies y by 1 + z + z^2/2 + z^3/6 + z^4/24 +
    z^5/104; that of the fifth ends with z^5/120 + z^6/2080."""
    tol = 1e-5
    found = ode.integrate(decay, ONE, 0, 2, "fehlberg45", tol=tol, kappa=kappa)
    h, y, sizes = tol**0.2 / 4, 1.0, found.times.diff().tolist()
    for i, size in enumerate(sizes[:-2]):
        assert size == pytest.approx(h, rel=1e-9), i
        z = -4 * h
        err = abs(y * (z**5 / 104 - z**5 / 120 - z**6 / 2080))
        y *= sum(z**n / math.factorial(n) for n in range(5)) + z**5 / 104
        assert found.states[i + 1].item() == pytest.approx(y, rel=1e-8)
        h = min(5 * h, kappa * h * (tol / err) ** 0.2)
    assert sizes[-2] == pytest.approx(sizes[-1]) or sizes[-1] < h


@pytest.mark.parametrize("method", PAIRS)
def test_tolerance(method: str) -> None:
    y, counts, errors = torch.tensor([0.5, 0.0], dtype=torch.float64), [], []
    truth = ode.integrate(pendulum, y, 0, 6, "verner8", h=0.01).states[-1]
    for tol in (1e-3, 1e-6, 1e-9):
        found = ode.integrate(pendulum, y, 0, 6, method, tol=tol)
        counts.append(found.accepted)
        errors.append((found.states[-1] - truth).abs().max().item())
        # k_1 is kept where a step is tried again, or is the last stage of the one before.
        stages = tableau.get(method).stages - 1
        tried = (found.accepted + found.rejected) * stages
        assert found.evaluations == 1 + tried + (0 if method == "dopri5" else found.accepted - 1)
        assert len(found.times) == len(found.states) == found.accepted + 1
        assert errors[-1] < found.accepted * tol  # what a step adds, at most
    assert counts == sorted(counts) and counts[-1] > 2 * counts[0]


def test_as_scipy_does() -> None:
    integrate = pytest.importorskip("scipy.integrate")
    y = torch.tensor([0.5, 0.0], dtype=torch.float64)
    theirs = integrate.solve_ivp(
        lambda t, y: pendulum(t, torch.from_numpy(y)).numpy(), (0, 6), y.numpy(), "RK45", rtol=1e-12, atol=1e-12
    )
    ours = ode.integrate(pendulum, y, 0, 6, "dopri5", tol=1e-12)
    torch.testing.assert_close(ours.states[-1], torch.from_numpy(theirs.y[:, -1]), rtol=0, atol=1e-9)
    # The coefficients, number for number.
    a, b = tableau.get("dopri5").floats()
    rk45 = integrate.RK45
    torch.testing.assert_close(torch.tensor(a)[:6, :5].double(), torch.tensor(rk45.A), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(b)[:6].double(), torch.tensor(rk45.B), rtol=1e-6, atol=0)


def test_rejected_steps() -> None:
    """A kick at t = 1 after a long rest."""
    found = ode.integrate(lambda t, y: -y + 100 * math.exp(-((30 * (t - 1)) ** 2)), ONE, 0, 2, "dopri5", tol=1e-6)
    assert found.rejected > 0
    truth = ode.integrate(lambda t, y: -y + 100 * math.exp(-((30 * (t - 1)) ** 2)), ONE, 0, 2, "verner8", h=1e-3)
    assert abs(found.states[-1] - truth.states[-1]) < 1e-5


@pytest.mark.parametrize("arguments", ({"h": 0.1}, {"tol": 1e-4}), ids=("fixed", "adaptive"))
@pytest.mark.parametrize(
    ("shape", "dtype"),
    (((), torch.float32), ((0,), torch.float64), ((2, 3, 4), torch.float32), ((3,), torch.complex128)),
)
def test_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    y = torch.randn(shape, dtype=dtype)
    before = y.clone()
    factor = 1j if dtype.is_complex else -1.0
    found = ode.integrate(lambda _, y: factor * y, y, 0, 1, "fehlberg45", **arguments)
    assert found.states.dtype == dtype and found.states.shape[1:] == shape and found.times.dtype == torch.float64
    turned = complex(math.cos(1), math.sin(1)) if dtype.is_complex else math.exp(-1)
    torch.testing.assert_close(found.states[-1], y * turned, rtol=1e-3, atol=1e-3)
    assert torch.equal(y, before)


@pytest.mark.parametrize("arguments", ({"h": 0.05}, {"tol": 1e-8}), ids=("fixed", "adaptive"))
def test_gradients(arguments: dict[str, Any]) -> None:
    """d/dy0 and d/dw of y0 exp(w)."""
    y, w = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, -1.3))
    end = ode.integrate(lambda _, y: w * y, y, 0, 1, "dopri5", **arguments).states[-1]
    for got, expected in zip(torch.autograd.grad(end, (y, w)), (math.exp(-1.3), 0.7 * math.exp(-1.3)), strict=True):
        assert got.item() == pytest.approx(expected, rel=1e-6)


GOOD: dict[str, Any] = {"f": decay, "y0": ONE, "t0": 0.0, "t1": 1.0, "method": "fehlberg45", "tol": 1e-3}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    (
        ({"tol": None}, ValueError, "tol, h: expected one of them, got tol=None, h=None"),
        ({"h": 0.1}, ValueError, r"tol, h: expected one of them, got tol=0.001, h=0.1"),
        ({"method": "rk4"}, ValueError, "tol: rk4 has no embedded weights .*; give h, or take a pair"),
        ({"method": "rk5"}, ValueError, "method: 'rk5' is not a Runge-Kutta method; choose one of euler,"),
        ({"method": None}, TypeError, "method: expected a Tableau or the name of one, got NoneType"),
        ({"t1": 0.0}, ValueError, "t1: expected another time than t0, got 0.0 for both"),
        ({"t1": math.nan}, ValueError, "t1: expected a finite number, got nan"),
        ({"t0": -math.inf}, ValueError, "t0: expected a finite number, got -inf"),
        ({"t0": "0"}, TypeError, "t0: expected a number, got '0'"),
        ({"tol": 0.0}, ValueError, "tol: expected a finite number above 0, got 0.0"),
        ({"tol": math.nan}, ValueError, "tol: expected a finite number above 0, got nan"),
        ({"tol": None, "h": -0.1}, ValueError, "h: expected a finite number above 0, got -0.1"),
        ({"tol": None, "h": 1e-9}, ValueError, r"h: 1e-09 makes 1e\+09 steps from 0 to 1; take a larger h"),
        ({"tol": None, "h": 5e-324}, ValueError, r"h: .* makes inf steps from 0 to 1"),
        ({"tol": None, "h": 0.3, "max_steps": 3}, ValueError, r"h: 0.3 makes 3.333 steps"),
        ({"kappa": 0}, ValueError, "kappa: expected a finite number above 0, got 0.0"),
        ({"max_steps": 0}, ValueError, "max_steps: expected an int of at least 1, got 0"),
        ({"y0": 1.0}, TypeError, "y0: expected a Tensor, got float"),
        ({"y0": torch.ones(2, dtype=torch.int64)}, TypeError, r"y0: expected a floating .* got torch.int64; take"),
        ({"y0": torch.tensor([1.0, math.nan])}, ValueError, "y0: holds NaN or infinity"),
        ({"f": lambda t, y: y[None]}, ValueError, r"f: expected a Tensor \[\] of torch.float64, .*got \[1\] of"),
        ({"f": lambda t, y: y.float()}, ValueError, r"f: expected .* got \[\] of torch.float32"),
        ({"f": lambda t, y: 3.0}, ValueError, r"f: expected .* got float"),
    ),
)
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ode.integrate(**(GOOD | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    (
        (
            {"f": lambda t, y: y * y, "t1": 2.0},
            r"tol: steps of .* at t = 0.9999.* are too small for t; y has a singularity",
        ),
        ({"f": lambda t, y: y * y, "t1": 2.0, "max_steps": 20}, r"max_steps: tried 20 steps .* from 0 to 0.9\d*, not"),
        ({"f": lambda t, y: y * math.nan}, "f: NaN or infinity at t = 0"),
        ({"f": lambda t, y: y if t < 0.5 else y * math.nan}, "tol: steps of .* at t = 0.5 are too small"),
        ({"f": lambda t, y: 1e200 * y * y, "tol": None, "h": 0.1}, "h: with steps of 0.1 y is no longer finite at t ="),
        ({"y0": torch.ones(()), "tol": 1e-13, "t1": 1.0}, r"(tol: steps of|max_steps: tried)"),
    ),
)
def test_no_end(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{message}"):
        ode.integrate(**(GOOD | changed))


@pytest.mark.parametrize("arguments", ({"h": 0.1}, {"tol": 1e-4}), ids=("fixed", "adaptive"))
def test_f_may_write_into_what_it_gets(arguments: dict[str, Any]) -> None:
    y = torch.ones(3)
    found = ode.integrate(lambda _, y: y.mul_(-4), y, 0, 1, "fehlberg45", **arguments)
    assert torch.equal(y, torch.ones(3))
    assert torch.equal(found.states, ode.integrate(decay, y, 0, 1, "fehlberg45", **arguments).states)
