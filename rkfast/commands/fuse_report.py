"""``rkfast fuse-report``: what of a network is fused, and why the rest is not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor, nn

from rkfast.commands import network
from rkfast.swap import fuse, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    network.add_arguments(parser)
    network.add_memory(parser)
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless every candidate is fused")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")


def run(args: argparse.Namespace) -> int:
    def body(model: nn.Module, images: Tensor) -> int:
        rows = report(fuse(model, memory=args.memory), images)
        print(rows)
        if args.json is not None:
            args.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
        return int(args.strict and not all(row.fused for row in rows))

    return network.run("fuse-report", args, body)
