"""ResNet (He et al., "Deep Residual Learning for Image Recognition"), Wide ResNet (Zagoruyko and Komodakis) and ResNeXt
(Xie et al.) with torchvision's names and keys, and SE-ResNet (Hu et al.) with timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from rkfast.models.base import MAX_LAYERS, Family, ImageModel, common, flag, one_of, whole
from rkfast.nn import BasicBlock, Bottleneck, PadShortcut, Projection
from rkfast.nn.pool import global_average, max_pool
from rkfast.nn.residual import norm_relu
from rkfast.ops import checks, layout

# layers: block, how many in each stage
IMAGENET: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "18": (BasicBlock, (2, 2, 2, 2)),
    "34": (BasicBlock, (3, 4, 6, 3)),
    "50": (Bottleneck, (3, 4, 6, 3)),
    "101": (Bottleneck, (3, 4, 23, 3)),
    "152": (Bottleneck, (3, 8, 36, 3)),
}
SHORTCUTS = ("a", "b")


class ResNet(ImageModel):
    """Stem, stages of residual blocks, average pooling and a linear layer.

    Stage t = 0, 1, ... has ``width * 2**t`` channels, times the block's ``expansion``, and each but the first half the
    resolution of the one before.

    Args:
        block: BasicBlock or Bottleneck.
        layers: how many blocks in each stage.
        width: channels of the stem.
        stem: "imagenet" for a 7x7 convolution with stride 2, BatchNorm, ReLU and max pooling, "cifar" for a 3x3
            convolution, BatchNorm and ReLU.
        shortcut: of blocks that change shape, "b" for Projection, "a" for PadShortcut.
        block_options: what every block is made with besides, such as ``{"reduction": 16}``.
        num_classes, in_chans: of output and input.
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, in_chans, H, W] -> [N, num_classes].

    forward_features returns the last stage's Tensor.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        *,
        width: int = 64,
        stem: str = "imagenet",
        shortcut: str = "b",
        block_options: Mapping[str, Any] = MappingProxyType({}),
        num_classes: int = 1000,
        in_chans: int = 3,
        fused: bool = True,
    ) -> None:
        super().__init__(num_classes=num_classes, fused=fused)
        imagenet = stem == "imagenet"
        self.conv1 = (
            nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
            if imagenet
            else nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else None
        self.stages = [f"layer{t + 1}" for t in range(len(layers))]
        channels, first = width, 4 if imagenet else 1
        for t, (name, count) in enumerate(zip(self.stages, layers, strict=True)):
            inner, stride = width * 2**t, 1 if t == 0 else 2
            out = inner * block.expansion
            stage = nn.Sequential()
            for i in range(count):
                stride, before = (stride, channels) if i == 0 else (1, out)
                downsample: nn.Module | None = None
                if stride != 1 or before != out:
                    downsample = (
                        Projection(before, out, stride, fused=fused)
                        if shortcut == "b"
                        else PadShortcut(out - before, stride)
                    )
                stage.append(block(before, inner, stride, downsample, fused=fused, **block_options))
            self.add_module(name, stage)
            channels = out
            self.feature_info.append({"num_chs": out, "reduction": first * 2**t, "module": name})
        self.fc = nn.Linear(channels, num_classes)
        self.num_features = channels
        for module in self.modules():
            # A gate's convolutions are linear layers, and stay as they are made.
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def init_classifier(self, linear: nn.Linear) -> None:
        """As in torchvision."""
        linear.reset_parameters()

    def forward_features(self, x: Tensor) -> Tensor:
        if self.fused and x.device.type == "cpu" and x.dim() == 4 and not checks.transformed((x,)):
            x = layout.conform(x, True)  # in which everything behind is faster, and keeps less
        y = norm_relu(self.bn1, self.relu, self.conv1(x), fused=self.fused)
        if self.maxpool is not None:
            y = max_pool(self.maxpool, y, fused=self.fused)
        for name in self.stages:
            y, _ = self._period(self.get_submodule(name), y)
        return y

    def forward_head(self, features: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor:
        assert isinstance(features, Tensor)
        pooled = global_average(features)
        return pooled if pre_logits else self.fc(pooled)


def resnet(
    layers: str | None,
    depth: str | None,
    *,
    shortcut: str = "b",
    stride_in_1x1: bool = False,
    num_classes: int | None = None,
    in_chans: int = 3,
    fused: bool = True,
) -> ResNet:
    """ImageNet's by their layers, CIFAR's by their depth."""
    one_of("shortcut", shortcut, SHORTCUTS)
    if layers is not None:
        classes = 1000 if num_classes is None else num_classes
        return imagenet(
            layers, shortcut=shortcut, stride_in_1x1=stride_in_1x1, num_classes=classes, in_chans=in_chans, fused=fused
        )
    assert depth is not None
    total = whole("name: depth", int(depth), 8, MAX_LAYERS)
    # The stem and the linear layer; the rest in three stages of blocks with two convolutions.
    count, odd = divmod(total - 2, 6)
    if odd:
        raise ValueError(f"name: depth: expected 2 + 6 * blocks, such as 20 or 110, got {total}")
    _block_options(BasicBlock, stride_in_1x1)
    classes = 10 if num_classes is None else num_classes
    common(classes, in_chans, 0, fused)
    return ResNet(
        BasicBlock,
        [count] * 3,
        width=16,
        stem="cifar",
        shortcut=shortcut,
        num_classes=classes,
        in_chans=in_chans,
        fused=fused,
    )


def imagenet(
    layers: str,
    *,
    groups: str = "1",
    width_per_group: str = "64",
    reduction: int | None = None,
    shortcut: str = "b",
    stride_in_1x1: bool = False,
    num_classes: int = 1000,
    in_chans: int = 3,
    fused: bool = True,
) -> ResNet:
    common(num_classes, in_chans, 0, fused)
    block, counts = IMAGENET[layers]
    options = _block_options(block, stride_in_1x1) | {"reduction": reduction}
    if block is Bottleneck:
        options |= {"groups": int(groups), "width_per_group": int(width_per_group)}
    return ResNet(
        block,
        counts,
        shortcut=shortcut,
        block_options=options,
        num_classes=num_classes,
        in_chans=in_chans,
        fused=fused,
    )


def has_bottlenecks(layers: str) -> bool:
    return IMAGENET[layers][0] is Bottleneck


def _block_options(block: type[nn.Module], stride_in_1x1: object) -> dict[str, Any]:
    if not flag("stride_in_1x1", stride_in_1x1):
        return {}
    if block is not Bottleneck:
        raise ValueError("stride_in_1x1: blocks of two 3x3 convolutions have no 1x1; leave it out")
    return {"stride_in_1x1": True}


FAMILIES = {
    "resnet": Family(
        "resnet<18|34|50|101|152> or resnet-<6n + 2>",
        re.compile(r"(?P<layers>18|34|50|101|152)|-(?P<depth>[0-9]{1,6})"),
        resnet,
        [*(f"resnet{layers}" for layers in IMAGENET), *(f"resnet-{depth}" for depth in (20, 32, 56, 110))],
        {},
    ),
    "wide_resnet": Family(
        "wide_resnet<50|101>_2",
        re.compile(r"(?P<layers>50|101)_2"),
        imagenet,
        ["wide_resnet50_2", "wide_resnet101_2"],
        {"groups": "1", "width_per_group": "128", "reduction": None, "shortcut": "b"},
    ),
    "resnext": Family(
        "resnext<50|101>_<32|64>x<4|8>d",
        re.compile(r"(?P<layers>50|101)_(?P<groups>32|64)x(?P<width_per_group>4|8)d"),
        imagenet,
        ["resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d"],
        {"reduction": None, "shortcut": "b"},
    ),
    "seresnet": Family(
        "seresnet<18|34|50|101|152>",
        re.compile(r"(?P<layers>18|34|50|101|152)"),
        imagenet,
        [f"seresnet{layers}" for layers in IMAGENET],
        {"groups": "1", "width_per_group": "64", "reduction": 16, "shortcut": "b"},
    ),
}
