"""Small trainings on the digits, for figures of several networks: each is done once, and kept in a file of results.

That is a JSON list of objects with

    settings  what the training depends on; one that the file has already is not trained again
    hardware  where it ran, in words
    epochs    for each epoch ``seconds`` of training since the first, ``train_accuracy`` and ``train_loss`` (means over
              the epoch's batches), ``test_accuracy`` and ``test_loss``; fewer than asked for where the loss went to
              infinity

and what a figure adds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast
from rkfast import demo
from rkfast.extras import require
from rkfast.plot.output import partial_beside

SIZE = 8  # of the digits as they come
MILESTONES = (100 / 260, 150 / 260, 200 / 260, 230 / 260)
CURVES = {
    "train_accuracy": "training accuracy",
    "test_accuracy": "test accuracy",
    "train_loss": "training loss",
    "test_loss": "test loss",
}
# All other settings are options of create_model.
SETTINGS = ("model", "size", "batch", "lr", "epochs", "seed", "device", "sigmas")

# A figure's own keys of a record, from the trained network and the test images and labels.
Also = Callable[[nn.Module, tuple[Tensor, Tensor]], dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser, results: str | None = None) -> None:
    """results: the file of results unless another is given; None lies beside --out."""
    parser.add_argument("--epochs", type=demo.positive, default=10, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order of the images (%(default)s)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (%(default)s)")
    parser.add_argument(
        "--results",
        type=Path,
        default=None if results is None else Path(results),
        metavar="FILE",
        help="what was trained before, and is not trained again; what is trained now is added "
        + ("(--out with .json)" if results is None else "(%(default)s)"),
    )


def settings(model: str, options: dict[str, Any], lr: float, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": model,
        **options,
        "size": SIZE,
        "batch": demo.BATCH,
        "lr": lr,
        "epochs": args.epochs,
        "seed": args.seed,
        "device": args.device,
    }


def trained(
    figure: str,
    args: argparse.Namespace,
    groups: Sequence[tuple[str, list[dict[str, Any]]]],
    also: Also | None = None,
) -> list[dict[str, Any]]:
    """The records of all settings, of which those are trained that --results has not. Each group, whose name stands
    beside the progress, takes turns step by step, and is added as it is done.

    Raises:
        ValueError: what is wrong with --results or --device.
    """
    tqdm = require("tqdm", "demo").tqdm
    file: Path = args.out.with_suffix(".json") if args.results is None else args.results
    found = results(file, figure) if file.exists() else []
    missing = [
        (name, [each for each in group if all(record["settings"] != each for record in found)])
        for name, group in groups
    ]
    missing = [(name, group) for name, group in missing if group]
    if missing:
        try:
            device = torch.device(args.device)
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"--device {args.device}: {error}") from error
        partial_beside(args.out).unlink()  # before minutes of training
        partial = partial_beside(file, "--results")
        try:
            for name, group in missing:
                with tqdm(total=args.epochs, desc=name, unit="epoch", file=sys.stderr) as bar:
                    found += train(group, device, bar, also)
                partial.write_text(json.dumps(found, indent=1) + "\n")
                os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    return [next(record for record in found if record["settings"] == each) for _, group in groups for each in group]


def results(file: Path, figure: str) -> list[dict[str, Any]]:
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
        raise ValueError(f"--results {file}: expected a list of what rkfast plot {figure} has trained")
    for i, record in enumerate(records):
        epochs = record.get("epochs") if isinstance(record, dict) and "settings" in record else None
        whole = isinstance(epochs, list) and all(
            isinstance(epoch, dict) and all(isinstance(epoch.get(key), (int, float)) for key in ("seconds", *CURVES))
            for epoch in epochs
        )
        if not whole:
            raise ValueError(f"--results {file}: [{i}] is not what rkfast plot {figure} writes; give another file")
    return records


def train(
    wanted: list[dict[str, Any]], device: torch.device, bar: Any, also: Also | None = None
) -> list[dict[str, Any]]:
    """Records of the file of results, of settings that differ in the network alone."""
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
    return [
        {"settings": t.settings, "hardware": hardware, "epochs": t.epochs}
        | ({} if also is None or t.diverged else also(t.model, test))
        for t in trainings
    ]


class Training:
    """One network, with its optimizer and what was seen of it."""

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        torch.manual_seed(settings["seed"])
        options = {key: value for key, value in settings.items() if key not in SETTINGS}
        model = rkfast.create_model(settings["model"], **{"in_chans": 1, **options}).to(device)
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


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value
