"""``rkfast plot stability``: TSC's Proposition 1 and equation 4, block by block."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from typing import Any

from rkfast.ode import Stability, stability
from rkfast.plot import look, network

SUMMARY = "what a network may make of a perturbation and what it makes of one, and max |1 + dt lambda|, block by block"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    network.add_model(parser, "tsc_resnet-20", "of residual blocks, ")
    network.add_images(parser)


def data(args: argparse.Namespace) -> tuple[str, Stability]:
    model, images = network.made(args)
    found = stability(model, images)
    print(found, file=sys.stderr)
    return args.model, found


def draw(name: str, found: Stability) -> Any:
    """Above the products of the factors and of the measured growths up to each block, below max |1 + dt lambda|."""
    figure = look.figure(8, 6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    places = range(1, len(found.blocks) + 1)
    for i, (label, values) in enumerate(
        (
            ("bound" if found.holds else "bound, which does not hold", [block.factor for block in found.blocks]),
            ("measured growth", [block.growth for block in found.blocks]),
        )
    ):
        # Products of hundreds of factors are no floats.
        powers = itertools.accumulate(math.log10(value) if value > 0 else -math.inf for value in values)
        above.plot(places, [p if p > -math.inf else math.nan for p in powers], label=label, **look.marked(i))
    above.axhline(0, color="black", linewidth=0.6)
    above.set(ylabel="log10 of growth since the first block", title=name)
    radii = [math.nan if block.radius is None else block.radius for block in found.blocks]
    below.plot(places, radii, **look.marked(2) | {"linestyle": "none"})
    below.axhline(1, color="black", linewidth=0.6)
    below.set(xlabel="block", ylabel="max |1 + dt λ|")
    for axes in (above, below):
        look.tidy(axes)
    look.legend(above)
    return figure
