"""``rkfast export``: a network as a file that runs without rkfast."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torch import Tensor, nn

from rkfast.commands import network
from rkfast.swap import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    network.add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as model.onnx or model.pt2")
    parser.add_argument("--format", choices=("onnx", "pt2", "aoti"), help="(what the suffix says)")


def run(args: argparse.Namespace) -> int:
    def body(model: nn.Module, images: Tensor) -> int:
        try:
            export(model, args.out, images, format=args.format)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"rkfast export: {error}", file=sys.stderr)
            return 1
        return 0

    return network.run("export", args, body)
