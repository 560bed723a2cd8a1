"""What all figures look like."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rkfast.extras import require

# Of Okabe and Ito, which readers tell apart however they see colours; lines and markers differ besides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>p*hX"
LINES = ("-", "--", "-.", ":")


def figure(width: float, height: float) -> Any:
    """A Figure that needs no display."""
    return require("matplotlib.figure", "plots").Figure(figsize=(width, height), layout="constrained")


def line(i: int) -> dict[str, Any]:
    """The look of the i-th of several lines."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)], "linewidth": 1.2}


def marked(i: int) -> dict[str, Any]:
    return {**line(i), "marker": MARKERS[i % len(MARKERS)], "markersize": 5}


def tidy(axes: Any) -> None:
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(axes: Any, *, beside: bool = False) -> None:
    """Within the axes, or to the right of them, where no line can be under it."""
    handles, names = axes.get_legend_handles_labels()
    owner, place = (axes.figure, "outside right upper") if beside else (axes, "best")
    owner.legend(handles, names, loc=place, frameon=False, fontsize=8)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """A table in text, of rows that may end early."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows)
