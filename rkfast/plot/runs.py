"""``rkfast plot run``: trainings side by side, from what ``rkfast train`` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rkfast.plot import look
from rkfast.train import log

SUMMARY = "trainings side by side: loss, error, learning rate, step sizes, throughput, memory over the epochs"
Rows = list[dict[str, Any]]
PANELS = (
    ("loss", {"train_loss": "training", "test_loss": "test"}, "log"),
    ("error, %", {"train_error": "training", "test_error": "test"}, "linear"),
    ("learning rate", {"lr": ""}, "log"),
    ("images a second", {"images_per_second": ""}, "linear"),
    ("peak memory, GB", {"peak_bytes": ""}, "linear"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trained", type=Path, nargs="+", metavar="RUN", help="folders of rkfast train, finished or not")


def data(args: argparse.Namespace) -> tuple[dict[str, Rows]]:
    return ({str(path): rows(path) for path in args.trained},)


def rows(path: Path) -> Rows:
    """A run's rows of metrics.jsonl, each with what speed.jsonl has of its epoch.

    Raises:
        ValueError: they cannot be read, or no epoch is done.
    """
    found = log.read(path / log.METRICS)
    if not found:
        raise ValueError(f"{path}: no epoch of this training is done yet")
    speed = {row["step"]: row for row in log.read(path / log.SPEED)}
    return [{**speed.get(row["step"], {}), **row} for row in found]


def draw(runs: dict[str, Rows]) -> Any:
    """A panel for each quantity, over the epochs; solid on the test images, dotted on the training images.

    Args:
        runs: rows by the name of the run.

    Returns:
        The figure.
    """
    stepped = {name: found for name, found in runs.items() if "step_sizes" in found[-1]}
    figure = look.figure(13, 7)
    panels = figure.subplots(2, 3).flat
    for axes, (label, curves, scale) in zip(panels, PANELS, strict=False):
        for i, (name, found) in enumerate(runs.items()):
            for key in curves:
                known = [(row["epoch"], row[key]) for row in found if row.get(key) is not None]
                if not known:
                    continue
                x, y = zip(*known, strict=True)
                unit = 1e9 if key == "peak_bytes" else 1
                training = key.startswith("train_")
                axes.plot(
                    x,
                    [value / unit for value in y],
                    label=None if training else name,
                    color=look.COLOURS[i % len(look.COLOURS)],
                    linestyle=":" if training else "-",
                    linewidth=1.2,
                    drawstyle="steps-mid" if key == "lr" else "default",
                )
        axes.set(xlabel="epoch", ylabel=label, yscale=scale)
        look.tidy(axes)
    last = figure.axes[-1]
    if not stepped:
        last.remove()
    for i, (name, found) in enumerate(runs.items()):
        if name not in stepped:
            continue
        blocks = list(found[-1]["step_sizes"])
        for order, block in enumerate(blocks, 1):
            known = [(row["epoch"], row["step_sizes"][block]) for row in found if block in row.get("step_sizes", {})]
            alpha = 0.25 + 0.75 * order / len(blocks)
            last.plot(*zip(*known, strict=True), color=look.COLOURS[i % len(look.COLOURS)], alpha=alpha, linewidth=1.2)
    if stepped:
        last.set(xlabel="epoch", ylabel="step sizes, first blocks paler")
        look.tidy(last)
    look.legend(figure.axes[0])
    figure.axes[0].set_title("dotted: training images", fontsize=8)
    return figure
