"""``rkfast verify``: a fused network beside stock PyTorch, both measured against float64."""

from __future__ import annotations

import argparse

from torch import Tensor, nn

from rkfast.commands import network
from rkfast.swap import fuse, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    network.add_arguments(parser)
    network.add_memory(parser)


def run(args: argparse.Namespace) -> int:
    def body(model: nn.Module, images: Tensor) -> int:
        found = verify(fuse(model, memory=args.memory), images)
        print(found)
        return 0 if found.ok else 1

    return network.run("verify", args, body)
