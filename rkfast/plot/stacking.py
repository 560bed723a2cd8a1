"""``rkfast plot stacking``: 28 blocks stacked as Euler, midpoint, RK4 and RK8 steps, and trained on the digits.

In the manner of Figures 8 to 11 and 13 of Luo et al., "Rethinking ResNets: Improved Stacking Strategies With High Order
Schemes": accuracies and losses by epoch, at two learning rates, and the seconds of training until an accuracy is
reached. Their schedule is scaled to the epochs asked for. The networks of one learning rate take turns step by step, so
that whatever the machine does meanwhile happens to all of them; what is added later to a file of results has seconds
of its own. ``rkfast/plot/training.py`` says what is in the file of results.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rkfast import tableau
from rkfast.models.ho_resnet import ALIASES
from rkfast.plot import look, training
from rkfast.plot.training import CURVES

SUMMARY = "Euler, midpoint, RK4 and RK8 steps at equal depth, trained on digits: HO-ResNet's Figures 10, 11 and 13"
METHODS = {"euler": "Euler", "midpoint": "midpoint", "rk4": "RK4", "rk8": "RK8"}
LAYERS = 58  # the least of which all four are whole steps
WIDTH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser, "stacking.json")
    parser.add_argument(
        "--lr", type=training.rate, nargs="+", default=[0.05, 0.1], help="learning rates (0.05 0.1, the paper's)"
    )
    parser.add_argument("--target", type=_share, default=0.85, help="accuracy to be reached, 0 to 1 (%(default)s)")


def data(args: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """Train what --results has not, adding each learning rate as it is done: (records, target)."""
    wanted = [
        (f"learning rate {lr:g}", [settings(method, lr, args) for method in METHODS]) for lr in dict.fromkeys(args.lr)
    ]
    records = training.trained("stacking", args, wanted)
    print(table(records, args.target), file=sys.stderr)
    return records, args.target


def settings(method: str, lr: float, args: argparse.Namespace) -> dict[str, Any]:
    options = {"method": method, "width": WIDTH}
    return training.settings(f"ho_resnet-{LAYERS}", options, lr, args)


def time_to(record: dict[str, Any], curve: str, target: float) -> float | None:
    """Seconds of training at the end of the first epoch whose accuracy is at least ``target``."""
    return next((epoch["seconds"] for epoch in record["epochs"] if epoch[curve] >= target), None)


def draw(records: list[dict[str, Any]], target: float) -> Any:
    """A row of panels for each learning rate: the four curves, and the times to the target."""
    rates = list(dict.fromkeys(record["settings"]["lr"] for record in records))
    figure = look.figure(19, 3.6 * len(rates) + 0.6)
    panels = figure.subplots(len(rates), len(CURVES) + 1, squeeze=False)
    for row, rate in zip(panels, rates, strict=True):
        shown = [record for record in records if record["settings"]["lr"] == rate]
        for axes, (curve, label) in zip(row, CURVES.items(), strict=False):
            for record in shown:
                values = [epoch[curve] for epoch in record["epochs"]]
                style = look.line(list(METHODS).index(record["settings"]["method"]))
                axes.plot(range(1, len(values) + 1), values, label=_name(record), **style)
            axes.set(xlabel="epoch", title=f"{label}, learning rate {rate:g}")
            axes.set_xlim(0.5, shown[0]["settings"]["epochs"] + 0.5)
            if curve.endswith("loss"):
                axes.set_yscale("log")
            look.tidy(axes)
        _draw_times(row[-1], shown, target)
    look.legend(panels[0][0])
    first = records[0]
    figure.suptitle(f"HO-ResNet-{LAYERS} on digits, {first['hardware']}")
    return figure


def _draw_times(axes: Any, records: list[dict[str, Any]], target: float) -> None:
    for i, record in enumerate(records):
        color = look.COLOURS[list(METHODS).index(record["settings"]["method"])]
        for offset, curve, alpha in ((-0.2, "train_accuracy", 1.0), (0.2, "test_accuracy", 0.5)):
            seconds = time_to(record, curve, target)
            bar = axes.barh(i + offset, seconds or 0, 0.38, color=color, alpha=alpha)
            part = curve.partition("_")[0]
            axes.bar_label(bar, [f"{part}: not reached" if seconds is None else f"{part}: {seconds:.1f} s"], padding=2)
    axes.set_yticks(range(len(records)), [METHODS[record["settings"]["method"]] for record in records])
    axes.invert_yaxis()
    axes.margins(x=0.5)
    axes.set(xlabel="seconds of training", title=f"time to accuracy {target:g}")


def _name(record: dict[str, Any]) -> str:
    """Such as "RK4 x7", and how far it came where its loss went to infinity."""
    method = record["settings"]["method"]
    stages = tableau.get(ALIASES.get(method, method)).stages
    ended = "" if len(record["epochs"]) == record["settings"]["epochs"] else ", diverged"
    return f"{METHODS[method]} x{(LAYERS - 2) // 2 // stages}{ended}"


def table(records: list[dict[str, Any]], target: float) -> str:
    rows: list[tuple[str, ...]] = [
        ("learning rate", "steps", "test accuracy", "s per epoch", f"s to {target:g}, training", "test")
    ]
    for record in records:
        epochs = record["epochs"]
        times = [time_to(record, curve, target) for curve in ("train_accuracy", "test_accuracy")]
        rows.append(
            (
                f"{record['settings']['lr']:g}",
                _name(record),
                f"{epochs[-1]['test_accuracy']:.4f}" if epochs else "",
                f"{epochs[-1]['seconds'] / len(epochs):.2f}" if epochs else "",
                *("" if seconds is None else f"{seconds:.1f}" for seconds in times),
            )
        )
    return look.columns(rows)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text}")
    return value
