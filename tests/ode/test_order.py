"""Every method is of its order, as RKStep takes its steps."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
import torch

import rkfast
from rkfast import ode, tableau
from rkfast.ode import order
from rkfast.tableau import Tableau
from tests.package.process import python


@pytest.mark.parametrize("method", tableau.names())
def test_observed_order(method: str) -> None:
    found = ode.check(method)
    assert found.holds
    assert found.observed == pytest.approx(found.tableau.order, abs=0.3)
    if found.tableau.order_embedded is None:
        assert found.observed_embedded is None and found.conditions_embedded == ()
    else:
        assert found.observed_embedded == pytest.approx(found.tableau.order_embedded, abs=0.3)
    assert found.tableau is tableau.get(method)


@pytest.mark.parametrize("method", ("midpoint", "nystrom5"))
def test_stock_steps_too(method: str) -> None:
    found = ode.check(tableau.get(method), fused=False)
    assert found.observed == pytest.approx(found.tableau.order, abs=0.1)


def test_what_is_known_of_a_method() -> None:
    found = ode.check("fehlberg45")
    assert found.conditions == ((1, 1), (1, 1), (2, 2), (4, 4), (9, 0))
    assert found.conditions_embedded == ((1, 1), (1, 1), (2, 2), (4, 4), (9, 9), (20, 0))
    lines = str(found).splitlines()
    assert lines[0] == "fehlberg45: 6 stages, order 4, embedded of order 5"
    assert "b                  4      4                4" in lines
    assert sum(line.startswith("b_embedded  limit cycle") for line in lines) == 7
    assert lines[-1] == "observed: 3.88 and 4.92, as it should be"


@pytest.mark.parametrize("method", ("rk4", "verner8"))
def test_a_slip_is_seen(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is wrong by a millionth, after the tableau has been checked."""
    floats = Tableau.floats

    def slipped(self: Tableau, step: float = 1.0) -> Any:
        a, (first, *rest) = floats(self, step)
        return a, (first * (1 + 1e-6), *rest)

    monkeypatch.setattr(Tableau, "floats", slipped)
    found = ode.check(method)
    assert not found.holds and found.observed < 2
    assert "NOT as it should be" in str(found)


@pytest.mark.parametrize("node", (10**4, 10**200))
def test_a_method_that_is_useless(node: int) -> None:
    """Of second order by its conditions, with a stage so far away that no step is small."""
    half = Fraction(1, 2 * node)
    found = ode.check(Tableau("far", a=[[], [node]], b=[1 - half, half], c=[0, node], order=2))
    assert found.conditions == ((1, 1), (1, 1), (2, 0)) and not found.holds
    assert "observed: " in str(found)


def test_an_order_that_is_too_low_is_seen() -> None:
    rk4 = dataclasses.replace(tableau.get("rk4"), order=3)
    found = ode.check(rk4)
    assert not found.holds
    assert found.conditions[-1] == (4, 4)


@pytest.mark.parametrize("problem", order.problems(), ids=lambda problem: problem.name)
def test_the_known_solutions(problem: order.Problem) -> None:
    """By a method that knows nothing of ours."""
    integrate = pytest.importorskip("scipy.integrate")

    def field(_: float, y: Any) -> Any:
        return problem.field(torch.from_numpy(y)[None])[0].numpy()

    found = integrate.solve_ivp(field, (0, problem.time), problem.start[0].numpy(), "DOP853", rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.from_numpy(found.y[:, -1]), problem.end[0], rtol=0, atol=1e-10)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"method: 'rk5' is not .*choose one of euler, .*, verner89"):
        ode.check("rk5")
    with pytest.raises(TypeError, match="method: expected a Tableau or the name of one, got int"):
        ode.check(4)  # type: ignore[arg-type]


def test_loaded_when_asked_for() -> None:
    code = "import sys, rkfast\nassert 'rkfast.ode' not in sys.modules\nprint(rkfast.ode.check.__name__)"
    assert python("-c", code).strip() == "check"
    with pytest.raises(AttributeError, match="module 'rkfast' has no attribute 'odes'"):
        rkfast.odes  # noqa: B018 - the access is the test
