"""Tableaux against what the books say of them, and the refusal of those that are wrong."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from fractions import Fraction
from typing import Any

import pytest

from rkfast import tableau
from rkfast.tableau import Tableau

KUTTA3: dict[str, Any] = {
    "a": [[], ["1/2"], [-1, 2]],
    "b": ["1/6", "2/3", "1/6"],
    "c": [0, "1/2", 1],
    "order": 3,
}
HEUN_EULER: dict[str, Any] = {"a": [[], [1]], "b": ["1/2", "1/2"], "c": [0, 1], "order": 2}


def test_number_of_rooted_trees() -> None:
    assert [len(tableau.trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]
    assert all(tableau.vertices(t) == n for n in range(1, 8) for t in tableau.trees(n))


def test_densities_of_the_trees_of_order_four() -> None:
    assert {tableau.show(t): tableau.density(t) for t in tableau.trees(4)} == {
        "[ttt]": 4,
        "[t[t]]": 8,
        "[[tt]]": 12,
        "[[[t]]]": 24,
    }


@pytest.mark.parametrize(("name", "stages", "order"), (("euler", 1, 1), ("midpoint", 2, 2), ("rk4", 4, 4)))
def test_methods(name: str, stages: int, order: int) -> None:
    method = tableau.get(name)
    assert (method.stages, method.order, method.name) == (stages, order, name)
    assert method is tableau.get(name)
    # No method of s <= 4 stages is of an order above s.
    with pytest.raises(ValueError, match=f"not of order {order + 1}: the tree .* of order {order + 1} gives"):
        dataclasses.replace(method, order=order + 1)


def test_names() -> None:
    assert tableau.names() == ["euler", "midpoint", "rk4"]
    with pytest.raises(ValueError, match=r"method: 'rk5' is not .*choose one of euler, midpoint, rk4"):
        tableau.get("rk5")


def test_coefficients_are_exact_and_rounded_once() -> None:
    rk4 = tableau.get("rk4")
    assert rk4.b == (Fraction(1, 6), Fraction(1, 3), Fraction(1, 3), Fraction(1, 6))
    assert rk4.a[2] == (0, Fraction(1, 2), 0, 0)
    a, b = rk4.floats()
    assert b == (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    assert a[1] == (0.5, 0.0, 0.0, 0.0)
    steps = [k / 10 for k in range(1, 60)]
    scaled = [rk4.floats(h)[1][0] for h in steps]
    assert scaled == [float(Fraction(h) / 6) for h in steps]
    assert scaled != [h * (1 / 6) for h in steps]  # which rounds twice


def test_frozen_hashable_copied_and_pickled() -> None:
    rk4 = tableau.get("rk4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        rk4.order = 5  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(rk4)) == copy.deepcopy(rk4) == rk4
    assert len({rk4, copy.deepcopy(rk4)}) == 1


def test_embedded_weights() -> None:
    method = Tableau("heun-euler", **HEUN_EULER, b_embedded=[1, 0], order_embedded=1)
    assert method.b_embedded == (1, 0)
    with pytest.raises(ValueError, match=r"b_embedded is not of order 2: the tree \[t\] of order 2 gives 0, not 1/2"):
        Tableau("heun-euler", **HEUN_EULER, b_embedded=[1, 0], order_embedded=2)
    with pytest.raises(ValueError, match="b_embedded and order_embedded go together"):
        Tableau("heun-euler", **HEUN_EULER, b_embedded=[1, 0])
    with pytest.raises(ValueError, match="b_embedded has 1 entries for 2 stages"):
        Tableau("heun-euler", **HEUN_EULER, b_embedded=[1], order_embedded=1)


def test_a_right_one_is_accepted() -> None:
    assert Tableau("kutta3", **KUTTA3).stages == 3
    full = KUTTA3 | {"a": [[0, 0, 0], ["1/2", 0, 0], [-1, 2, 0]]}
    assert Tableau("kutta3", **full) == Tableau("kutta3", **KUTTA3)


@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"b": ["1/6", "2/3"]}, "c has 3 entries for 2 stages"),
        ({"b": [], "c": [], "a": []}, "b has 0 entries"),
        ({"a": [[], ["1/2"]]}, "a has 2 rows for 3 stages"),
        ({"a": [[], ["1/2"], [2]]}, "row 3 of a has 1 entries; expected 2 to 3"),
        ({"a": [[], ["1/2"], [-1, 2, 0, 0]]}, "row 3 of a has 4 entries"),
        ({"a": [[], ["1/4", "1/4"], [-1, 2]]}, r"row 2 of a uses stage 2 \(1/4\): the method is not explicit"),
        ({"a": [[], ["1/3"], [-1, 2]]}, "row 2 of a sums to 1/3, and c_2 is 1/2"),
        ({"b": ["1/6", "2/3", "1/3"]}, "b sums to 7/6, not to 1"),
        ({"b": ["1/4", "1/2", "1/4"]}, r"b is not of order 3: the tree \[tt\] of order 3 gives 3/8, not 1/3"),
        ({"a": [[], ["1/2"], [1, 0]]}, r"b is not of order 3: the tree \[\[t\]\] of order 3 gives 0, not 1/6"),
        ({"order": 4}, "b is not of order 4: the tree"),
        ({"order": 0}, "expected an int of at least 1, got 0"),
    ),
)
def test_a_wrong_one_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Tableau("kutta3", **(KUTTA3 | changed))
    assert "kutta3" in str(error.value)


@pytest.mark.parametrize("value", (0.5, 0.5 + 0j, None))
def test_inexact_coefficients_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"row 2 of a: .* is not exact"):
        Tableau("kutta3", **(KUTTA3 | {"a": [[], [value], [-1, 2]]}))


def test_another_exact_field() -> None:
    """p + q * sqrt(2), of which Nystroem's and Gill's methods are made."""

    @dataclasses.dataclass(frozen=True)
    class Root2:
        p: Fraction
        q: Fraction

        def __add__(self, other: Any) -> Root2:
            other = _lift(other)
            return Root2(self.p + other.p, self.q + other.q)

        def __mul__(self, other: Any) -> Root2:
            other = _lift(other)
            return Root2(self.p * other.p + 2 * self.q * other.q, self.p * other.q + self.q * other.p)

        def __eq__(self, other: Any) -> bool:
            other = _lift(other)
            return (self.p, self.q) == (other.p, other.q)

        __radd__, __rmul__ = __add__, __mul__

        def __float__(self) -> float:
            return float(self.p) + float(self.q) * 2**0.5

    def _lift(v: Any) -> Root2:
        return v if isinstance(v, Root2) else Root2(Fraction(v), Fraction(0))

    def r(p: str | int, q: str | int = 0) -> Root2:
        return Root2(Fraction(p), Fraction(q))

    gill: dict[str, Any] = {
        "a": [[], ["1/2"], [r("-1/2", "1/2"), r(1, "-1/2")], [0, r(0, "-1/2"), r(1, "1/2")]],
        "b": ["1/6", r("1/3", "-1/6"), r("1/3", "1/6"), "1/6"],
        "c": [0, "1/2", "1/2", 1],
        "order": 4,
    }
    method = Tableau("gill", **gill)
    assert method.floats()[1][1] == pytest.approx((2 - 2**0.5) / 6, rel=1e-15)
    with pytest.raises(ValueError, match="not of order 4"):
        Tableau("gill", **(gill | {"b": ["1/6", "1/3", "1/3", "1/6"]}))
