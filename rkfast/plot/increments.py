"""``rkfast plot increments``: what each Runge-Kutta step of a network adds, stage by stage."""

from __future__ import annotations

import argparse
from typing import Any

from rkfast.ode import Probe, probe
from rkfast.plot import look, network

SUMMARY = "the sizes of h b_i k_i in the steps of a network, their local errors and step sizes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    network.add_model(parser, "ho_resnet-58", "of RKSteps, ")
    network.add_images(parser)
    parser.add_argument("--eval", action="store_true", help="running statistics in place of those of the images")


def data(args: argparse.Namespace) -> tuple[str, Probe]:
    model, images = network.made(args)
    return args.model, probe(model.train(not args.eval), images)


def draw(name: str, found: Probe) -> Any:
    """Above the increments of the stages beside what the step reads, below the step sizes."""
    figure = look.figure(8, 6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    places = range(1, len(found) + 1)
    for i in range(max(len(step.increments) for step in found)):
        sizes = [step.increments[i] if i < len(step.increments) else 0.0 for step in found]
        if any(sizes):  # the weights of some stages are 0
            above.plot(places, _positive(sizes), label=f"|h b k|, stage {i + 1}", **look.marked(i))
    above.plot(places, [step.size for step in found], color="#888888", linewidth=3, alpha=0.5, label="|y|")
    errors = [step.error or 0.0 for step in found]
    if any(errors):
        above.plot(places, _positive(errors), "x", color="black", label="local error")
    above.set(yscale="log", ylabel="root mean square", title=name)
    steps = [step.h if isinstance(step.h, tuple) else (step.h,) for step in found]
    below.plot(places, [sum(h) / len(h) for h in steps], **look.marked(0))
    below.vlines(places, [min(h) for h in steps], [max(h) for h in steps], color=look.line(0)["color"])
    below.set(xlabel="step", ylabel="h", xticks=places)
    for axes in (above, below):
        look.tidy(axes)
    look.legend(above, beside=True)
    return figure


def _positive(values: list[float]) -> list[float]:
    """A logarithmic axis leaves out what is no number."""
    return [value if value > 0 else float("nan") for value in values]
