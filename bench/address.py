"""One network of anybody's, by its address: fused, fused and compiled, and folded, beside stock PyTorch."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import rkfast
from rkfast.commands import network
from rkfast.swap.max_batch import free_bytes

from .contest import Suite
from .models import SUITE as MODELS
from .models import NetworkCase, Variant

MODES = ("train", "infer")


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    network.add_making(parser)
    network.add_memory(parser)
    for mode in MODES:
        parser.add_argument(f"--{mode}", action="store_true", help="only that; both by default")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="BATCHxPIXELS", help="further batches and sizes, such as 1x224 32x96"
    )
    parser.add_argument("--max-batch", action="store_true", help="estimate the largest batches that fit, too")


class AddressCase(NetworkCase):
    main = False

    def __init__(self, asked: argparse.Namespace, batch: int, size: int, training: bool) -> None:
        self.asked, self.training, self.op = asked, training, asked.network
        self.shape = (batch, asked.in_chans, size, size)
        self.dtype = network.DTYPES[asked.amp] or torch.float32
        self.layout = "channels_last" if asked.channels_last else "contiguous"

    def stock(self, generator: torch.Generator) -> nn.Module:
        model, _ = made(self.asked)
        return model.train(self.training) if self.asked.weights else self.settled(model, generator)

    def variants(self) -> Iterator[Variant]:
        fuse = functools.partial(rkfast.fuse, memory=self.asked.memory)
        level = [] if self.asked.memory == "speed" else [f"{self.asked.memory} memory"]
        yield Variant(", ".join(level), fuse)
        if self.asked.peers is None or "compile" in self.asked.peers.split(","):
            yield Variant(", ".join([*level, "compiled"]), fuse, compiled=True)
        if not self.training:
            yield Variant("folded", rkfast.fold)


def shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Batches and pixels to measure, the first by --batch and --size.

    Raises:
        ValueError: one of --also is no such pair.
    """
    found = [(args.batch, args.size)]
    for text in args.also:
        pair = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if pair is None:
            raise ValueError(f"--also: expected a batch and pixels, such as 32x96, got {text!r}")
        found.append((int(pair[1]), int(pair[2])))
    return list(dict.fromkeys(found))


def asked(args: argparse.Namespace) -> argparse.Namespace:
    """What ``network.made`` and the cases ask for, from the arguments of ``rkfast bench ADDRESS``.

    Raises:
        ValueError: --size is no number of pixels, or one of --also no such pair.
    """
    size = args.size if args.size is not None else network.SIZE
    try:
        size = int(size)
    except ValueError:
        raise ValueError(f"--size: of a network expected a number of pixels, got {size!r}") from None
    given = argparse.Namespace(**{**vars(args), "network": args.suite, "size": size})
    shapes(given)
    return given


def made(args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor]:
    """The network and images of ``asked(args)``, contiguous; each contender has its own layout."""
    return network.made(argparse.Namespace(**{**vars(args), "channels_last": False}))


def described(args: argparse.Namespace) -> dict[str, Any]:
    """The network as a results file names it."""
    given = asked(args)
    kept = ("options", "weights", "in_chans", "amp", "channels_last", "memory", "seed")
    return {"address": given.network, **{name: getattr(given, name) for name in kept}}


def suite(args: argparse.Namespace) -> Suite:
    def cases(size: str, device: str) -> Iterator[AddressCase]:
        given = asked(args)
        wanted = [mode for mode in MODES if getattr(args, mode)] or MODES
        return (AddressCase(given, *shape, mode == "train") for shape in shapes(given) for mode in wanted)

    return MODELS._replace(cases={args.suite: cases})


def largest(args: argparse.Namespace) -> dict[str, Any]:
    """The largest batches that can be trained, and with what they were found."""
    model, images = made(asked(args))
    budget = free_bytes(images.device)
    with network.autocast(args):
        return {
            "budget": budget,
            "stock": rkfast.max_batch(model, images, budget=budget, fused=False),
            "fused": rkfast.max_batch(model, images, budget=budget, memory=args.memory),
        }
