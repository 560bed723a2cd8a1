"""``rkfast plot FIGURE``: the figures, one file each, which has

SUMMARY                  what it shows, in a line
add_arguments(parser)    its own, besides --out
data(args)               what is drawn, a tuple; a ValueError or RuntimeError says what is wrong with the arguments
draw(*data)              a matplotlib Figure
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rkfast.extras import require
from rkfast.plot import depth, figure4, increments, noise, order, region, runs, stability, stacking, steps, trajectory
from rkfast.plot.output import SUFFIXES, partial_beside

FIGURES = {
    "figure4": figure4,
    "order": order,
    "region": region,
    "increments": increments,
    "trajectory": trajectory,
    "stability": stability,
    "steps": steps,
    "stacking": stacking,
    "noise": noise,
    "depth": depth,
    "run": runs,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for name, module in FIGURES.items():
        figure = figures.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(figure)
        default = Path(f"{name}.png")
        figure.add_argument("--out", type=Path, default=default, help=f"{', '.join(SUFFIXES)} (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Draw into --out, whole or not at all. Returns 2 for what cannot be read, computed or written."""
    require("matplotlib", "plots")
    out: Path = args.out
    module = FIGURES[args.figure]
    try:
        if out.suffix.lower() not in SUFFIXES:
            raise ValueError(f"--out {out}: expected a name that ends in {', '.join(SUFFIXES)}")
        data = module.data(args)
        partial = partial_beside(out)
    except (RuntimeError, ValueError) as error:
        print(f"rkfast plot: {error}", file=sys.stderr)
        return 2
    try:
        module.draw(*data).savefig(partial, dpi=150, format=out.suffix.lower()[1:])
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"wrote {out}")
    return 0
