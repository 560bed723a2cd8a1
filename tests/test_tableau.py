"""Tableaux against what the books say of them, and the refusal of those that are wrong."""

from __future__ import annotations

import copy
import dataclasses
import decimal
import math
import pickle
import time
from fractions import Fraction
from typing import Any

import pytest

from rkfast import tableau
from rkfast.tableau import Surd, Tableau

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


# Stages, order, and the order of the embedded weights.
METHODS: dict[str, tuple[int, int, int | None]] = {
    "euler": (1, 1, None),
    "midpoint": (2, 2, None),
    "improved_euler": (2, 2, None),
    "ralston": (2, 2, None),
    "heun3": (3, 3, None),
    "rk3": (3, 3, None),
    "rk4": (4, 4, None),
    "rk38": (4, 4, None),
    "gill4": (4, 4, None),
    "nystrom5": (6, 5, None),
    "huta6": (8, 6, None),
    "fehlberg45": (6, 4, 5),
    "dopri5": (7, 5, 4),
    "verner8": (14, 8, None),
    "verner89": (16, 8, 9),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    method = tableau.get(name)
    assert (method.stages, method.order, method.order_embedded, method.name) == (*METHODS[name], name)
    assert method is tableau.get(name)
    # The orders are as high as they get.
    higher = method.order + 1
    with pytest.raises(ValueError, match=f" b is not of order {higher}: the tree .* of order {higher} gives"):
        dataclasses.replace(method, order=higher)
    if method.order_embedded is not None:
        higher = method.order_embedded + 1
        with pytest.raises(ValueError, match=f"b_embedded is not of order {higher}: the tree .* of order {higher} "):
            dataclasses.replace(method, order_embedded=higher)


def test_names() -> None:
    assert tableau.names() == list(METHODS)
    with pytest.raises(ValueError, match=r"method: 'rk5' is not .*choose one of euler, midpoint, .*, verner89$"):
        tableau.get("rk5")
    with pytest.raises(TypeError, match="method: expected a str, got int"):
        tableau.get(4)  # type: ignore[arg-type]


def test_methods_of_the_same_order_are_told_apart() -> None:
    assert len({(tableau.get(name).a, tableau.get(name).b) for name in METHODS}) == len(METHODS)
    assert tableau.get("ralston").b == (Fraction(1, 4), Fraction(3, 4))
    assert tableau.get("improved_euler").c == (0, 1)
    assert tableau.get("rk38").b == (Fraction(1, 8), Fraction(3, 8), Fraction(3, 8), Fraction(1, 8))


def test_verner() -> None:
    """The pair goes on with the eighth order; without its last two stages it is the method of fixed steps."""
    fixed, pair = tableau.get("verner8"), tableau.get("verner89")
    assert pair.b == (*fixed.b, 0, 0)
    assert [row[:14] for row in pair.a[:14]] == list(fixed.a)
    assert [i for i, v in enumerate(fixed.b, 1) if v] == [1, 8, 9, 10, 11, 12, 13, 14]
    assert fixed.a[4][0] == Surd(Fraction(4, 375), Fraction(94, 375), 6)
    assert fixed.floats()[0][11][6] == pytest.approx((154922 - 40458 * 6**0.5) / 135, rel=1e-14)


def test_stability_polynomials() -> None:
    """Those of order p agree with exp(z) up to z^p."""
    for name, (stages, order, _) in METHODS.items():
        found = tableau.get(name).stability_polynomial()
        assert len(found) == stages + 1
        assert list(found[: order + 1]) == [Fraction(1, math.factorial(n)) for n in range(order + 1)]
    assert tableau.get("fehlberg45").stability_polynomial()[5:] == (Fraction(1, 104), 0)
    assert tableau.get("dopri5").stability_polynomial()[6:] == (Fraction(1, 600), 0)


def test_unmet_conditions() -> None:
    rk4 = tableau.get("rk4")
    assert rk4.unmet(4) == ()
    assert {tableau.vertices(tree) for tree in rk4.unmet(5)} == {5}
    assert tableau.get("euler").unmet(2) == (((),),)


def test_the_check_is_cheap() -> None:
    coefficients = {f.name: getattr(tableau.get("verner89"), f.name) for f in dataclasses.fields(Tableau)}
    start = time.process_time()
    Tableau(**coefficients)
    assert time.process_time() - start < 1  # a fifth of it, mostly


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tableau, "_REGISTERED", {})
    mine = Tableau("kutta3", **KUTTA3)
    assert tableau.register(mine) is mine is tableau.get("kutta3")
    assert tableau.names() == [*METHODS, "kutta3"]
    for again in (mine, Tableau("rk4", **KUTTA3)):
        with pytest.raises(ValueError, match=f"there is a method '{again.name}' already"):
            tableau.register(again)
    with pytest.raises(TypeError, match="tableau: expected a Tableau, got dict"):
        tableau.register(KUTTA3)  # type: ignore[arg-type]
    assert tableau.get("rk4").stages == 4


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


def root2(p: int | Fraction, q: int | Fraction = 0) -> Surd:
    return Surd(p, q, 2)


GILL: dict[str, Any] = {
    "a": [
        [],
        ["1/2"],
        [root2(Fraction(-1, 2), Fraction(1, 2)), root2(1, Fraction(-1, 2))],
        [0, root2(0, Fraction(-1, 2)), root2(1, Fraction(1, 2))],
    ],
    "b": ["1/6", root2(Fraction(1, 3), Fraction(-1, 6)), root2(Fraction(1, 3), Fraction(1, 6)), "1/6"],
    "c": [0, "1/2", "1/2", 1],
    "order": 4,
}


def test_irrational_coefficients() -> None:
    method = Tableau("gill4", **GILL)
    assert method == tableau.get("gill4")
    assert method.floats()[1][1] == pytest.approx((2 - 2**0.5) / 6, rel=1e-15)
    with pytest.raises(ValueError, match=r"row 3 of a sums to 3/2 \+ -?\d+/?\d*\*sqrt\(2\), and c_3 is 1/2"):
        Tableau("gill4", **(GILL | {"a": [[], ["1/2"], [root2(Fraction(1, 2), 1), 1], GILL["a"][3]]}))
    with pytest.raises(ValueError, match=r"b sums to 1 - 1/6\*sqrt\(2\), not to 1"):
        Tableau("gill4", **(GILL | {"b": ["1/6", GILL["b"][1], "1/3", "1/6"]}))
    with pytest.raises(ValueError, match="not of order 4"):
        Tableau("gill4", **(GILL | {"b": ["1/6", "1/3", "1/3", "1/6"]}))
    with pytest.raises(ValueError, match=r"'gill4': square roots of \[2, 3\] do not mix"):
        Tableau("gill4", **(GILL | {"b": ["1/6", "1/3", Surd(0, 1, 3), "1/6"]}))


def test_surds() -> None:
    x, y = Surd(Fraction(1, 3), 2, 6), Surd(-1, Fraction(1, 2), 6)
    assert x + y == y + x == Surd(Fraction(-2, 3), Fraction(5, 2), 6)
    assert x * y == y * x == Surd(Fraction(17, 3), Fraction(-11, 6), 6)
    assert x + Fraction(1, 3) == 1 * x + Fraction(1, 3) == Fraction(1, 3) + x == Surd(Fraction(2, 3), 2, 6)
    conjugate = Surd(Fraction(1, 3), -2, 6)
    assert x * conjugate == Fraction(1, 9) - 24
    assert x != conjugate and x != Surd(Fraction(1, 3), 2, 7) and x != Fraction(1, 3)
    assert len({Surd(3, 0, 6), Surd(3, 0, 2), 3, Fraction(3)}) == 1
    assert str(conjugate) == "1/3 - 2*sqrt(6)"
    with pytest.raises(ValueError, match=r"sqrt\(6\) and sqrt\(2\) do not mix"):
        x + root2(1)
    for d in (-2, 0, 1, 4, 12):
        with pytest.raises(ValueError, match=f"d: expected a square-free int of at least 2, got {d}"):
            Surd(1, 1, d)
    for bad in ((0.5, 1, 2), (1, "1/2", 2), (1, 1, 2.0)):
        with pytest.raises(TypeError, match=r"is not exact|expected an int"):
            Surd(*bad)  # type: ignore[arg-type]


def test_surds_are_rounded_once() -> None:
    """Also where nearly everything cancels: p^2 - 2 q^2 = 1."""
    p, q = 1, 0
    with decimal.localcontext() as context:
        context.prec = 200
        for _ in range(60):
            p, q = 3 * p + 4 * q, 2 * p + 3 * q
            exact = Fraction(1 / (p + q * decimal.Decimal(2).sqrt()))
            assert float(Surd(p, -q, 2)) == float(exact)
            assert float(Surd(Fraction(-p, 7), Fraction(q, 7), 2)) == float(-exact / 7)


def test_what_cannot_be_registered_or_estimate() -> None:
    euler = {"a": [[]], "b": [1], "c": [0], "order": 1}
    with pytest.raises(ValueError, match="there is a method 'rk8' already"):
        tableau.register(tableau.Tableau("rk8", **euler))
    with pytest.raises(ValueError, match="b_embedded is b"):
        tableau.Tableau("same", **euler, b_embedded=[1], order_embedded=1)
