"""The network that a figure is of, as the command line names it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rkfast.models import create_model

IMAGES = ("random", "digits")
BATCH, SIZE = 32, 32


def add_model(parser: argparse.ArgumentParser, default: str, kind: str = "") -> None:
    """--model, --options and --weights."""
    parser.add_argument("--model", default=default, help=f"{kind}as create_model names it (%(default)s)")
    parser.add_argument(
        "--options", default="{}", metavar="JSON", help='of create_model, such as \'{"method": "dopri5", "width": 16}\''
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state_dict that torch.save wrote (fresh ones)")


def add_images(parser: argparse.ArgumentParser) -> None:
    """--images and --seed."""
    parser.add_argument("--images", choices=IMAGES, default=IMAGES[0], help="(%(default)s); digits are scikit-learn's")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (%(default)s)")


def made(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model, and images Tensor [BATCH, in_chans, SIZE, SIZE].

    Raises:
        ValueError: what is wrong with an argument, by name.
    """
    given = options(args)
    with torch.random.fork_rng([]):
        torch.manual_seed(args.seed)
        images = _images(args, given)
        return model(args, given, images.shape[1]), images


def options(args: argparse.Namespace) -> dict[str, Any]:
    try:
        given = json.loads(args.options)
    except ValueError as error:
        raise ValueError(f"--options {args.options!r} is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f'--options {args.options!r}: expected an object, such as {{"width": 16}}')
    return given


def model(args: argparse.Namespace, given: dict[str, Any], in_chans: int) -> nn.Module:
    try:
        net = create_model(args.model, **{"in_chans": in_chans, **given})
    except TypeError as error:
        raise ValueError(f"--model {args.model}: {error}") from error
    if args.weights is not None:
        try:
            net.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
        except Exception as error:  # what a file that is no state_dict makes of the unpickler can be any
            raise ValueError(f"--weights {args.weights} cannot be loaded: {error}") from error
    return net


def _images(args: argparse.Namespace, given: dict[str, Any]) -> Tensor:
    if args.images == "random":
        return torch.randn(BATCH, given.get("in_chans", 3), SIZE, SIZE)
    from rkfast.demo import digits

    return digits(args.seed, torch.device("cpu"))[1][0][:BATCH]
