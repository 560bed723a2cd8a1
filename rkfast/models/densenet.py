"""DenseNet (Huang et al., "Densely Connected Convolutional Networks"), with torchvision's names and keys."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from rkfast.models.base import (
    MAX_CHANNELS,
    MAX_LAYERS,
    Family,
    ImageModel,
    common,
    whole,
)
from rkfast.nn import DenseBlock, Transition
from rkfast.nn.chain import chain
from rkfast.nn.dense import NormLayer
from rkfast.nn.norm import recomputed
from rkfast.nn.pool import global_average

# name: growth rate, layers of each block, channels of the stem
IMAGENET = {
    "121": (32, (6, 12, 24, 16), 64),
    "161": (48, (6, 12, 36, 24), 96),
    "169": (32, (6, 12, 32, 32), 64),
    "201": (32, (6, 12, 48, 32), 64),
}
NECK = 4


class Features(nn.Sequential):
    """Everything before the classifier. A BatchNorm and the ReLU behind it are one operation, where nobody listens
    between them."""

    def __init__(self, modules: OrderedDict[str, nn.Module], fused: bool) -> None:
        super().__init__(modules)
        self.fused = fused
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        call = self._call if self.grad_checkpointing else None
        if self.fused:
            return chain(list(self), x, call)
        for module in self:
            x = module(x) if call is None else call(module, x)
        return x

    @staticmethod
    def _call(module: nn.Module, x: Tensor) -> Tensor:
        return recomputed(module, module, x) if isinstance(module, DenseBlock) else module(x)


class DenseNet(ImageModel):
    """Stem, dense blocks with transitions between them, BatchNorm, ReLU, average pooling and a linear layer.

    Args:
        growth_rate: k.
        layers: of each block.
        init_channels: of the stem.
        stem: "imagenet" for a 7x7 convolution with stride 2, BatchNorm, ReLU and max pooling, "cifar" for a 3x3
            convolution alone.
        bottleneck: whether the layers have 1x1 convolutions, to 4 * k channels.
        compression: whether transitions halve the channels.
        num_classes, in_chans: of output and input.
        drop_rate: of a dropout after each convolution of the blocks and transitions, as in the paper (torchvision drops
            behind the 3x3 convolutions alone).
        norm_layer: makes a BatchNorm of that many channels.
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, in_chans, H, W] -> [N, num_classes].

    forward_features returns ``features(x)``, a Tensor behind the last BatchNorm and ReLU.
    """

    _classifier = "classifier"

    def __init__(
        self,
        growth_rate: int,
        layers: Sequence[int],
        init_channels: int,
        *,
        stem: str = "imagenet",
        bottleneck: bool = True,
        compression: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
        fused: bool = True,
    ) -> None:
        super().__init__(num_classes=num_classes, fused=fused)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if stem == "imagenet":
            parts["conv0"] = nn.Conv2d(in_chans, init_channels, 7, stride=2, padding=3, bias=False)
            parts["norm0"] = norm_layer(init_channels)
            parts["relu0"] = nn.ReLU(inplace=True)
            parts["pool0"] = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            parts["conv0"] = nn.Conv2d(in_chans, init_channels, 3, padding=1, bias=False)
        channels, reduction = init_channels, 4 if stem == "imagenet" else 1
        for t, count in enumerate(layers):
            parts[f"denseblock{t + 1}"] = DenseBlock(
                count,
                channels,
                growth_rate,
                bottleneck=NECK * growth_rate if bottleneck else None,
                drop_rate=drop_rate,
                norm_layer=norm_layer,
                fused=fused,
            )
            channels += count * growth_rate
            self.feature_info.append(
                {"num_chs": channels, "reduction": reduction * 2**t, "module": f"features.denseblock{t + 1}"}
            )
            if t + 1 < len(layers):
                kept = channels // 2 if compression else channels
                parts[f"transition{t + 1}"] = Transition(
                    channels, kept, drop_rate=drop_rate, norm_layer=norm_layer, fused=fused
                )
                channels = kept
        # Its name in torchvision, however many blocks there are.
        parts["norm5"] = norm_layer(channels)
        parts["relu5"] = nn.ReLU(inplace=True)
        self.features = Features(parts, fused)
        self.classifier = nn.Linear(channels, num_classes)
        self.num_features = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.init_classifier(self.classifier)

    def init_classifier(self, linear: nn.Linear) -> None:
        """As in torchvision: nn.Linear's weights, no bias."""
        linear.reset_parameters()
        nn.init.zeros_(linear.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, features: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor:
        assert isinstance(features, Tensor)
        pooled = global_average(features)
        return pooled if pre_logits else self.classifier(pooled)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        self.features.grad_checkpointing = self.grad_checkpointing


def build(
    imagenet: str | None,
    depth: str | None,
    suffix: str | None,
    *,
    growth_rate: int | None = None,
    init_channels: int | None = None,
    num_classes: int | None = None,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    fused: bool = True,
) -> DenseNet:
    """ImageNet's by their layers, CIFAR's by their depth, with k = 12 unless given."""
    if growth_rate is not None:
        whole("growth_rate", growth_rate, 1, MAX_CHANNELS)
    if init_channels is not None:
        whole("init_channels", init_channels, 1, MAX_CHANNELS)
    classes = num_classes if num_classes is not None else 10 if imagenet is None else 1000
    common(classes, in_chans, drop_rate, fused)
    if imagenet is not None:
        k, layers, channels = IMAGENET[imagenet]
        return DenseNet(
            growth_rate or k,
            layers,
            init_channels or channels,
            num_classes=classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            fused=fused,
        )
    assert depth is not None
    bc = suffix == "bc"
    per_layer = 2 if bc else 1
    total = whole("name: depth", int(depth), 4 + 3 * per_layer, MAX_LAYERS)
    # The stem, two transitions and the linear layer; the rest in three equal blocks.
    count, odd = divmod(total - 4, 3 * per_layer)
    if odd:
        raise ValueError(
            f"name: depth: expected 4 + {3 * per_layer} * layers, such as {4 + 3 * per_layer * 12}, got {total}"
        )
    k = growth_rate or 12
    return DenseNet(
        k,
        [count] * 3,
        init_channels or (2 * k if bc else 16),
        stem="cifar",
        bottleneck=bc,
        compression=bc,
        num_classes=classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        fused=fused,
    )


FAMILIES = {
    "densenet": Family(
        "densenet<121|161|169|201> or densenet-<depth>[-bc]",
        re.compile(r"(?P<imagenet>121|161|169|201)|-(?P<depth>[0-9]{1,6})(?:-(?P<suffix>bc))?"),
        build,
        [
            *(f"densenet{layers}" for layers in IMAGENET),
            *(f"densenet-{depth}" for depth in ("40", "100", "100-bc", "190-bc", "250-bc")),
        ],
        {},
    )
}
