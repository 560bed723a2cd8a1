"""The network that a command is about, and its input."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rkfast.extras import MissingExtra, require
from rkfast.models import create_model
from rkfast.ops.checks import MEMORY

ADDRESSES = "torchvision:NAME, timm:NAME, rkfast:NAME, package.module:FUNCTION or path.py:FUNCTION"
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZE = 224


def add_memory(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument("--memory", choices=MEMORY, default=MEMORY[0], help="as in rkfast.fuse (%(default)s)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", metavar="ADDRESS", help=ADDRESSES)
    parser.add_argument("--size", type=int, default=SIZE, metavar="PIXELS", help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    add_making(parser)


def add_making(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """How the network and its images are made, but for the size of the latter and where both are."""
    add = parser.add_argument
    add("--options", default="{}", metavar="JSON", help="what it is made with, such as '{\"width\": 16}'")
    add("--weights", metavar="FILE", help="a state_dict, .safetensors or by torch.save")
    add("--batch", type=int, default=2, metavar="N", help="(%(default)s)")
    add("--in-chans", type=int, default=3, metavar="C", help="channels of the images (%(default)s)")
    add("--amp", choices=DTYPES, default="fp32", help="autocast (%(default)s for none)")
    add("--channels-last", action="store_true", help="network and images in that layout")
    add("--seed", type=int, default=0, help="of fresh weights and images (%(default)s)")


def made(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The network, and images Tensor [batch, in_chans, size, size].

    Raises:
        ValueError: what is wrong with an argument, by name.
    """
    for name in ("batch", "size", "in_chans"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    try:
        options = json.loads(args.options)
    except ValueError as error:
        raise ValueError(f"--options: {args.options!r} is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f'--options: expected an object, such as {{"width": 16}}, got {args.options!r}')
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {args.device!r} is not one, or not here: {str(error).splitlines()[0]}") from error
    torch.manual_seed(args.seed)
    model = find(args.network, options)
    if args.weights is not None:
        _load(model, Path(args.weights))
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    images = torch.randn(args.batch, args.in_chans, args.size, args.size)
    return model.to(device, memory_format=layout), images.to(device, memory_format=layout)  # type: ignore[call-overload]


def run(command: str, args: argparse.Namespace, body: Callable[[nn.Module, Tensor], int]) -> int:
    """Exit status of a command: body's, with the network and images that the command line names, or 2 where it is
    wrong."""
    try:
        model, images = made(args)
    except ValueError as error:
        print(f"rkfast {command}: {error}", file=sys.stderr)
        return 2
    with autocast(args):
        return body(model, images)


def autocast(args: argparse.Namespace) -> torch.autocast:
    dtype = DTYPES[args.amp]
    return torch.autocast(torch.device(args.device).type, dtype, enabled=dtype is not None)


def find(address: str, options: dict[str, Any]) -> nn.Module:
    """The network that an address names, made with options.

    Raises:
        ValueError: nothing has that name (the nearest names are told), or it is not made with these options.
    """
    home, colon, name = address.rpartition(":")
    if not colon or not home or not name:
        raise ValueError(f"{address!r} is no address of a network; expected {ADDRESSES}")
    try:
        model = _maker(home, name)(**options)
    except TypeError as error:
        raise ValueError(f"{address}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{address} made {type(model).__name__}, expected an nn.Module")
    return model


def _maker(home: str, name: str) -> Callable[..., Any]:
    if home == "rkfast":
        return lambda **options: create_model(name, **options)
    if home == "timm":
        timm = _imported("timm")
        _known(name, timm.list_models(), "timm")
        return lambda **options: timm.create_model(name, **options)
    module = _from_file(Path(home)) if home.endswith(".py") else None
    if module is None:
        module = _imported("torchvision.models" if home == "torchvision" else home)
    if home == "torchvision":
        _known(name, module.list_models(), home)
    found = getattr(module, name, None)
    if not callable(found):
        _known(name, [key for key in vars(module) if not key.startswith("_")], home)
        raise ValueError(f"{home}:{name} is {type(found).__name__}, expected a function that makes a network")
    return found


def _known(name: str, names: Iterable[str], home: str) -> None:
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, 3)
        raise ValueError(f"{home} has no {name!r}" + (f"; near are {', '.join(near)}" if near else ""))


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} cannot be imported: {error}") from error
    except RuntimeError as error:  # torchvision's operators, where it was built for another torch
        raise ValueError(f"{name} was installed for another torch: {error}") from error


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load(model: nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            state = require("safetensors.torch", "hub").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except MissingExtra:
        raise
    except OSError as error:
        raise ValueError(f"--weights: {path}: {error.strerror}") from error
    except Exception as error:
        raise ValueError(f"--weights: {path}: {str(error).splitlines()[0]}") from error
