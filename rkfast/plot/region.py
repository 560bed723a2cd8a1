"""``rkfast plot region``: where a method is stable on y' = lambda y."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from rkfast import tableau
from rkfast.plot import look
from rkfast.tableau import Tableau

SUMMARY = "regions of the complex plane, of z = h lambda, in which methods are stable on y' = lambda y"
METHODS = ("euler", "midpoint", "rk3", "rk4", "nystrom5", "huta6", "verner8")
REAL, IMAGINARY = (-8.0, 3.0), (-8.0, 8.0)
POINTS = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="see rkfast.tableau.names()")


def data(args: argparse.Namespace) -> tuple[dict[str, Tensor]]:
    return ({name: growth(tableau.get(name)) for name in args.methods},)


def growth(method: Tableau) -> Tensor:
    """|R(z)| with the real parts REAL in columns and the imaginary parts IMAGINARY in rows, Tensor [POINTS, POINTS]."""
    x, y = (torch.linspace(*ends, POINTS, dtype=torch.float64) for ends in (REAL, IMAGINARY))
    z = torch.complex(*torch.meshgrid(x, y, indexing="xy"))
    result = torch.zeros_like(z)
    for coefficient in reversed(method.stability_polynomial()):
        result = result * z + float(coefficient)
    return result.abs()


def draw(found: dict[str, Tensor]) -> Any:
    figure = look.figure(7, 6.5)
    axes = figure.subplots()
    x, y = (torch.linspace(*ends, POINTS).tolist() for ends in (REAL, IMAGINARY))
    seen = [(0.0, 0.0)]
    for i, (name, values) in enumerate(found.items()):
        line = look.line(i)
        axes.contour(x, y, values.tolist(), [1.0], colors=line["color"], linestyles=line["linestyle"], linewidths=1.4)
        axes.plot([], [], label=name, **line)  # a contour has no entry in a legend
        rows, columns = (values <= 1).nonzero(as_tuple=True)
        seen += [(x[j], y[k]) for j in (columns.min(), columns.max()) for k in (rows.min(), rows.max())]
    for ends, set_limits in zip(zip(*seen, strict=True), (axes.set_xlim, axes.set_ylim), strict=True):
        set_limits(min(ends) - 0.5, max(ends) + 0.5)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set(xlabel="Re z", ylabel="Im z", aspect="equal", title="|R(z)| = 1, z = h λ; stable within")
    look.tidy(axes)
    look.legend(axes, beside=True)
    return figure
