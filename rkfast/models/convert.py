"""DenseNet to ERKNet and CliqueNet to IRKNet (Zhu et al., "Convolutional Neural Networks combined with Runge-Kutta
Methods", sections 3.3.1 and 3.3.2)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rkfast.models.cliquenet import CliqueNet
from rkfast.models.rknet import PeriodSpec, RKNet
from rkfast.nn import CliqueBlock
from rkfast.nn.dense import NormLayer


class Conversion(NamedTuple):
    """A converted model; the names of its modules whose parameters and statistics are the original's, and of those that
    have fresh ones, because the original has none of that shape."""

    model: RKNet
    carried: list[str]
    initialised: list[str]


def erknet_from_densenet(model: nn.Module, *, multiscale: bool = False, fused: bool = True) -> Conversion:
    """The ERKNet whose dense blocks are those of a DenseNet, with one step per period and the sums in place.

    Args:
        model: a DenseNet of rkfast or torchvision, or another with such names (``features.conv0``,
            ``features.denseblock1.denselayer1.norm1``, ...). It stays as it is.
        multiscale: whether the head reads every period; DenseNet's reads the last.
        fused: as in RKNet.

    Returns:
        Conversion. Dense layers and stem are carried over whole; transitions and head read the sum in place of the
        concatenation, so that they are fresh.

    Raises:
        TypeError: model has not such names.
        ValueError: a block breaks a rule of section 3.3.1. With k the growth rate and c the channels that it reads:
            Rule 1, c = m * k; Rule 2, each growth makes k channels of the input and all earlier growths, so that m of
            them make a group; Rule 3, there are m * s growths.
    """
    blocks = _children(getattr(model, "features", None), "denseblock")
    stem = getattr(getattr(model, "features", None), "conv0", None)
    classifier = getattr(model, "classifier", None)
    if not blocks or not isinstance(stem, nn.Conv2d) or not isinstance(classifier, nn.Linear):
        raise TypeError(
            f"model: {type(model).__name__} is no DenseNet; expected features.conv0, features.denseblock1, ... and "
            "classifier, as in torchvision"
        )
    periods, necks, moved = [], set(), {}
    for t, block in enumerate(blocks):
        spec, neck = _dense_period(block, f"denseblock{t + 1}")
        periods.append(spec)
        necks.add(neck)
        moved[f"features.denseblock{t + 1}"] = f"periods.{t}.0"
        moved[f"features.transition{t + 1}"] = f"transitions.{t}"
    if len(necks) > 1:
        raise ValueError(f"model: bottlenecks of {sorted(necks, key=str)} times the growth rate; expected one for all")
    neck = necks.pop()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    result = RKNet(
        periods,
        stem="imagenet" if hasattr(model.features, "norm0") else "cifar",
        bottleneck=neck is not None,
        neck=neck,
        multiscale=multiscale,
        num_classes=classifier.out_features,
        in_chans=stem.in_channels,
        drop_rate=float(getattr(_children(blocks[0], "denselayer")[0], "drop_rate", 0.0)),
        norm_layer=_like(norm),
        fused=fused,
    )
    moved |= {
        "features.conv0": "stem.conv",
        "features.norm0": "stem.norm",
        "features.norm5": f"head.pools.{len(result.head.pools) - 1}.norm",
        "classifier": "head.fc",
    }
    return _carry(model, result, moved)


def irknet_from_cliquenet(model: nn.Module, *, fused: bool = True) -> Conversion:
    """The IRKNet whose clique blocks are those of a CliqueNet, with one step per period and the sums in place.

    A CliqueNet as published breaks Rule 1, since its transitions keep the s * k channels of a block; one with
    ``init_channels`` and ``transition_channels`` of k does not.

    Args:
        model: a CliqueNet of rkfast. It stays as it is.
        fused: as in RKNet.

    Returns:
        Conversion. Stem, clique blocks and attention are carried over whole; convolutions of transitions, and the head,
        read the sum in place of the concatenation, so that they are fresh.

    Raises:
        TypeError: model is no CliqueNet.
        ValueError: a block breaks a rule of section 3.3.2. With k the growth rate: Rule 1, it reads k channels; Rule 2,
            each growth of Stage-I makes k channels of the input and all earlier growths; Rule 3, there are s of them,
            and s > 1.
    """
    if not isinstance(model, CliqueNet):
        raise TypeError(f"model: expected a CliqueNet, got {type(model).__name__}")
    blocks = [block for block in model.blocks if isinstance(block, CliqueBlock)]
    for t, block in enumerate(blocks):
        _check_clique(block, f"blocks.{t}")
    first = blocks[0]
    neck = None if first.weight2 is None else first.weight1[0].shape[0] // first.growth_rate
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    result = RKNet(
        [PeriodSpec("irk", block.stages, 1, block.growth_rate) for block in blocks],
        bottleneck=neck is not None,
        neck=neck,
        attention=any(transition.attention is not None for transition in model.transitions),
        rounds=first.rounds,
        num_classes=model.num_classes,
        in_chans=model.stem.in_channels,
        drop_rate=first.drop_rate,
        norm_layer=_like(norm),
        fused=fused,
    )
    moved = {"stem": "stem.conv", "head": "head", "transitions": "transitions"}
    moved |= {f"blocks.{t}": f"periods.{t}.0" for t in range(len(blocks))}
    return _carry(model, result, moved)


def _dense_period(block: nn.Module, name: str) -> tuple[PeriodSpec, int | None]:
    """What a dense block is as a period, and its bottleneck in multiples of the growth rate."""
    layers: list[Any] = _children(block, "denselayer")
    if not layers:
        raise TypeError(f"model: {name} has no denselayer1, ...")
    convs = [getattr(layer, "conv2", None) or layer.conv1 for layer in layers]
    c, k = layers[0].norm1.num_features, convs[0].out_channels
    m = c // k
    if c % k:
        raise ValueError(f"Rule 1: y has m * k channels; {name} reads {c}, which is no multiple of its growth rate {k}")
    for i, (layer, conv) in enumerate(zip(layers, convs, strict=True)):
        read = layer.conv1.in_channels
        if conv.out_channels != k or read != c + i * k:
            raise ValueError(
                f"Rule 2: every {m} successive growths make a group of {m * k} channels from y and all earlier groups; "
                f"{name}.denselayer{i + 1} makes {conv.out_channels} of {read} channels, expected {k} of {c + i * k}"
            )
    if len(layers) % m:
        raise ValueError(
            f"Rule 3: there are m * s growths; {name} has {len(layers)}, which is no multiple of m = {m} (it reads {c} "
            f"channels, and its growth rate is {k})"
        )
    neck = None
    if hasattr(layers[0], "conv2"):
        neck, odd = divmod(layers[0].conv1.out_channels, k)
        if odd or any(layer.conv1.out_channels != neck * k for layer in layers):
            raise ValueError(f"model: the bottlenecks of {name} differ, or are no multiple of its growth rate {k}")
    return PeriodSpec("erk", len(layers) // m, 1, k, m), neck


def _check_clique(block: CliqueBlock, name: str) -> None:
    c, k, s = block.in_channels, block.growth_rate, len(block.weight1)
    if c != k:
        raise ValueError(f"Rule 1: y has as many channels as a growth; {name} reads {c}, and its growth rate is {k}")
    for i in range(s):
        made = (block.weight1 if block.weight2 is None else block.weight2)[i].shape[0]
        read = block.init_norm1[i].num_features
        if made != k or read != c + i * k:
            raise ValueError(
                f"Rule 2: every growth makes a group of {k} channels from y and all earlier groups; growth {i + 1} of "
                f"{name} makes {made} of {read} channels, expected {k} of {c + i * k}"
            )
    if s < 2 or s != block.stages:
        raise ValueError(f"Rule 3: there are s growths, s > 1; {name} has {s} growths and {block.stages} stages")


def _children(module: object, word: str) -> list[nn.Module]:
    """Children ``word1``, ``word2``, ..., in this order."""
    found: list[nn.Module] = []
    while isinstance(child := getattr(module, f"{word}{len(found) + 1}", None), nn.Module):
        found.append(child)
    return found


def _like(norm: nn.BatchNorm2d) -> NormLayer:
    return functools.partial(nn.BatchNorm2d, eps=norm.eps, momentum=norm.momentum)


def _carry(source: nn.Module, target: RKNet, moved: dict[str, str]) -> Conversion:
    """Copy what fits, module by module; ``moved`` maps names of the source to names of the target."""
    there = {_renamed(name, moved): tensors for name, tensors in _by_module(source)}
    carried: list[str] = []
    initialised: list[str] = []
    with torch.no_grad():
        for name, tensors in _by_module(target):
            found = there.get(name, {})
            fits = found.keys() == tensors.keys() and all(found[key].shape == t.shape for key, t in tensors.items())
            (carried if fits else initialised).append(name)
            for key, tensor in tensors.items() if fits else ():
                tensor.copy_(found[key])
    return Conversion(target.train(source.training), carried, initialised)


def _by_module(model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, module in model.named_modules():
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if tensors:
            yield name, tensors


def _renamed(name: str, moved: dict[str, str]) -> str | None:
    for old, new in moved.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return None
