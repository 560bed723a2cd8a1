"""``rkfast predict RUN IMAGE...``: what a trained network sees in images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rkfast.commands.eval import add_run
from rkfast.extras import require
from rkfast.train import engine
from rkfast.train.data import Data, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="of any size, that PIL reads")
    parser.add_argument("--top", type=int, default=engine.TOP, metavar="N", help="classes of each image (%(default)s)")


def run(args: argparse.Namespace) -> int:
    try:
        if args.top < 1:
            raise ValueError(f"--top: expected at least 1, got {args.top}")
        recipe, settings = engine.described(args.trained)
        data = load(recipe.data, args.root or settings["root"])
        images = torch.stack([read(path, data) for path in args.images]).to(args.device)
        model = engine.trained(args.trained, data, weights=args.weights).to(args.device)
        with torch.no_grad():
            probabilities = model(images).softmax(1)
    except (RuntimeError, TypeError, ValueError) as error:
        print(f"rkfast predict: {error}", file=sys.stderr)
        return 2
    for path, row in zip(args.images, probabilities, strict=True):
        values, classes = row.topk(min(args.top, data.classes))
        named = zip(classes.tolist(), values.tolist(), strict=True)
        print(f"{path}: " + ", ".join(f"{data.names[c]} {value:.4f}" for c, value in named))
    return 0


def read(path: Path, data: Data) -> Tensor:
    """An image as the network was tested with: Tensor [channels, size, size], normalised.

    Raises:
        ValueError: it cannot be read.
    """
    pil = require("PIL.Image", "train")
    try:
        with pil.open(path) as file:
            image = file.convert("L" if data.channels == 1 else "RGB")
    except OSError as error:  # of which what is no image is one
        raise ValueError(f"{path} cannot be read: {error}") from error
    transform = getattr(data.test, "transform", None)
    if transform is None:
        return _digit(image, data)
    found: Tensor = transform(image)
    if found.shape != (data.channels, data.size, data.size):  # of data whose images have one size
        found = transform(image.resize((data.size, data.size)))
    return found


def _digit(image: Any, data: Data) -> Tensor:
    """White on black. What the images have been normalised by is in their range, which was 0 to 1."""
    pixels = torch.tensor(list(image.resize((data.size, data.size)).tobytes())) / 255
    known = torch.stack([data.train[i][0] for i in range(len(data.train))])  # type: ignore[arg-type]
    low, high = known.min(), known.max()
    return (low + (high - low) * pixels).view(1, data.size, data.size)
