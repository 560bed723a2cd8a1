"""torchvision, timm and others, where they are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import pytest
import torch


@functools.cache
def _without_operators() -> torch.library.Library:
    """PyPI's torchvision is built for CUDA, and beside a CPU build of PyTorch its import asks for operators that its
    library then does not register. Networks do not call them."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def prepare() -> None:
    """Let torchvision be imported."""
    if torch.version.cuda is None and importlib.util.find_spec("torchvision") is not None:
        _without_operators()


def library(name: str) -> Any:
    """The module, or a skipped test."""
    package = name.partition(".")[0]
    for needed in ("torchvision", "timm") if package == "timm" else (package,):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    prepare()
    return importlib.import_module(name)


def network(address: str, **options: Any) -> torch.nn.Module:
    """Such as "torchvision.resnet18" or "timm.seresnet50"."""
    home, _, name = address.partition(".")
    if home == "timm":
        made: torch.nn.Module = library("timm").create_model(name, **options)
        return made
    return getattr(library("torchvision.models"), name)(**options)
