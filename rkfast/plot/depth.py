"""``rkfast plot depth``: ResNets of several depths with and without time stepping controllers, trained on the digits.

In the manner of Figure 5 of Yang et al., "Dynamical System Inspired Adaptive Time Stepping Controller for Residual
Network Families": test accuracy against depth. The two networks of a depth take turns step by step.
``rkfast/plot/training.py`` says what is in the file of results.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rkfast.plot import look, training

SUMMARY = "test accuracy of ResNets against depth, with and without controllers, trained on digits: TSC's Figure 5"
KINDS = {"resnet": "ResNet", "tsc_resnet": "TSC-ResNet"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser)
    parser.add_argument("--depths", type=depth, nargs="+", default=[8, 14, 20, 32], metavar="6n+2", help="(8 14 20 32)")
    parser.add_argument("--lr", type=training.rate, default=0.1, help="learning rate (%(default)s)")


def data(args: argparse.Namespace) -> tuple[list[dict[str, Any]]]:
    """Train what --results has not, adding each depth as it is done."""
    depths = sorted(set(args.depths))
    wanted = [
        (f"{depth} layers", [training.settings(f"{kind}-{depth}", {}, args.lr, args) for kind in KINDS])
        for depth in depths
    ]
    records = training.trained("depth", args, wanted)
    print(table(records), file=sys.stderr)
    return (records,)


def depth(text: str) -> int:
    value = int(text)
    if value < 8 or (value - 2) % 6:
        raise argparse.ArgumentTypeError(f"expected 6n + 2, such as 8, 14 or 20, got {text}")
    return value


def network(record: dict[str, Any]) -> tuple[str, int]:
    """Its kind and depth."""
    kind, _, layers = record["settings"]["model"].partition("-")
    return kind, int(layers)


def draw(records: list[dict[str, Any]]) -> Any:
    """Accuracy and loss on the test images behind the last epoch; a network that diverged has a gap."""
    figure = look.figure(9, 4)
    for axes, (curve, label) in zip(
        figure.subplots(1, 2), (("test_accuracy", "test accuracy"), ("test_loss", "test loss")), strict=True
    ):
        for i, (kind, name) in enumerate(KINDS.items()):
            points = {network(r)[1]: last(r, curve) for r in records if network(r)[0] == kind}
            values = [float("nan") if value is None else value for value in points.values()]
            axes.plot(list(points), values, label=name, **look.marked(i))
        axes.set(xlabel="layers", ylabel=label, xticks=sorted({network(r)[1] for r in records}))
        look.tidy(axes)
    look.legend(figure.axes[0])
    first = records[0]
    figure.suptitle(f"{first['settings']['epochs']} epochs of digits, {first['hardware']}")
    return figure


def last(record: dict[str, Any], curve: str) -> float | None:
    """Behind the last epoch; None where the training diverged."""
    epochs = record["epochs"]
    return epochs[-1][curve] if len(epochs) == record["settings"]["epochs"] else None


def table(records: list[dict[str, Any]]) -> str:
    rows: list[tuple[str, ...]] = [("layers", "network", "test accuracy", "test loss", "s per epoch")]
    for record in records:
        kind, layers = network(record)
        accuracy, loss = last(record, "test_accuracy"), last(record, "test_loss")
        seconds = record["epochs"][-1]["seconds"] / len(record["epochs"]) if record["epochs"] else None
        rows.append(
            (
                str(layers),
                KINDS[kind],
                "diverged" if accuracy is None else f"{accuracy:.4f}",
                "" if loss is None else f"{loss:.4f}",
                "" if seconds is None else f"{seconds:.2f}",
            )
        )
    return look.columns(rows)
