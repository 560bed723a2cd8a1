"""Residual blocks of any library, by the names of their layers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rkfast.nn.chain import chain, chain_with_moments, reads
from rkfast.nn.norm import frozen, hooked, reads_moments, recomputed, shared_conv, whole_residual
from rkfast.nn.residual import join


class Form(NamedTuple):
    """How a residual block is written, ``act(shortcut(x) + behind(norm(inner(x))))``: names of layers, of which some
    may be missing; ``reads`` are the convolutions that a controller reads."""

    inner: tuple[str, ...]
    norm: str
    behind: tuple[str, ...]
    activation: str
    reads: tuple[str, ...]


def _form(inner: str, norm: str, behind: str, activation: str, reads: str) -> Form:
    return Form(tuple(inner.split()), norm, tuple(behind.split()), activation, tuple(reads.split()))


# With bottleneck the paper reads the 1x1 convolutions alone.
FORMS = (
    # torchvision and rkfast, whose gate has timm's name
    _form("conv1 bn1 relu conv2", "bn2", "se", "relu", "conv1 conv2"),
    _form("conv1 bn1 relu conv2 bn2 relu conv3", "bn3", "se", "relu", "conv1 conv3"),
    # timm
    _form("conv1 bn1 drop_block act1 aa conv2", "bn2", "se drop_path", "act2", "conv1 conv2"),
    _form("conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3", "bn3", "se drop_path", "act3", "conv1 conv3"),
)


def residual(form: Form, block: Any, x: Tensor, step: Tensor | None = None, memory: str = "speed") -> Tensor:
    """``act(shortcut(x) + step * behind(norm(inner(x))))``, as few ops as its layers allow.

    step: Tensor [C], or None for 1. memory: as in BasicBlock."""
    inner, norm = present(block, form.inner), getattr(block, form.norm)

    downsample = block._modules.get("downsample")
    shortcut = None if downsample is None else functools.partial(shortcut_of, downsample)
    behind, act = present(block, form.behind), getattr(block, form.activation)
    if not behind and len(inner) % 3 == 1:
        norms, relus = [*inner[1::3], norm], [*inner[2::3], act]
        whole = whole_residual(inner[::3], norms, relus, x, shortcut, layers_of(downsample), step, memory)
        if whole is not None:
            return whole

    def rest(y: Tensor, x: Tensor, step: Tensor | None) -> Tensor:
        z, found = chain_with_moments(inner[cut:], y, moments, return_moments=reads_moments(norm))
        return join(norm, behind, act, z, x if shortcut is None else shortcut(x), step, found)

    places = [i for i, layer in enumerate(inner) if isinstance(layer, nn.modules.batchnorm._BatchNorm) or frozen(layer)]
    cut = max(places, default=1)
    y, moments, x = shared_conv(inner[0], x, return_moments=reads(inner[1:]))
    y, moments = chain_with_moments(inner[1:cut], y, moments, return_moments=reads(inner[cut:]))
    if memory == "min" and not torch.compiler.is_compiling():
        return recomputed(block, rest, y, x, step)
    return rest(y, x, step)


def shortcut_of(downsample: nn.Module, x: Tensor) -> Tensor:
    """``downsample(x)``, its BatchNorm as one op where it is an nn.Sequential without hooks."""
    layers = layers_of(downsample)
    return chain(layers, x) if layers else downsample(x)


def layers_of(downsample: nn.Module | None) -> list[nn.Module]:
    """Those of an nn.Sequential without hooks that do something, in turn; none of whatever else."""
    if type(downsample) is not nn.Sequential or hooked(downsample):
        return []
    return working(downsample)


def form_of(block: nn.Module) -> Form | None:
    """The form of a residual block, by the names of its layers; None for whatever else."""
    layers = children(block)
    for form in FORMS:
        known = {*form.inner, form.norm, *form.behind, form.activation}
        needed = {name for name in known if name.startswith(("conv", "bn"))} | {form.activation}
        if needed <= layers <= known | {"downsample"}:
            return form
    return None


def sample(block: Any) -> tuple[int, ...]:
    """The shape of a small input."""
    return 2, block.conv1.in_channels, 8, 8


def children(block: nn.Module) -> frozenset[str]:
    return frozenset(name for name, child in block._modules.items() if child is not None)


def present(block: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    return working(layer for name in names if (layer := block._modules.get(name)) is not None)


def working(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """But those that do nothing."""
    return [layer for layer in layers if type(layer) is not nn.Identity or hooked(layer)]
