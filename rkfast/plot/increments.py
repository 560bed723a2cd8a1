"""``rkfast plot increments``: what each Runge-Kutta step of a network adds, stage by stage."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rkfast.models import create_model
from rkfast.ode import Probe, probe
from rkfast.plot import look

SUMMARY = "the sizes of h b_i k_i in the steps of a network, their local errors and step sizes"
IMAGES = ("random", "digits")
BATCH, SIZE = 32, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ho_resnet-58", help="of RKSteps, as create_model names it (%(default)s)")
    parser.add_argument(
        "--options", default="{}", metavar="JSON", help='of create_model, such as \'{"method": "dopri5", "width": 16}\''
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state_dict that torch.save wrote (fresh ones)")
    parser.add_argument("--images", choices=IMAGES, default=IMAGES[0], help="(%(default)s); digits are scikit-learn's")
    parser.add_argument("--eval", action="store_true", help="running statistics in place of those of the images")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (%(default)s)")


def data(args: argparse.Namespace) -> tuple[str, Probe]:
    try:
        options = json.loads(args.options)
    except ValueError as error:
        raise ValueError(f"--options {args.options!r} is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f'--options {args.options!r}: expected an object, such as {{"width": 16}}')
    with torch.random.fork_rng([]):
        torch.manual_seed(args.seed)
        images = _images(args, options)
        try:
            model = create_model(args.model, **{"in_chans": images.shape[1], **options})
        except TypeError as error:
            raise ValueError(f"--model {args.model}: {error}") from error
    if args.weights is not None:
        _load(model, args.weights)
    return args.model, probe(model.train(not args.eval), images)


def _images(args: argparse.Namespace, options: dict[str, Any]) -> Tensor:
    """Tensor [BATCH, in_chans, SIZE, SIZE]"""
    if args.images == "random":
        return torch.randn(BATCH, options.get("in_chans", 3), SIZE, SIZE)
    from rkfast.demo import digits

    return digits(args.seed, torch.device("cpu"))[1][0][:BATCH]


def _load(model: nn.Module, file: Path) -> None:
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # what a file that is no state_dict makes of the unpickler can be any
        raise ValueError(f"--weights {file} cannot be loaded: {error}") from error


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
