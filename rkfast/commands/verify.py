"""``rkfast verify``: a fused network beside stock PyTorch, both measured against float64."""

from __future__ import annotations

import argparse
import sys

from rkfast.commands import network
from rkfast.swap import fuse, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    network.add_arguments(parser)
    parser.add_argument("--memory", choices=("speed", "min"), default="speed", help="as in rkfast.fuse (%(default)s)")


def run(args: argparse.Namespace) -> int:
    try:
        model, images = network.made(args)
    except ValueError as error:
        print(f"rkfast verify: {error}", file=sys.stderr)
        return 2
    with network.autocast(args):
        found = verify(fuse(model, memory=args.memory), images)
    print(found)
    return 0 if found.ok else 1
