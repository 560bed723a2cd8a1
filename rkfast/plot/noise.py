"""``rkfast plot noise``: what noise on the images does to a network with step sizes of 1, of 0.01, and of a controller.

In the manner of Figure 4 of Yang et al., "Dynamical System Inspired Adaptive Time Stepping Controller for Residual
Network Families": accuracy and loss on the test images against the standard deviation of Gaussian noise on them. The
three are trained on the digits, step by step in turns; or one is loaded, and nothing trained.
``rkfast/plot/training.py`` says what is in the file of results, of which records have besides

    noise     for each of the settings' sigmas an object with ``sigma``, ``accuracy`` and ``loss``
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from rkfast import demo
from rkfast.ode import noise_sweep
from rkfast.plot import look, network, training

SUMMARY = "accuracy and loss against noise on the images, for step sizes 1, 0.01 and learned: TSC's Figure 4"
SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
STEPS: dict[str, dict[str, Any]] = {
    "dt = 1": {"controller": "fixed", "value": 1.0},
    "dt = 0.01": {"controller": "fixed", "value": 0.01},
    "TSC": {"controller": "lstm"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser)
    network.add_model(parser, "tsc_resnet-20", "that takes controllers, ")
    parser.add_argument("--lr", type=training.rate, default=0.1, help="learning rate (%(default)s)")
    parser.add_argument(
        "--sigmas",
        type=_sigma,
        nargs="+",
        default=list(SIGMAS),
        help=f"of images of mean 0 and deviation 1 ({' '.join(f'{sigma:g}' for sigma in SIGMAS)})",
    )
    parser.add_argument(
        "--size", type=demo.positive, default=training.SIZE, help="of the images --weights are for (%(default)s)"
    )


def data(args: argparse.Namespace) -> tuple[dict[str, list[dict[str, float]]], str]:
    """With --weights the sweep of that network; else what --results has not is trained, and added."""
    sigmas = sorted(set(args.sigmas))
    options = network.options(args)
    if args.weights is not None:
        model = network.model(args, options, 1)
        _, test = demo.digits(args.seed, torch.device("cpu"), args.size)
        return {args.weights.name: sweep(model, test, sigmas, args.seed)}, args.model
    with torch.random.fork_rng([]):
        for steps in STEPS.values():  # before minutes of training
            network.model(args, options | steps, 1)
    wanted = [
        training.settings(args.model, options | steps, args.lr, args) | {"sigmas": sigmas} for steps in STEPS.values()
    ]
    records = training.trained(
        "noise", args, [(args.model, wanted)], lambda model, test: {"noise": sweep(model, test, sigmas, args.seed)}
    )
    print(table(records), file=sys.stderr)
    found = {name: record.get("noise", []) for name, record in zip(STEPS, records, strict=True)}
    return found, f"{args.model}, {args.epochs} epochs of digits"


def sweep(model: nn.Module, test: tuple[Tensor, Tensor], sigmas: list[float], seed: int) -> list[dict[str, float]]:
    batches = zip(test[0].split(demo.BATCH), test[1].split(demo.BATCH), strict=True)
    found = noise_sweep(model, batches, sigmas, generator=torch.Generator().manual_seed(seed))
    return [point._asdict() for point in found]


def draw(found: dict[str, list[dict[str, float]]], title: str) -> Any:
    figure = look.figure(9, 4)
    for axes, curve in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for i, (name, points) in enumerate(found.items()):
            label = name if points else f"{name}, diverged"
            axes.plot([p["sigma"] for p in points], [p[curve] for p in points], label=label, **look.marked(i))
        axes.set(xlabel="standard deviation of the noise", ylabel=f"test {curve}")
        look.tidy(axes)
    look.legend(figure.axes[0])
    figure.suptitle(title)
    return figure


def table(records: list[dict[str, Any]]) -> str:
    rows: list[tuple[str, ...]] = [("accuracy at sigma", *(f"{s:g}" for s in records[0]["settings"]["sigmas"]))]
    for name, record in zip(STEPS, records, strict=True):
        rows.append((name, *(f"{point['accuracy']:.4f}" for point in record.get("noise", []))))
    return look.columns(rows)


def _sigma(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, got {text}")
    return value
