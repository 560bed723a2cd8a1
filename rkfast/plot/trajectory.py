"""``rkfast plot trajectory``: y' = -4 y in fixed and in adaptive steps, as in Figure 1 of the TSC paper."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from rkfast.ode import Solution, integrate
from rkfast.plot import look

SUMMARY = "y' = -4 y in fixed and in adaptive steps, which are counted: Figure 1 of the TSC paper"
RATE = -4.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", default="euler", help="of the fixed steps (%(default)s)")
    parser.add_argument("--steps", type=float, nargs="+", default=[0.05, 0.55], metavar="H", help="fixed (0.05 0.55)")
    parser.add_argument("--pair", default="fehlberg45", help="method of the adaptive steps (%(default)s)")
    parser.add_argument("--tol", type=float, default=1e-3, help="error of an adaptive step (%(default)s)")
    parser.add_argument("--end", type=float, default=3.3, help="time (%(default)s)")


def data(args: argparse.Namespace) -> tuple[dict[str, Solution]]:
    def solved(method: str, **options: Any) -> Solution:
        return integrate(lambda _, y: RATE * y, torch.ones((), dtype=torch.float64), 0.0, args.end, method, **options)

    found = {f"{args.method}, h = {h:g}": solved(args.method, h=h) for h in args.steps}
    return (found | {f"{args.pair}, tol = {args.tol:g}": solved(args.pair, tol=args.tol)},)


def draw(found: dict[str, Solution]) -> Any:
    figure = look.figure(7, 4.5)
    axes = figure.subplots()
    end = next(iter(found.values())).times[-1].item()
    times = torch.linspace(0, end, 400, dtype=torch.float64)
    axes.plot(times.tolist(), (RATE * times).exp().tolist(), color="#888888", linewidth=3, alpha=0.5, label="exp(-4t)")
    for i, (name, solution) in enumerate(found.items()):
        label = f"{name}: {solution.accepted} steps, {solution.evaluations} evaluations"
        if solution.rejected:
            label += f", {solution.rejected} rejected"
        axes.plot(solution.times.tolist(), solution.states.tolist(), label=label, **look.marked(i))
    axes.set(xlabel="t", ylabel="y", title="y' = −4y, y(0) = 1")
    look.tidy(axes)
    look.legend(axes)
    return figure
