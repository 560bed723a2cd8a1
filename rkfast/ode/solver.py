"""An initial value problem in fixed steps, or in steps that follow the embedded error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rkfast.ode.order import tableau_of
from rkfast.ops.checks import real
from rkfast.tableau import Tableau

Field = Callable[[float, Tensor], Tensor]

MIN_CHANGE, MAX_CHANGE = 0.2, 5.0  # of a step size, from one step to the next


@dataclass(frozen=True)
class Solution:
    """``states[i]`` is y at ``times[i]``: Tensor [n + 1, ...] and Tensor [n + 1] of float64, n = ``accepted`` steps.
    ``evaluations`` counts the calls of f, those of ``rejected`` steps among them."""

    times: Tensor
    states: Tensor
    accepted: int
    rejected: int
    evaluations: int


def integrate(
    f: Field,
    y0: Tensor,
    t0: float,
    t1: float,
    method: Tableau | str,
    *,
    tol: float | None = None,
    h: float | None = None,
    kappa: float = 0.9,
    max_steps: int = 10_000,
) -> Solution:
    """Solve y' = f(t, y), y(t0) = y0, up to t1, which may lie before t0.

    With ``h`` all steps are of this size; the last ends at t1. With ``tol`` a pair of a method chooses them: a step is
    accepted if its error, err = max |h sum_i (b_i - b^_i) k_i| over all elements, is at most tol, and the next one, or
    the same once more, is taken with

        h' = kappa * h * (tol / err)^(1 / (p + 1))

    where p is the lower order of the pair (Yang et al., "Dynamical System Inspired Adaptive Time Stepping Controller
    for Residual Network Families", equation 6). Not in the paper: h' is between h / 5 and 5 h, and the first step is
    such that the first slope alone moves y by tol^(1 / (p + 1)).

    This is for small questions about methods. Gradients flow through the steps by autograd, which keeps all of them,
    and not through their sizes; for stiff or long problems, dense output, events or gradients by the adjoint equation
    take torchdiffeq.

    Args:
        f: (t, y) -> y', of the shape and dtype of y; t is a float, and y a copy that f may write into.
        y0: Tensor of any shape, floating or complex.
        t0, t1: where to start and to end.
        method: a Tableau, or the name of one; with ``tol`` one with embedded weights, such as "fehlberg45".
        tol: the error that a step may have, absolute.
        h: the size of a step, above 0 whatever the direction.
        kappa: the factor of equation 6.
        max_steps: how many steps may be tried.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: neither or both of tol and h are given, the method has no embedded weights, a number or y0 is not
            finite or out of range, t1 is t0, h needs more than max_steps, or f returns another shape or dtype.
        RuntimeError: y is no longer finite, max_steps were tried, or steps have become too small for t.
    """
    tableau = tableau_of(method)
    if not isinstance(y0, Tensor):
        raise TypeError(f"y0: expected a Tensor, got {type(y0).__name__}")
    if not (y0.is_floating_point() or y0.is_complex()):
        raise TypeError(f"y0: expected a floating or complex dtype, got {y0.dtype}; take y0.double()")
    t0, t1, kappa = _number("t0", t0), _number("t1", t1), _number("kappa", kappa, above=0)
    if t0 == t1:
        raise ValueError(f"t1: expected another time than t0, got {t1} for both")
    if not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps: expected an int of at least 1, got {max_steps!r}")
    if not _finite(y0):
        raise ValueError("y0: holds NaN or infinity")
    steps = _Steps(f, tableau)
    if h is not None and tol is None:
        return _fixed(steps, y0, t0, t1, _number("h", h, above=0), max_steps)
    if tol is None or h is not None:
        raise ValueError(f"tol, h: expected one of them, got tol={tol}, h={h}")
    if tableau.b_embedded is None:
        raise ValueError(
            f"tol: {tableau.name} has no embedded weights to estimate an error with; give h, or take a pair such as "
            "fehlberg45 or dopri5"
        )
    return _adaptive(steps, y0, t0, t1, _number("tol", tol, above=0), kappa, max_steps)


class _Steps:
    """Single steps, and how often they called f."""

    def __init__(self, f: Field, tableau: Tableau) -> None:
        self.f = f
        self.a, self.b = tableau.floats()
        self.c = [float(c) for c in tableau.c]
        self.order = min(tableau.order, tableau.order_embedded or tableau.order)
        embedded = tableau.b_embedded or tableau.b
        self.difference = [float(b + -1 * e) for b, e in zip(tableau.b, embedded, strict=True)]
        # The last stage of some is the first of the next step.
        self.reused = tableau.a[-1] == tableau.b
        self.evaluations = 0

    def slope(self, t: float, y: Tensor) -> Tensor:
        self.evaluations += 1
        k = self.f(t, y.clone())  # which f may write into
        if not isinstance(k, Tensor) or k.shape != y.shape or k.dtype != y.dtype:
            got = f"{list(k.shape)} of {k.dtype}" if isinstance(k, Tensor) else type(k).__name__
            raise ValueError(f"f: expected a Tensor {list(y.shape)} of {y.dtype}, as y is, got {got}")
        return k

    def __call__(self, t: float, h: float, y: Tensor, first: Tensor) -> tuple[Tensor, list[Tensor]]:
        slopes = [first]
        for row, c in zip(self.a[1:], self.c[1:], strict=True):
            slopes.append(self.slope(t + c * h, _sum(y, h, row, slopes)))
        return _sum(y, h, self.b, slopes), slopes

    def first(self, t: float, y: Tensor, slopes: Sequence[Tensor]) -> Tensor:
        """k_1 of the step after the one that had these slopes."""
        return slopes[-1] if self.reused else self.slope(t, y)


def _fixed(steps: _Steps, y: Tensor, t0: float, t1: float, h: float, max_steps: int) -> Solution:
    whole = abs(t1 - t0) / h
    # A rounding more than a whole number of steps is no step of its own.
    n = max(1, math.ceil(whole * (1 - 1e-12))) if whole < max_steps + 1 else math.inf
    if n > max_steps:
        raise ValueError(f"h: {h:g} makes {whole:.4g} steps from {t0:g} to {t1:g}; take a larger h or max_steps")
    h = math.copysign(h, t1 - t0)
    times = [t0 + i * h for i in range(int(n))] + [t1]
    states, slopes = [y], None
    for i, t in enumerate(times[:-1]):
        first = steps.slope(t, y) if slopes is None else steps.first(t, y, slopes)
        y, slopes = steps(t, h if i + 2 < len(times) else t1 - t, y, first)
        if not _finite(y):
            raise RuntimeError(f"h: with steps of {abs(h):g} y is no longer finite at t = {times[i + 1]:g}; take less")
        states.append(y)
    return _solution(times, states, 0, steps)


def _adaptive(steps: _Steps, y: Tensor, t0: float, t1: float, tol: float, kappa: float, max_steps: int) -> Solution:
    t, times, states, rejected = t0, [t0], [y], 0
    first = steps.slope(t, y)
    power = 1 / (steps.order + 1)
    fastest = _largest(first)
    if not math.isfinite(fastest):
        raise RuntimeError(f"f: NaN or infinity at t = {t:g}")
    h = min(abs(t1 - t0), tol**power / fastest if fastest else math.inf)
    for _ in range(max_steps):
        left = abs(t1 - t)
        # The last two are made even, so that none is left over for rounding.
        size = left if h >= left else min(h, left / 2) if 2 * h > left else h
        signed = math.copysign(size, t1 - t0)
        after = t1 if size == left else t + signed
        if after == t or size < 1e-14 * max(abs(t0), abs(t1)):
            raise RuntimeError(
                f"tol: steps of {size:.1e} at t = {t:.6g} are too small for t; y has a singularity there, or {tol:g} "
                f"is less than {y.dtype} resolves"
            )
        trial, slopes = steps(t, signed, y, first)
        err = _largest(_sum(None, signed, steps.difference, slopes))
        if not (math.isfinite(err) and _finite(trial)):
            err = math.inf
        change = MAX_CHANGE if err == 0 else kappa * (tol / err) ** power
        h = size * min(MAX_CHANGE, max(MIN_CHANGE, change))
        if err > tol:
            rejected += 1
            continue
        t, y = after, trial
        times.append(t)
        states.append(y)
        if t == t1:
            return _solution(times, states, rejected, steps)
        first = steps.first(t, y, slopes)
    raise RuntimeError(
        f"max_steps: tried {max_steps} steps ({rejected} rejected) and came from {t0:g} to {t:g}, not to {t1:g}; "
        "take a larger tol or max_steps"
    )


def _solution(times: list[float], states: list[Tensor], rejected: int, steps: _Steps) -> Solution:
    at = torch.tensor(times, dtype=torch.float64)
    return Solution(at, torch.stack(states), len(times) - 1, rejected, steps.evaluations)


def _sum(y: Tensor | None, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """y, or nothing, + h sum_i w_i k_i"""
    total = torch.zeros_like(slopes[0]) if y is None else y
    for w, k in zip(weights, slopes, strict=False):
        if w:
            total = torch.add(total, k, alpha=h * w)
    return total


def _finite(y: Tensor) -> bool:
    return bool(y.isfinite().all())


def _largest(y: Tensor) -> float:
    return y.detach().abs().max().item() if y.numel() else 0.0


def _number(name: str, value: object, above: float = -math.inf) -> float:
    real(value, name)
    number = float(value)  # type: ignore[arg-type]  # real has looked
    if not (math.isfinite(number) and number > above):
        bound = "" if above == -math.inf else f" above {above:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {number}")
    return number
