"""CliqueNet for CIFAR and SVHN (Yang et al., "Convolutional Neural Networks with Alternately Updated Clique")."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from rkfast.models.base import MAX_CHANNELS, MAX_LAYERS, Family, ImageModel, common, init_rk, rk_norm, whole
from rkfast.nn import CliqueBlock, MultiscaleHead, Transition, batch_norm_relu
from rkfast.nn.dense import NormLayer, dropout

BLOCKS = 3


class Compression(nn.Module):
    """CliqueNet's "C", ``dropout(conv(relu(norm(x))))`` with a 1x1 convolution to half the channels.

    Shape: Tensor [N, C, H, W] -> [N, C // 2, H, W].
    """

    def __init__(self, channels: int, *, drop_rate: float = 0.0, norm_layer: NormLayer, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.drop_rate = drop_rate
        self.norm = norm_layer(channels)
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(batch_norm_relu(self.norm, x, fused=self.fused))
        return dropout(x, self.drop_rate, self.training)


class CliqueNet(ImageModel):
    """A 3x3 stem, clique blocks with transitions between them, and a linear layer over what all blocks give.

    A block gives its input and its Stage-II to the classifier, and its Stage-II alone to the next block.

    Args:
        stages: layers of each block.
        growth_rate: k.
        init_channels: of the stem.
        transition_channels: of each transition's result; None for as many as it reads.
        attention: attentional transitions, "A".
        bottleneck: "B", 1x1 convolutions to k channels and 3x3 ones behind them.
        compression: "C", halves the channels that a block gives to the classifier.
        num_classes, in_chans: of output and input.
        drop_rate: of a dropout after each convolution but the stem's.
        norm_layer: makes a BatchNorm of that many channels.
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, in_chans, H, W] -> [N, num_classes].

    forward_features returns a list, what each block gives to the classifier before its BatchNorm.
    """

    _classifier = "head.fc"

    def __init__(
        self,
        stages: Sequence[int],
        growth_rate: int,
        *,
        init_channels: int = 64,
        transition_channels: int | None = None,
        attention: bool = False,
        bottleneck: bool = False,
        compression: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = rk_norm,
        fused: bool = True,
    ) -> None:
        super().__init__(num_classes=num_classes, fused=fused)
        k = growth_rate
        self.stem = nn.Conv2d(in_chans, init_channels, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        self.compressions = nn.ModuleList()
        channels, given = init_channels, []
        for t, s in enumerate(stages):
            self.blocks.append(
                CliqueBlock(
                    channels,
                    k,
                    s,
                    bottleneck=k if bottleneck else None,
                    drop_rate=drop_rate,
                    norm_layer=norm_layer,
                    fused=fused,
                )
            )
            given.append(channels + s * k)
            if compression:
                self.compressions.append(
                    Compression(given[-1], drop_rate=drop_rate, norm_layer=norm_layer, fused=fused)
                )
                given[-1] //= 2
            if t + 1 < len(stages):
                channels = transition_channels or s * k
                self.transitions.append(
                    Transition(
                        s * k, channels, attention=attention, drop_rate=drop_rate, norm_layer=norm_layer, fused=fused
                    )
                )
        self.head = MultiscaleHead(given, num_classes, norm_layer=norm_layer, fused=fused)
        self.num_features = sum(given)
        self.feature_info = [
            {"num_chs": s * k, "reduction": 2**t, "module": f"blocks.{t}"} for t, s in enumerate(stages)
        ]
        init_rk(self)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        y, given = self.stem(x), []
        for t, block in enumerate(self.blocks):
            z, _ = self._period(block, y)
            feature = torch.cat([y, z], 1)
            given.append(self.compressions[t](feature) if len(self.compressions) else feature)
            if t < len(self.transitions):
                y = self.transitions[t](z)
        return given

    def forward_head(self, features: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor:
        return self.head(cast(list[Tensor], features), pre_logits=pre_logits)


def build(
    layers: str | None,
    suffix: str | None,
    *,
    growth_rate: int = 64,
    init_channels: int = 64,
    transition_channels: int | None = None,
    num_classes: int = 10,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    fused: bool = True,
) -> CliqueNet:
    """``layers`` is T, the convolutions of all three blocks, of which a layer with a bottleneck has two (10.48 million
    parameters with k = 150, T = 30 and all three techniques say so)."""
    bottleneck = "b" in (suffix or "")
    each = BLOCKS * (2 if bottleneck else 1)
    total = 5 * each if layers is None else whole("name: T", int(layers), 2 * each, MAX_LAYERS // 2)
    if total % each:
        raise ValueError(f"name: T counts the convolutions of {BLOCKS} equal blocks; {total} is no multiple of {each}")
    common(num_classes, in_chans, drop_rate, fused)
    if transition_channels is not None:
        whole("transition_channels", transition_channels, 1, MAX_CHANNELS)
    return CliqueNet(
        [total // each] * BLOCKS,
        whole("growth_rate", growth_rate, 1, MAX_CHANNELS),
        init_channels=whole("init_channels", init_channels, 1, MAX_CHANNELS),
        transition_channels=transition_channels,
        attention="a" in (suffix or ""),
        bottleneck=bottleneck,
        compression="c" in (suffix or ""),
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        fused=fused,
    )


FAMILIES = {
    "cliquenet": Family(
        "cliquenet[-<T>][-<a, b, c in this order>]",
        re.compile(r"(?:-(?P<layers>[0-9]{1,6}))?(?:-(?P<suffix>ab?c?|bc?|c))?"),
        build,
        ["cliquenet-12", "cliquenet-15", "cliquenet-18", "cliquenet-30-abc"],
        {},
    )
}
