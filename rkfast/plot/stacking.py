"""``rkfast plot stacking``: 28 blocks stacked as Euler, midpoint, RK4 and RK8 steps, and trained on the digits.

In the manner of Figures 8 to 11 and 13 of Luo et al., "Rethinking ResNets: Improved Stacking Strategies With High Order
Schemes": accuracies and losses by epoch, at two learning rates, and the seconds of training until an accuracy is
reached. Their schedule is scaled to the epochs asked for. The networks of one learning rate take turns step by step, so
that whatever the machine does meanwhile happens to all of them; what is added later to a file of results has seconds
of its own.

What was trained lies in a file of results, a JSON list of objects with

    settings  what the training depends on; one that the file has already is not trained again
    hardware  where it ran, in words
    epochs    for each epoch ``seconds`` of training since the first, ``train_accuracy`` and ``train_loss`` (means over
              the epoch's batches), ``test_accuracy`` and ``test_loss``; fewer than asked for where the loss went to
              infinity
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast
from rkfast import demo, tableau
from rkfast.extras import require
from rkfast.models.ho_resnet import ALIASES
from rkfast.plot import look
from rkfast.plot.output import partial_beside

SUMMARY = "Euler, midpoint, RK4 and RK8 steps at equal depth, trained on digits: HO-ResNet's Figures 10, 11 and 13"
METHODS = {"euler": "Euler", "midpoint": "midpoint", "rk4": "RK4", "rk8": "RK8"}
LAYERS = 58  # the least of which all four are whole steps
WIDTH = 16
SIZE = 8  # of the digits as they come
MILESTONES = (100 / 260, 150 / 260, 200 / 260, 230 / 260)
CURVES = {
    "train_accuracy": "training accuracy",
    "test_accuracy": "test accuracy",
    "train_loss": "training loss",
    "test_loss": "test loss",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=demo.positive, default=10, help="(%(default)s)")
    parser.add_argument(
        "--lr", type=_rate, nargs="+", default=[0.05, 0.1], help="learning rates (0.05 0.1, the paper's)"
    )
    parser.add_argument("--target", type=_share, default=0.85, help="accuracy to be reached, 0 to 1 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order of the images (%(default)s)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (%(default)s)")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("stacking.json"),
        metavar="FILE",
        help="what was trained before, and is not trained again; what is trained now is added (%(default)s)",
    )


def data(args: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """Train what --results has not, adding each learning rate as it is done: (records, target)."""
    tqdm = require("tqdm", "demo").tqdm
    found = results(args.results) if args.results.exists() else []
    wanted = [settings(method, lr, args) for lr in dict.fromkeys(args.lr) for method in METHODS]
    missing = [each for each in wanted if all(record["settings"] != each for record in found)]
    if missing:
        try:
            device = torch.device(args.device)
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"--device {args.device}: {error}") from error
        partial = partial_beside(args.results, "--results")  # before minutes of training
        try:
            for lr in dict.fromkeys(each["lr"] for each in missing):
                now = [each for each in missing if each["lr"] == lr]
                with tqdm(total=args.epochs, desc=f"learning rate {lr:g}", unit="epoch", file=sys.stderr) as bar:
                    found += train(now, device, bar)
                partial.write_text(json.dumps(found, indent=1) + "\n")
                os.replace(partial, args.results)
        finally:
            partial.unlink(missing_ok=True)
    records = [next(record for record in found if record["settings"] == each) for each in wanted]
    print(table(records, args.target), file=sys.stderr)
    return records, args.target


def settings(method: str, lr: float, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": f"ho_resnet-{LAYERS}",
        "method": method,
        "width": WIDTH,
        "size": SIZE,
        "batch": demo.BATCH,
        "lr": lr,
        "epochs": args.epochs,
        "seed": args.seed,
        "device": args.device,
    }


def results(file: Path) -> list[dict[str, Any]]:
    """The records of a file of results.

    Raises:
        ValueError: what is wrong with it, by name.
    """
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--results {file} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"--results {file} is no JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"--results {file}: expected a list of what rkfast plot stacking has trained")
    for i, record in enumerate(records):
        epochs = record.get("epochs") if isinstance(record, dict) and "settings" in record else None
        whole = isinstance(epochs, list) and all(
            isinstance(epoch, dict) and all(isinstance(epoch.get(key), (int, float)) for key in ("seconds", *CURVES))
            for epoch in epochs
        )
        if not whole:
            raise ValueError(f"--results {file}: [{i}] is not what rkfast plot stacking writes; give another file")
    return records


def train(wanted: list[dict[str, Any]], device: torch.device, bar: Any) -> list[dict[str, Any]]:
    """Records of the file of results, of settings that differ in the method alone."""
    seed, batch, epochs = (wanted[0][key] for key in ("seed", "batch", "epochs"))
    (images, labels), test = demo.digits(seed, device, wanted[0]["size"])
    trainings = [Training(settings, device) for settings in wanted]
    for training in trainings:  # what is loaded and allocated once and for all is not part of the time
        copy.deepcopy(training.model)(images[:batch].contiguous(memory_format=torch.channels_last)).sum().backward()
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        # The last, smaller batch is left out: every step does the same work.
        for i, chosen in enumerate(torch.randperm(len(labels), generator=order).split(batch)[: len(labels) // batch]):
            chosen = chosen.to(device)
            x, y = images[chosen].contiguous(memory_format=torch.channels_last), labels[chosen]
            first = i % len(trainings)  # none is always the one that finds the caches warm
            for training in trainings[first:] + trainings[:first]:
                training.step(x, y)
        for training in trainings:
            training.end_epoch(test)
        bar.update()
    hardware = demo.hardware(device)
    return [{"settings": t.settings, "hardware": hardware, "epochs": t.epochs} for t in trainings]


class Training:
    """One network, with its optimizer and what was seen of it."""

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        torch.manual_seed(settings["seed"])
        options = {"method": settings["method"], "width": settings["width"], "in_chans": 1}
        model = rkfast.create_model(settings["model"], **options).to(device)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=settings["lr"], momentum=0.9, weight_decay=1e-4)
        milestones = [round(share * settings["epochs"]) for share in MILESTONES]
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, gamma=0.1)
        self.settings = settings
        self.device = device
        self.epochs: list[dict[str, float]] = []
        self.seconds = 0.0
        self.seen: list[tuple[Tensor, Tensor]] = []  # loss and accuracy of this epoch's steps
        self.diverged = False

    def step(self, images: Tensor, labels: Tensor) -> None:
        if self.diverged:
            return
        self.synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        answers = self.model(images)
        loss = F.cross_entropy(answers, labels)
        loss.backward()
        self.optimizer.step()
        self.synchronize()
        self.seconds += time.perf_counter() - start
        self.seen.append((loss.detach(), (answers.detach().argmax(1) == labels).float().mean()))

    def end_epoch(self, test: tuple[Tensor, Tensor]) -> None:
        if self.diverged:
            return
        train_loss, train_accuracy = (torch.stack(values).mean().item() for values in zip(*self.seen, strict=True))
        self.seen.clear()
        test_loss, test_accuracy = evaluated(self.model, test, self.settings["batch"])
        self.model.train()
        self.schedule.step()
        epoch = {
            "seconds": self.seconds,
            "train_accuracy": train_accuracy,
            "train_loss": train_loss,
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
        }
        self.diverged = not all(map(math.isfinite, epoch.values()))
        if not self.diverged:
            self.epochs.append(epoch)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def evaluated(model: nn.Module, test: tuple[Tensor, Tensor], batch: int) -> tuple[float, float]:
    """(loss, accuracy) in eval mode."""
    model.eval()
    images = test[0].contiguous(memory_format=torch.channels_last)
    answers = torch.cat([model(part) for part in images.split(batch)])
    accuracy = (answers.argmax(1) == test[1]).float().mean().item()
    return F.cross_entropy(answers, test[1]).item(), accuracy


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text}")
    return value
