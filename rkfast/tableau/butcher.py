"""The tableau of an explicit Runge-Kutta method, y' = y + h * sum_i b_i k_i, k_i = F(y + h * sum_{j<i} a_ij k_j).

Its order conditions (Butcher): for every rooted tree t of at most ``order`` vertices, sum_i b_i w_i(t) = 1 / gamma(t).
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rkfast.tableau.surd import Surd

Exact = Fraction | Surd
Tree = tuple["Tree", ...]  # a rooted tree is the sorted tuple of its subtrees; () is a single vertex


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method with s stages.

    Args:
        name: what errors and reprs call it.
        a: s rows; row i (from 1) holds a_i1 ... a_i,i-1 and may go on with zeros.
        b, c: s weights and s nodes.
        order: the order that b reaches.
        b_embedded, order_embedded: a second set of weights for error estimates, and its order; both or neither.

    Coefficients are ints, Fractions, strings such as "1/3", or Surds of one square root; floats are refused.

    Raises:
        TypeError: a coefficient is not exact.
        ValueError: shapes do not fit, two square roots meet, a row uses its own or a later stage, a row of a does not
            sum to its node, or a rooted tree of at most ``order`` vertices does not satisfy its order condition.
    """

    name: str
    a: tuple[tuple[Exact, ...], ...]
    b: tuple[Exact, ...]
    c: tuple[Exact, ...]
    order: int
    b_embedded: tuple[Exact, ...] | None = None
    order_embedded: int | None = None

    def __post_init__(self) -> None:
        s = len(self.b)
        for field in ("b", "c", "b_embedded"):
            vector = getattr(self, field)
            if vector is not None:
                self._require(len(vector) == s > 0, f"{field} has {len(vector)} entries for {s} stages")
                object.__setattr__(self, field, tuple(_exact(v, field) for v in vector))
        self._require(len(self.a) == s, f"a has {len(self.a)} rows for {s} stages")
        object.__setattr__(self, "a", tuple(self._row(i, row) for i, row in enumerate(self.a)))
        everything = [*self.b, *self.c, *(self.b_embedded or ()), *(v for row in self.a for v in row)]
        roots = sorted({v.d for v in everything if isinstance(v, Surd)})
        self._require(len(roots) < 2, f"square roots of {roots} do not mix")
        for i, (row, node) in enumerate(zip(self.a, self.c, strict=True), 1):
            self._require(_sum(row) == node, f"row {i} of a sums to {_sum(row)}, and c_{i} is {node}")
        self._require(
            (self.b_embedded is None) == (self.order_embedded is None), "b_embedded and order_embedded go together"
        )
        conditions = _Conditions(self)
        conditions.check("b", self.b, self.order)
        if self.b_embedded is not None:
            conditions.check("b_embedded", self.b_embedded, self.order_embedded)
            self._require(self.b_embedded != self.b, "b_embedded is b; their difference would estimate no error")

    @property
    def stages(self) -> int:
        return len(self.b)

    def floats(self, step: float = 1.0) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]:
        """(step * a, step * b), each entry rounded once."""
        h = Fraction(step)
        return tuple(tuple(float(h * v) for v in row) for row in self.a), tuple(float(h * v) for v in self.b)

    def stability_polynomial(self) -> tuple[Exact, ...]:
        """Coefficients from the constant on of R(z), by which a step multiplies y where y' = (z / h) y."""
        found, powers = [Fraction(1)], [Fraction(1)] * self.stages
        for _ in range(self.stages):
            found.append(_sum([b * v for b, v in zip(self.b, powers, strict=True)]))
            powers = [_sum([a * v for a, v in zip(row, powers, strict=True)]) for row in self.a]
        return tuple(found)

    def unmet(self, order: int) -> tuple[Tree, ...]:
        """The rooted trees of at most ``order`` vertices whose conditions b does not satisfy."""
        return tuple(tree for tree, _ in _Conditions(self).unmet(self.b, order))

    def _row(self, i: int, row: Sequence[Any]) -> tuple[Exact, ...]:
        s = self.stages
        self._require(i <= len(row) <= s, f"row {i + 1} of a has {len(row)} entries; expected {i} to {s}")
        entries = tuple(_exact(v, f"row {i + 1} of a") for v in row)
        for j in range(i, len(row)):
            self._require(
                entries[j] == 0, f"row {i + 1} of a uses stage {j + 1} ({entries[j]}): the method is not explicit"
            )
        return entries[:i] + (Fraction(0),) * (s - i)

    def _require(self, holds: bool, failure: str) -> None:
        if not holds:
            raise ValueError(f"tableau {self.name!r}: {failure}")


class _Conditions:
    """The order conditions of a tableau, in integers: with the common denominator m, a tree of n vertices has its
    elementary weights times m^(n - 1). Each tree's are found once, from those of smaller trees."""

    def __init__(self, tableau: Tableau) -> None:
        self.tableau = tableau
        entries = [*tableau.b, *(tableau.b_embedded or ()), *(v for row in tableau.a for v in row)]
        parts = [part for v in entries for part in ((v.p, v.q) if isinstance(v, Surd) else (v,))]
        self.m = math.lcm(*(part.denominator for part in parts))
        self.a = [self._whole(row) for row in tableau.a]
        self.weights: dict[Tree, list[Any]] = {(): [1] * tableau.stages}
        self.sums: dict[Tree, list[Any]] = {}  # a times the weights

    def check(self, field: str, weights: Sequence[Exact], order: Any) -> None:
        name, require = self.tableau.name, self.tableau._require
        if not isinstance(order, int) or order < 1:
            raise ValueError(f"tableau {name!r}: order of {field}: expected an int of at least 1, got {order!r}")
        require(_sum(weights) == 1, f"{field} sums to {_sum(weights)}, not to 1")
        for tree, got in self.unmet(weights, order):
            raise ValueError(
                f"tableau {name!r}: {field} is not of order {order}: the tree {show(tree)} of order {vertices(tree)} "
                f"gives {got}, not 1/{density(tree)}"
            )

    def unmet(self, weights: Sequence[Exact], order: int) -> Iterator[tuple[Tree, Exact]]:
        """Trees of at most ``order`` vertices that are not given 1 / gamma, and what they are given."""
        b = self._whole(weights)
        for n in range(1, order + 1):
            for tree in trees(n):
                got, scale = _dot(b, self._elementary(tree)), self.m**n
                if got * density(tree) != scale:
                    yield tree, got * Fraction(1, scale)

    def _elementary(self, tree: Tree) -> list[Any]:
        """For each stage the product over the tree's subtrees u of sum_j a_ij w_j(u)."""
        if tree not in self.weights:
            *rest, last = tree
            if last not in self.sums:
                self.sums[last] = [_dot(row, self._elementary(last)) for row in self.a]
            pairs = zip(self._elementary(tuple(rest)), self.sums[last], strict=True)
            self.weights[tree] = [w * u for w, u in pairs]
        return self.weights[tree]

    def _whole(self, values: Sequence[Exact]) -> list[tuple[int, Any]]:
        """Those that are not zero, with their places, times m."""
        return [
            (j, Surd(int(v.p * self.m), int(v.q * self.m), v.d) if isinstance(v, Surd) else int(v * self.m))
            for j, v in enumerate(values)
            if v != 0
        ]


@functools.cache
def trees(order: int) -> tuple[Tree, ...]:
    """All rooted trees with ``order`` vertices: any smaller tree, with one more subtree at its root."""
    if order == 1:
        return ((),)
    found = {
        tuple(sorted((*tree, subtree))) for n in range(1, order) for tree in trees(order - n) for subtree in trees(n)
    }
    return tuple(sorted(found))


def vertices(tree: Tree) -> int:
    """How many a tree has, which is its order."""
    return 1 + sum(map(vertices, tree))


def density(tree: Tree) -> int:
    """gamma, the product of the sizes of all subtrees: a method of the tree's order gives the tree 1/gamma."""
    result = vertices(tree)
    for subtree in tree:
        result *= density(subtree)
    return result


def show(tree: Tree) -> str:
    """Butcher's brackets: t is a vertex, [t[t]] a root that carries a vertex and a path of two."""
    return f"[{''.join(map(show, tree))}]" if tree else "t"


def _exact(value: Any, where: str) -> Exact:
    if isinstance(value, (numbers.Rational, str)):
        return Fraction(value)
    if not isinstance(value, Surd):
        raise TypeError(f"{where}: {value!r} is not exact; give an int, a Fraction, a string such as '1/3', or a Surd")
    return value


def _sum(values: Sequence[Exact]) -> Any:
    return sum(values, Fraction(0))


def _dot(row: Sequence[tuple[int, Any]], values: Sequence[Any]) -> Any:
    return sum([x * values[j] for j, x in row])
