"""``rkfast plot order``: error against step size, and the slopes that the methods should have."""

from __future__ import annotations

import argparse
from typing import Any

from rkfast import tableau
from rkfast.ode import order
from rkfast.ode.order import Run
from rkfast.plot import look

SUMMARY = "error against step size on an equation with a known solution, beside the order of each method"
METHODS = ("euler", "midpoint", "rk3", "rk4", "nystrom5", "huta6", "verner8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="see rkfast.tableau.names()")
    names = [problem.name for problem in order.problems()]
    parser.add_argument("--problem", choices=names, default=names[0], help="(%(default)s)")


def data(args: argparse.Namespace) -> tuple[dict[str, Run]]:
    problem = next(problem for problem in order.problems() if problem.name == args.problem)
    return ({name: order.run(tableau.get(name), problem) for name in args.methods},)


def draw(runs: dict[str, Run]) -> Any:
    """Markers are errors. A thin line of each method's nominal order goes through its smallest step."""
    figure = look.figure(7, 5.5)
    axes = figure.subplots()
    for i, (name, run) in enumerate(runs.items()):
        nominal = tableau.get(name).order
        axes.plot(
            run.sizes, run.errors, label=f"{name}: {run.orders[-1]:.2f}", **look.marked(i) | {"linestyle": "none"}
        )
        ideal = [run.errors[-1] * (h / run.sizes[-1]) ** nominal for h in run.sizes]
        axes.plot(run.sizes, ideal, color=look.line(i)["color"], linewidth=0.8)
    errors = [error for run in runs.values() for error in run.errors if error > 0]
    axes.set(xscale="log", yscale="log", xlabel="h", ylabel="error at the end", ylim=(min(errors) / 3, max(errors) * 3))
    axes.set_title(f"{next(iter(runs.values())).problem}, float64: observed orders")
    look.tidy(axes)
    look.legend(axes)
    return figure
