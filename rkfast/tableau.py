"""Explicit Runge-Kutta methods as Butcher tableaux: exact, frozen, and checked against the order they claim.

y' = y + h * sum_i b_i k_i,   k_i = F(y + h * sum_{j<i} a_ij k_j)
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

Tree = tuple["Tree", ...]  # a rooted tree is the sorted tuple of its subtrees; () is a single vertex


class Exact(Protocol):
    """What is asked of a coefficient. Fraction has it, and so may any other exact field, such as Q(sqrt(6)), that mixes
    with Fraction."""

    def __add__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def __rmul__(self, other: Any, /) -> Any: ...
    def __float__(self) -> float: ...


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method with s stages.

    Args:
        name: what errors and reprs call it.
        a: s rows; row i (from 1) holds a_i1 ... a_i,i-1 and may go on with zeros.
        b, c: s weights and s nodes.
        order: the order that b reaches.
        b_embedded, order_embedded: a second set of weights for error estimates, and its order; both or neither.

    Coefficients are ints, Fractions, strings such as "1/3", or of a type like ``Exact``; floats are refused.

    Raises:
        TypeError: a coefficient is not exact.
        ValueError: shapes do not fit, a row uses its own or a later stage, a row of a does not sum to its node, or a
            rooted tree of at most ``order`` vertices does not satisfy its order condition.
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
        for i, (row, node) in enumerate(zip(self.a, self.c, strict=True), 1):
            self._require(_sum(row) == node, f"row {i} of a sums to {_sum(row)}, and c_{i} is {node}")
        self._check_order("b", self.b, self.order)
        self._require(
            (self.b_embedded is None) == (self.order_embedded is None), "b_embedded and order_embedded go together"
        )
        if self.b_embedded is not None and self.order_embedded is not None:
            self._check_order("b_embedded", self.b_embedded, self.order_embedded)

    @property
    def stages(self) -> int:
        return len(self.b)

    def floats(self, step: float = 1.0) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]:
        """(step * a, step * b), each entry rounded once."""
        h = Fraction(step)
        return tuple(tuple(float(h * v) for v in row) for row in self.a), tuple(float(h * v) for v in self.b)

    def _row(self, i: int, row: Sequence[Any]) -> tuple[Exact, ...]:
        s = self.stages
        self._require(i <= len(row) <= s, f"row {i + 1} of a has {len(row)} entries; expected {i} to {s}")
        entries = tuple(_exact(v, f"row {i + 1} of a") for v in row)
        for j in range(i, len(row)):
            self._require(
                entries[j] == 0, f"row {i + 1} of a uses stage {j + 1} ({entries[j]}): the method is not explicit"
            )
        return entries[:i] + (Fraction(0),) * (s - i)

    def _check_order(self, field: str, weights: Sequence[Exact], order: int) -> None:
        if not isinstance(order, int) or order < 1:
            raise ValueError(f"tableau {self.name!r}: order of {field}: expected an int of at least 1, got {order!r}")
        self._require(_sum(weights) == 1, f"{field} sums to {_sum(weights)}, not to 1")
        for n in range(2, order + 1):
            for tree in trees(n):
                got = _dot(weights, self._elementary(tree))
                self._require(
                    got * density(tree) == 1,
                    f"{field} is not of order {order}: the tree {show(tree)} of order {n} gives {got}, "
                    f"not 1/{density(tree)}",
                )

    def _elementary(self, tree: Tree) -> list[Any]:
        """Elementary weights of the stages: for each stage the product over the tree's subtrees u of sum_j a_ij u_j."""
        weights: list[Any] = [Fraction(1)] * self.stages
        for subtree in tree:
            inner = self._elementary(subtree)
            weights = [w * _dot(row, inner) for w, row in zip(weights, self.a, strict=True)]
        return weights

    def _require(self, holds: bool, failure: str) -> None:
        if not holds:
            raise ValueError(f"tableau {self.name!r}: {failure}")


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
    if isinstance(value, numbers.Number) or not hasattr(value, "__float__"):
        raise TypeError(f"{where}: {value!r} is not exact; give an int, a Fraction or a string such as '1/3'")
    return value


def _sum(values: Sequence[Exact]) -> Any:
    return sum(values, Fraction(0))


def _dot(left: Sequence[Exact], right: Sequence[Any]) -> Any:
    return _sum([x * y for x, y in zip(left, right, strict=True)])


_METHODS: dict[str, dict[str, Any]] = {
    "euler": {"a": [[]], "b": [1], "c": [0], "order": 1},
    "midpoint": {"a": [[], ["1/2"]], "b": [0, 1], "c": [0, "1/2"], "order": 2},
    "rk4": {
        "a": [[], ["1/2"], [0, "1/2"], [0, 0, 1]],
        "b": ["1/6", "1/3", "1/3", "1/6"],
        "c": [0, "1/2", "1/2", 1],
        "order": 4,
    },
}


def names() -> list[str]:
    """The methods that ``get`` knows."""
    return list(_METHODS)


def get(name: str) -> Tableau:
    """The tableau of a method, checked when it is first asked for.

    Raises:
        TypeError: name is no str.
        ValueError: there is no such method.
    """
    if not isinstance(name, str):
        raise TypeError(f"method: expected a str, got {type(name).__name__}")
    if name not in _METHODS:
        raise ValueError(f"method: {name[:64]!r} is not a Runge-Kutta method; choose one of {', '.join(_METHODS)}")
    return _checked(name)


@functools.cache
def _checked(name: str) -> Tableau:
    return Tableau(name, **_METHODS[name])
