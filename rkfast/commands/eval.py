"""``rkfast eval RUN``: a trained network, fused and of stock PyTorch, on the test images of its recipe."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rkfast.files import replacing
from rkfast.ode import noise_sweep
from rkfast.plot import look
from rkfast.train import engine
from rkfast.train.data import load

SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
VARIANTS = {"fused": "auto", "stock": "off"}


def add_run(parser: argparse.ArgumentParser) -> None:
    """What every command on a trained network has."""
    add = parser.add_argument
    add("trained", type=Path, metavar="RUN", help="folder of rkfast train")
    add("--weights", choices=engine.WHICH, default=engine.WHICH[0], help="of which epoch (%(default)s)")
    add("--root", type=Path, metavar="FOLDER", help="of the data (that of the training)")
    add("--device", default="cpu", help="(%(default)s)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add = parser.add_argument
    add("--amp", choices=engine.AMP, default="fp32", help="autocast (%(default)s for none)")
    noise = f"of noise on the images as normalised, standard deviations ({' '.join(f'{s:g}' for s in SIGMAS)})"
    add("--sigmas", type=float, nargs="*", default=list(SIGMAS), metavar="SIGMA", help=noise)
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")


def run(args: argparse.Namespace) -> int:
    try:
        found = measured(args)
    except (RuntimeError, TypeError, ValueError) as error:
        print(f"rkfast eval: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if args.json is not None:
        with replacing(args.json) as path:
            path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {args.json}")
    return 0


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """For "fused" and "stock" what ``engine.evaluate`` finds and the noise sweep; and how far their answers differ.

    Raises:
        RuntimeError, ValueError: the run or its data cannot be read.
    """
    recipe, settings = engine.described(args.trained)
    device = torch.device(args.device)
    data = load(recipe.data, args.root or settings["root"])
    loader = DataLoader(data.test, batch_size=recipe.batch)
    models = {
        name: engine.trained(args.trained, data, weights=args.weights, fused=fused).to(
            device,
            memory_format=torch.channels_last,  # type: ignore[call-overload]
        )
        for name, fused in VARIANTS.items()
    }
    dtype = engine.AMP[args.amp]
    found: dict[str, Any] = {"run": str(args.trained), "recipe": recipe.name, "weights": args.weights}
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        for name, model in models.items():
            found[name] = engine.evaluate(model, loader, data.classes, device)
            if args.sigmas:
                found[name]["noise"] = [p._asdict() for p in noise_sweep(model, loader, args.sigmas)]
        found["fused beside stock"] = differences(models["fused"], models["stock"], loader, device)
    return found


@torch.no_grad()
def differences(fused: nn.Module, stock: nn.Module, loader: DataLoader[Any], device: torch.device) -> dict[str, float]:
    """The largest difference of a probability, and how many % of the images get another answer."""
    largest, others, images = 0.0, 0, 0
    for batch, _ in loader:
        x = batch.to(device, memory_format=torch.channels_last)
        ours, theirs = (_probabilities(model, x) for model in (fused, stock))
        largest = max(largest, (ours - theirs).abs().max().item())
        others += int((ours.argmax(1) != theirs.argmax(1)).sum())
        images += len(x)
    return {"probability": largest, "answers": 100 * others / images}


def _probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).float().softmax(1)


def table(found: dict[str, Any]) -> str:
    columns = [found[name] for name in VARIANTS]
    rows: list[tuple[str, ...]] = [(f"{found['recipe']}, {found['weights']}", *VARIANTS)]
    for key, label, form in (
        ("error", "top-1 error, %", ".2f"),
        ("error5", "top-5 error, %", ".2f"),
        ("loss", "loss", ".4f"),
        ("calibration", "expected calibration error, %", ".2f"),
    ):
        rows.append((label, *(format(column[key], form) for column in columns)))
    for points in zip(*(column.get("noise", ()) for column in columns), strict=True):
        label = f"top-1 error with noise of {points[0]['sigma']:g}, %"
        rows.append((label, *(f"{100 * (1 - point['accuracy']):.2f}" for point in points)))
    apart = found["fused beside stock"]
    return (
        f"{look.columns(rows)}\nfused beside stock: probabilities differ by at most {apart['probability']:.1e}, "
        f"the answer in {apart['answers']:.2f} % of the images"
    )
