"""``rkfast profile``: where the time and the bytes of a step go, by kind of operation, stock and fused."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from torch import Tensor, nn

from rkfast.commands import network
from rkfast.swap import fuse, profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    network.add_arguments(parser)
    network.add_memory(parser)
    parser.add_argument("--infer", action="store_true", help="inference in place of a training step")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="of each; the median counts (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write all steps there, for Perfetto or Chrome")


def run(args: argparse.Namespace) -> int:
    def body(model: nn.Module, images: Tensor) -> int:
        fuse(model.train(not args.infer), memory=args.memory)
        try:
            found = profile(model, images, steps=args.steps, trace=args.trace)
            print(found)
            if args.json is not None:
                rows = [{"kind": r.kind, "stock": r.stock._asdict(), "fused": r.fused._asdict()} for r in found]
                args.json.write_text(json.dumps({"title": found.title, "rows": rows}, indent=1) + "\n")
        except OSError as error:
            print(f"rkfast profile: {error.filename}: {error.strerror}", file=sys.stderr)
            return 1
        return 0

    if args.steps < 1:
        print(f"rkfast profile: --steps: expected at least 1, got {args.steps}", file=sys.stderr)
        return 2
    return network.run("profile", args, body)
