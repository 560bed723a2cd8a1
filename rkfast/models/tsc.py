"""Networks with time stepping controllers (Yang et al., "Dynamical System Inspired Adaptive Time Stepping Controller
for Residual Network Families"): ``rkfast.tsc.attach`` on the base networks of the paper."""

from __future__ import annotations

import re

from rkfast.models import cliquenet, densenet, resnet
from rkfast.models.base import Family, ImageModel


def tsc_resnet(
    layers: str | None,
    depth: str | None,
    *,
    shortcut: str = "b",
    stride_in_1x1: bool | None = None,
    controller: str = "lstm",
    reduction: int | None = None,
    value: float = 1.0,
    num_classes: int | None = None,
    in_chans: int = 3,
    fused: bool = True,
) -> ImageModel:
    base = resnet.resnet(
        layers,
        depth,
        shortcut=shortcut,
        stride_in_1x1=_papers_stride(layers) if stride_in_1x1 is None else stride_in_1x1,
        num_classes=num_classes,
        in_chans=in_chans,
        fused=fused,
    )
    return _attached(base, controller, reduction, value)


def tsc_imagenet(
    layers: str,
    *,
    groups: str = "1",
    width_per_group: str = "64",
    gate: int | None = None,
    stride_in_1x1: bool | None = None,
    controller: str = "lstm",
    reduction: int | None = None,
    value: float = 1.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    fused: bool = True,
) -> ImageModel:
    base = resnet.imagenet(
        layers,
        groups=groups,
        width_per_group=width_per_group,
        reduction=gate,
        stride_in_1x1=_papers_stride(layers) if stride_in_1x1 is None else stride_in_1x1,
        num_classes=num_classes,
        in_chans=in_chans,
        fused=fused,
    )
    return _attached(base, controller, reduction, value)


def tsc_densenet(
    depth: str,
    *,
    growth_rate: int | None = None,
    init_channels: int | None = None,
    controller: str = "lstm",
    reduction: int | None = None,
    value: float = 1.0,
    num_classes: int | None = None,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    fused: bool = True,
) -> ImageModel:
    base = densenet.build(
        None,
        depth,
        None,
        growth_rate=growth_rate,
        init_channels=init_channels,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        fused=fused,
    )
    return _attached(base, controller, reduction, value)


def tsc_cliquenet(
    layers: str | None,
    *,
    growth_rate: int = 36,
    init_channels: int = 64,
    controller: str = "lstm",
    reduction: int | None = None,
    value: float = 1.0,
    num_classes: int = 10,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    fused: bool = True,
) -> ImageModel:
    base = cliquenet.build(
        layers or "12",
        None,
        growth_rate=growth_rate,
        init_channels=init_channels,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        fused=fused,
    )
    return _attached(base, controller, reduction, value)


def _papers_stride(layers: str | None) -> bool:
    """Whether the base network of the paper has its stride in a 1x1 convolution, as the first ResNet."""
    return layers is not None and resnet.has_bottlenecks(layers)


def _attached(base: ImageModel, controller: str, reduction: int | None, value: float) -> ImageModel:
    from rkfast import tsc  # which most networks do without

    tsc.attach(base, controller, reduction, value=value)
    return base


FAMILIES = {
    "tsc_resnet": Family(
        "tsc_resnet<18|34|50|101|152> or tsc_resnet-<6n + 2>",
        re.compile(r"(?P<layers>18|34|50|101|152)|-(?P<depth>[0-9]{1,6})"),
        tsc_resnet,
        [
            *(f"tsc_resnet{layers}" for layers in ("18", "34", "50", "101")),
            *(f"tsc_resnet-{depth}" for depth in (32, 56, 110, 146, 290, 362, 506)),
        ],
        {},
    ),
    "tsc_resnext": Family(
        "tsc_resnext<50|101>_32x4d",
        re.compile(r"(?P<layers>50|101)_(?P<groups>32)x(?P<width_per_group>4)d"),
        tsc_imagenet,
        ["tsc_resnext50_32x4d", "tsc_resnext101_32x4d"],
        {"gate": None},
    ),
    "tsc_seresnet": Family(
        "tsc_seresnet<50|101>",
        re.compile(r"(?P<layers>50|101)"),
        tsc_imagenet,
        ["tsc_seresnet50", "tsc_seresnet101"],
        {"groups": "1", "width_per_group": "64", "gate": 16},
    ),
    "tsc_densenet": Family(
        "tsc_densenet-<depth>", re.compile(r"-(?P<depth>[0-9]{1,6})"), tsc_densenet, ["tsc_densenet-40"], {}
    ),
    "tsc_cliquenet": Family(
        "tsc_cliquenet[-<T>]", re.compile(r"(?:-(?P<layers>[0-9]{1,6}))?"), tsc_cliquenet, ["tsc_cliquenet-12"], {}
    ),
}
