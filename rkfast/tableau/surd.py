"""Numbers p + q * sqrt(d) with rational p and q, of which Gill's and Verner's methods are made."""

from __future__ import annotations

import functools
import math
import numbers
from dataclasses import dataclass
from fractions import Fraction

Rational = int | Fraction


@dataclass(frozen=True, eq=False)
class Surd:
    """``p + q * sqrt(d)``, exact. Sums and products take rationals and other numbers of the same d.

    Args:
        p, q: ints or Fractions.
        d: a square-free int of at least 2.

    Raises:
        TypeError: p or q is not rational, or d is no int.
        ValueError: d is not square-free; in arithmetic, d differs.
    """

    p: Rational
    q: Rational
    d: int

    def __post_init__(self) -> None:
        for name in ("p", "q"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Rational):
                raise TypeError(f"{name}: {value!r} is not exact; give an int or a Fraction")
        if not isinstance(self.d, int):
            raise TypeError(f"d: expected an int, got {self.d!r}")
        if not _square_free(self.d):
            raise ValueError(f"d: expected a square-free int of at least 2, got {self.d}")

    def __add__(self, other: Surd | Rational) -> Surd:
        p, q = self._parts(other)
        return Surd(self.p + p, self.q + q, self.d)

    def __mul__(self, other: Surd | Rational) -> Surd:
        p, q = self._parts(other)
        return Surd(self.p * p + self.d * self.q * q, self.p * q + self.q * p, self.d)

    __radd__, __rmul__ = __add__, __mul__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Surd):
            return (self.p, self.q) == (other.p, other.q) and (self.d == other.d or not self.q)
        return not self.q and self.p == other

    def __hash__(self) -> int:
        return hash((self.p, self.q, self.d)) if self.q else hash(self.p)

    def __float__(self) -> float:
        """Rounded once."""
        scale = math.lcm(self.p.denominator, self.q.denominator)
        p, q = int(self.p * scale), int(self.q * scale)
        # |p + q sqrt(d)| is at least 1 / (|p| + |q| sqrt(d)), however much of it cancels.
        bits = 2 * (p.bit_length() + q.bit_length() + self.d.bit_length()) + 128
        root = math.isqrt(q * q * self.d << 2 * bits)
        return float(Fraction((p << bits) + (root if q > 0 else -root), scale << bits))

    def __str__(self) -> str:
        return f"{self.p} {'-' if self.q < 0 else '+'} {abs(self.q)}*sqrt({self.d})"

    def _parts(self, other: Surd | Rational) -> tuple[Rational, Rational]:
        if not isinstance(other, Surd):
            return other, 0
        if other.d != self.d:
            raise ValueError(f"sqrt({self.d}) and sqrt({other.d}) do not mix")
        return other.p, other.q


@functools.cache
def _square_free(d: int) -> bool:
    return d > 1 and all(d % (k * k) for k in range(2, math.isqrt(d) + 1))
