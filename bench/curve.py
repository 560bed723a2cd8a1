"""``python bench/curve.py``: trainings in bfloat16, fused and stock, whose losses must fall alike.

All start from the same weights and take the same batches, a step of each by turns. Rounding alone drives trainings
apart, and how far is seen on three of stock PyTorch that only round differently: channels_last, contiguous, and with
the images of each batch in another order. Fused may be twice as far from the nearest of them as they are from each
other.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:
    import runpy

    sys.path.pop(0)  # this folder
    runpy.run_path(str(Path(__file__).with_name("checkout.py")))
    __package__ = "rkfast.bench"

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import machine, report
from .contest import said
from .models import FULL, ModelCase, _arranged, cases
from .workload import dense

FAMILIES = {"cuda": ("erknet", "densenet", "tsc", "irknet"), "cpu": ("resnet",)}  # of each its first network
BATCH = 64
STEPS = 400  # at most
LEAST = 20  # steps, fewer of which say nothing
WINDOWS = 10  # parts of a curve, whose mean losses are compared
LEARNED = 0.9  # of the first window's mean loss, below which the last one's must lie
CLASSES = 10
MISLABELLED = 0.1  # so that the loss does not end at 0, where all curves are alike
SGD: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}
FUSED, STOCK = "fused", ("channels_last", "contiguous", "another order")


def batches(case: ModelCase, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of one coarse pattern for each class under noise, and their classes; no two alike."""
    generator = torch.Generator(device).manual_seed(0)
    count, *image = case.shape
    coarse = torch.randn(CLASSES, image[0], 4, 4, generator=generator, device=device)
    patterns = F.interpolate(coarse, image[1:], mode="bilinear")
    while True:
        classes = torch.randint(CLASSES, (count,), generator=generator, device=device)
        images = patterns[classes] + torch.randn(count, *image, generator=generator, device=device)
        other = torch.randint(CLASSES, (count,), generator=generator, device=device)
        wrong = torch.rand(count, generator=generator, device=device) < MISLABELLED
        yield images, torch.where(wrong, other, classes)


class Training:
    def __init__(self, case: ModelCase, model: nn.Module, name: str) -> None:
        self.case, self.name = case, name
        self.last = name != "contiguous"
        self.model = _arranged(model, self.last).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), **SGD)
        self.losses: list[Tensor] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        if self.name == "another order":
            images, labels = images.flip(0), labels.flip(0)
        with self.case.autocast(images.device.type):
            loss = F.cross_entropy(self.model(dense(images, self.last)), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())


def trained(case: ModelCase, device: str, steps: int, seconds: float) -> dict[str, list[float]]:
    """The losses of every training, step by step."""
    stock = case.stock(torch.Generator(device).manual_seed(0))
    models = {FUSED: next(case.variants()).make(copy.deepcopy(stock)).to(device)}
    models |= {name: copy.deepcopy(stock) for name in STOCK}
    trainings = [Training(case, model, name) for name, model in models.items()]
    deadline = time.monotonic() + seconds
    for i, batch in enumerate(itertools.islice(batches(case, device), steps)):
        if i >= LEAST and time.monotonic() > deadline:
            break
        for training in trainings:
            training.step(*batch)
        if device == "cuda":
            torch.cuda.synchronize()  # else the deadline would be that of the launches
    return {training.name: torch.stack(training.losses).tolist() for training in trainings}


def compared(losses: dict[str, list[float]]) -> dict[str, Any]:
    """How far fused is from the nearest stock training, and these from each other: the largest difference of the mean
    losses of any window."""
    curves = {name: _windows(one) for name, one in losses.items()}

    def apart(a: str, b: str) -> float:
        return max(abs(x - y) for x, y in zip(curves[a], curves[b], strict=True))

    noise = max(apart(a, b) for a, b in itertools.combinations(STOCK, 2))
    ours = min(apart(FUSED, name) for name in STOCK)
    learned = all(curve[-1] < LEARNED * curve[0] for curve in curves.values())
    return {
        "steps": len(losses[FUSED]),
        "curves": curves,
        "apart": ours,
        "stock_apart": noise,
        "alike": ours <= 2 * noise,
        "learned": learned,
    }


def _windows(losses: Sequence[float]) -> list[float]:
    size = max(len(losses) // WINDOWS, 1)
    return [statistics.fmean(losses[i : i + size]) for i in range(0, len(losses) - size + 1, size)]


def measured(family: str, size: str, device: str, steps: int, seconds: float) -> dict[str, Any]:
    case = next(case for case in cases(family, size, device) if case.training)
    case = replace(case, dtype=torch.bfloat16, batch=BATCH)
    try:
        return {"id": case.id, **compared(trained(case, device, steps, seconds))}
    except Exception as error:
        return {"id": case.id, "failure": said(error)}


def right(network: dict[str, Any]) -> bool:
    return bool("failure" not in network and network["alike"] and network["learned"])


def markdown(document: dict[str, Any]) -> str:
    lines = [
        report.where(document),
        "",
        "Mean losses of the first and last tenth of the steps; `apart` is the largest difference of any tenth's.",
        "",
        "| network | steps | fused | stock, channels_last | apart | stock's own | alike |",
        "|" + "---|" * 7,
    ]
    for network in document["networks"]:
        if "failure" in network:
            lines.append(f"| {network['id']} | **could not be trained**: {network['failure']} |" + " |" * 5)
            continue
        ends = [f"{network['curves'][name][0]:.4f} → {network['curves'][name][-1]:.4f}" for name in (FUSED, STOCK[0])]
        alike = "yes" if right(network) else "**no**" if network["learned"] else "**nothing was learned**"
        cells = [network["id"], str(network["steps"]), *ends]
        cells += [f"{network['apart']:.4f}", f"{network['stock_apart']:.4f}", alike]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/curve.py", description=__doc__)
    add = parser.add_argument
    add("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FULL['cuda'])}")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--size", choices=["tiny", "full"], default="full")
    add("--steps", type=int, default=STEPS, help="at most (%(default)s)")
    add("--seconds", type=float, default=120, help="for all trainings (%(default)s)")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE", help="the table, which is also printed")
    args = parser.parse_args(argv)
    unknown = [family for family in args.families if family not in FULL[args.device]]
    if unknown:
        parser.error(f"{unknown[0]!r} is no family of models; there are {', '.join(FULL[args.device])}")
    families = args.families or FAMILIES[args.device]
    document: dict[str, Any] = {**machine.describe(args.device), "load": [machine.load(), None]}
    each = args.seconds / len(families)
    document["networks"] = [measured(family, args.size, args.device, args.steps, each) for family in families]
    document["load"][1] = machine.load()
    report.leave(document, markdown(document), args.json, args.markdown)
    return int(not all(map(right, document["networks"])))


if __name__ == "__main__":
    sys.exit(main())
