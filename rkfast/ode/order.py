"""The order of a method: its order conditions, and the errors of ``RKStep`` on equations with known solutions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rkfast import tableau as tableaux
from rkfast.nn import RKStep
from rkfast.tableau import Tableau

MAX_STEPS = 256
# Steps are halved down to an error that is this small by what float64 resolves, and one halving before.
RESOLVED = 3e-13


class Problem(NamedTuple):
    """y' = field(y) from ``start``, Tensor [1, C], to ``end`` after ``time``."""

    name: str
    field: nn.Module
    start: Tensor
    time: float
    end: Tensor


class Kepler(nn.Module):
    """A planet about its sun: y = (q, p), q' = p, p' = -q / |q|^3."""

    def forward(self, y: Tensor) -> Tensor:
        q, p = y[:, :2], y[:, 2:]
        return torch.cat([p, -q / q.square().sum(1, keepdim=True) ** 1.5], 1)


class LimitCycle(nn.Module):
    """The normal form of Hopf's bifurcation: r' = r (1 - r^2), phi' = 1 in the plane."""

    def forward(self, y: Tensor) -> Tensor:
        turned = torch.stack([-y[:, 1], y[:, 0]], 1)
        return y * (1 - y.square().sum(1, keepdim=True)) + turned


def problems() -> tuple[Problem, Problem]:
    """Two nonlinear equations of more than one dimension; one would not show all order conditions above the fourth."""
    e = 0.2  # eccentricity; from perihelion to aphelion
    fast = math.sqrt((1 + e) / (1 - e))
    r, time = 0.1, 4.0
    r_end = 1 / math.sqrt(1 + (1 / r**2 - 1) * math.exp(-2 * time))
    return (
        Problem("kepler", Kepler(), _row(1 - e, 0, 0, fast), math.pi, _row(-1 - e, 0, 0, -1 / fast)),
        Problem("limit cycle", LimitCycle(), _row(r, 0), time, _row(r_end * math.cos(time), r_end * math.sin(time))),
    )


class Run(NamedTuple):
    """Largest errors at the end of a problem in ``steps`` steps each, and the orders that they show,
    log(e_i / e_(i + 1)) / log(h_i / h_(i + 1))."""

    problem: str
    embedded: bool  # of b_embedded in place of b
    sizes: tuple[float, ...]
    steps: tuple[int, ...]
    errors: tuple[float, ...]
    orders: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class OrderCheck:
    """What ``check`` found; its str is a table.

    ``conditions`` and ``conditions_embedded`` are pairs (trees, trees whose conditions hold) for 1, 2, ... vertices, up
    to one more than the order.
    """

    tableau: Tableau
    conditions: tuple[tuple[int, int], ...]
    conditions_embedded: tuple[tuple[int, int], ...]
    runs: tuple[Run, ...]

    @property
    def observed(self) -> float:
        """The order that b shows with the smallest steps, on the problem where it is lower; NaN where errors are."""
        return _least([run.orders[-1] for run in self.runs if not run.embedded])

    @property
    def observed_embedded(self) -> float | None:
        found = [run.orders[-1] for run in self.runs if run.embedded]
        return _least(found) if found else None

    @property
    def holds(self) -> bool:
        """Whether the observed orders are, rounded, the nominal ones."""
        found = [(self.observed, self.tableau.order), (self.observed_embedded, self.tableau.order_embedded)]
        return all(abs(seen - nominal) < 0.5 for seen, nominal in found if seen is not None and nominal is not None)

    def __str__(self) -> str:
        t = self.tableau
        pair = f", embedded of order {t.order_embedded}" if t.order_embedded else ""
        lines = [
            f"{t.name}: {t.stages} stages, order {t.order}{pair}",
            "",
            "weights     vertices  trees  conditions hold",
        ]
        for weights, conditions in (("b", self.conditions), ("b_embedded", self.conditions_embedded)):
            lines += [f"{weights:10}  {n:8}  {all_:5}  {met:15}" for n, (all_, met) in enumerate(conditions, 1)]
        lines += ["", "weights     problem      steps        h    error  order"]
        for run in self.runs:
            for i, (n, h, error) in enumerate(zip(run.steps, run.sizes, run.errors, strict=True)):
                order = f"{run.orders[i - 1]:5.2f}" if i else ""
                weights = "b_embedded" if run.embedded else "b"
                lines.append(f"{weights:10}  {run.problem:11}  {n:5}  {h:7.1e}  {error:7.1e}  {order}".rstrip())
        seen = f" and {self.observed_embedded:.2f}" if self.observed_embedded is not None else ""
        lines += ["", f"observed: {self.observed:.2f}{seen}, {'as' if self.holds else 'NOT as'} it should be"]
        return "\n".join(lines)


def check(method: Tableau | str, *, fused: bool = True) -> OrderCheck:
    """Count the order conditions of a method that hold, and observe its order of convergence.

    Each equation is solved in float64 by ``rkfast.nn.RKStep``, with its right-hand side for the branch of all stages,
    in 4, 8, 16, ... steps until rounding comes near; so what is tested are the steps that networks take. Of a pair
    both weights are tested. The equations are Kepler's, with eccentricity 0.2 over half a period, and that of a limit
    cycle: neither linear nor of one dimension, either of which would not show all order conditions.

    Args:
        method: a Tableau, or the name of one.
        fused: as of RKStep.

    Raises:
        TypeError: method is neither a Tableau nor a name.
        ValueError: there is no such method.
    """
    tableau = tableau_of(method)
    runs = [run(tableau, problem, fused=fused) for problem in problems()]
    conditions = _conditions(tableau)
    if tableau.b_embedded is None or tableau.order_embedded is None:
        return OrderCheck(tableau, conditions, (), tuple(runs))
    swapped = dataclasses.replace(
        tableau, b=tableau.b_embedded, order=tableau.order_embedded, b_embedded=None, order_embedded=None
    )
    runs += [run(swapped, problem, fused=fused)._replace(embedded=True) for problem in problems()]
    return OrderCheck(tableau, conditions, _conditions(swapped), tuple(runs))


def run(tableau: Tableau, problem: Problem, *, fused: bool = True) -> Run:
    """The errors of a method on a problem, over halved steps."""
    steps: list[int] = []
    errors: list[float] = []
    # Coarse steps may end in NaN.
    while len(steps) < 2 or not (errors[-1] <= RESOLVED * 2**tableau.order or steps[-1] >= MAX_STEPS):
        n = 2 * steps[-1] if steps else 4
        step, y = RKStep(tableau, problem.field, step=problem.time / n, fused=fused), problem.start
        with torch.no_grad():
            for _ in range(n):
                y = step(y)
        steps.append(n)
        errors.append((y - problem.end).abs().max().item())
    orders = tuple(
        math.log2(a / b) if 0 < a < math.inf and 0 < b < math.inf else math.nan for a, b in itertools.pairwise(errors)
    )
    return Run(problem.name, False, tuple(problem.time / n for n in steps), tuple(steps), tuple(errors), orders)


def tableau_of(method: Tableau | str) -> Tableau:
    if isinstance(method, str):
        return tableaux.get(method)
    if not isinstance(method, Tableau):
        raise TypeError(f"method: expected a Tableau or the name of one, got {type(method).__name__}")
    return method


def _conditions(tableau: Tableau) -> tuple[tuple[int, int], ...]:
    sizes = range(1, tableau.order + 2)
    unmet = [tableaux.vertices(tree) for tree in tableau.unmet(tableau.order + 1)]
    return tuple((len(tableaux.trees(n)), len(tableaux.trees(n)) - unmet.count(n)) for n in sizes)


def _least(orders: list[float]) -> float:
    return math.nan if any(map(math.isnan, orders)) else min(orders)


def _row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)
