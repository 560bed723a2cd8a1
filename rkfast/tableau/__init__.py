"""Explicit Runge-Kutta methods as Butcher tableaux: exact, frozen, and checked against the order they claim."""

from __future__ import annotations

import functools

from rkfast.tableau.butcher import Tableau, Tree, density, show, trees, vertices
from rkfast.tableau.methods import METHODS
from rkfast.tableau.surd import Surd

__all__ = ["Surd", "Tableau", "Tree", "density", "get", "names", "register", "show", "trees", "vertices"]

_REGISTERED: dict[str, Tableau] = {}


def names() -> list[str]:
    """The methods that ``get`` knows."""
    return [*METHODS, *_REGISTERED]


def get(name: str) -> Tableau:
    """The tableau of a method, checked when it is first asked for.

    ========================  ======  =====  ===================================================
    name                      stages  order
    ========================  ======  =====  ===================================================
    euler                          1      1
    midpoint                       2      2
    improved_euler                 2      2  the trapezoidal rule after Euler's step (Heun)
    ralston                        2      2  of the least error bound
    heun3                          3      3
    rk3                            3      3  Kutta
    rk4                            4      4  the classical one
    rk38                           4      4  Kutta's 3/8 rule
    gill4                          4      4
    nystrom5                       6      5
    huta6                          8      6
    fehlberg45                     6      4  b_embedded of order 5
    dopri5                         7      5  b_embedded of order 4 (Dormand and Prince)
    verner8                       14      8  HO-ResNet's RK8
    verner89                      16      8  b_embedded of order 9; b is that of verner8
    ========================  ======  =====  ===================================================

    Raises:
        TypeError: name is no str.
        ValueError: there is no such method.
    """
    if not isinstance(name, str):
        raise TypeError(f"method: expected a str, got {type(name).__name__}")
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in METHODS:
        raise ValueError(f"method: {name[:64]!r} is not a Runge-Kutta method; choose one of {', '.join(names())}")
    return _checked(name)


RESERVED = ("rk8",)
"""What a network takes for another name of verner8."""


def register(tableau: Tableau) -> Tableau:
    """Make a tableau known by its name, for ``get`` and for whoever takes the name of a method. Returns it.

    Raises:
        TypeError: it is no Tableau.
        ValueError: a method of this name is known already.
    """
    if not isinstance(tableau, Tableau):
        raise TypeError(f"tableau: expected a Tableau, got {type(tableau).__name__}")
    if tableau.name in {*METHODS, *_REGISTERED, *RESERVED}:
        raise ValueError(f"tableau: there is a method {tableau.name!r} already; give yours another name")
    _REGISTERED[tableau.name] = tableau
    return tableau


@functools.cache
def _checked(name: str) -> Tableau:
    return Tableau(name, **METHODS[name])
