"""What stands between periods, and behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast.nn.dense import NormLayer, concatenated, dropout
from rkfast.nn.norm import batch_norm_relu, hooked, reads_moments
from rkfast.nn.pool import average, average_of_norm, global_average
from rkfast.ops import Moments


class Attention(nn.Module):
    """A gate per sample and channel, ``x * sigmoid(fc2(relu(fc1(mean(x)))))`` (Yang et al., "Convolutional Neural
    Networks with Alternately Updated Clique", attentional transition).

    Args:
        channels: C; fc1 has C // 2 outputs, at least one.

    Shape: Tensor [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, max(channels // 2, 1))
        self.fc2 = nn.Linear(max(channels // 2, 1), channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(global_average(x))

    def gate(self, mean: Tensor) -> Tensor:
        """The factor [N, C, 1, 1] from the mean of x over H and W, Tensor [N, C]."""
        return torch.sigmoid(self.fc2(F.relu(self.fc1(mean))))[:, :, None, None]


class Transition(nn.Module):
    """From one period to the next, at half the resolution: ``pool(attention(dropout(conv(relu(norm(y))))))``.

    A 1x1 convolution without bias and an average over 2x2; names and keys are torchvision's.

    Args:
        in_channels, out_channels: of the convolution.
        attention: gate the convolution's result (the "A" of IRKNet-AB and CliqueNet).
        drop_rate: of a dropout after the convolution.
        norm_layer: makes the BatchNorm.
        norm_name: what it is called in the state_dict.
        fused: False takes stock PyTorch operations in this order, with the same parameters and keys.

    Shape: Tensor [N, in_channels, H, W] -> [N, out_channels, H // 2, W // 2].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        attention: bool = False,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
        norm_name: str = "norm",
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.drop_rate = drop_rate
        self.norm_name = norm_name
        self.add_module(norm_name, norm_layer(in_channels))
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.attention = Attention(out_channels) if attention else None
        self.pool = nn.AvgPool2d(2)

    def forward(self, y: Tensor, moments: Moments | None = None) -> Tensor:
        norm, pools_first = self.get_submodule(self.norm_name), self._pools_first()
        if pools_first and self.attention is None:
            return self.conv(average_of_norm(self.pool, norm, y, moments))
        x = batch_norm_relu(norm, y, moments, fused=self.fused)
        if pools_first and self.attention is not None:
            pooled = self.conv(average(self.pool, x))
            # The mean of the convolution's result is the convolution of the mean, also where the pool leaves out a row.
            return pooled * self.attention.gate(F.linear(global_average(x), self.conv.weight.flatten(1)))
        x = dropout(self.conv(x), self.drop_rate, self.training)
        if self.attention is not None:
            x = self.attention(x)
        return self.pool(x)

    def _pools_first(self) -> bool:
        """Whether the average comes before the 1x1 convolution, with which it commutes: a quarter of the products. Not
        where something that does not commute, or is not known to, stands between them."""
        between = [self.conv, self.pool, *([self.attention] if self.attention is not None else [])]
        return (
            self.fused
            and [type(module) for module in between] == [nn.Conv2d, nn.AvgPool2d, Attention][: len(between)]
            and not any(map(hooked, between))
            and not (self.training and self.drop_rate > 0)
        )

    def reads_moments(self) -> bool:
        """Whether forward makes use of its input's moments."""
        return self.fused and reads_moments(self.get_submodule(self.norm_name))

    def extra_repr(self) -> str:
        return f"fused={self.fused}"


class NormPool(nn.Module):
    """The values that a period gives to the classifier, ``mean(relu(norm(y)))`` over H and W.

    Args:
        channels: C.
        norm_layer, norm_name, fused: as in Transition.

    Shape: Tensor [N, C, H, W] -> [N, C].
    """

    def __init__(
        self,
        channels: int,
        *,
        norm_layer: NormLayer = nn.BatchNorm2d,
        norm_name: str = "norm",
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.norm_name = norm_name
        self.add_module(norm_name, norm_layer(channels))

    def forward(self, y: Tensor, moments: Moments | None = None) -> Tensor:
        return global_average(batch_norm_relu(self.get_submodule(self.norm_name), y, moments, fused=self.fused))

    def reads_moments(self) -> bool:
        """Whether forward makes use of its input's moments."""
        return self.fused and reads_moments(self.get_submodule(self.norm_name))

    def extra_repr(self) -> str:
        return f"fused={self.fused}"


class MultiscaleHead(nn.Module):
    """A linear layer over what several periods end with (Zhu et al., "Convolutional Neural Networks combined with
    Runge-Kutta Methods", Appendix B), ``fc([mean(relu(norm_t(y_t))) for each period t])``.

    Args:
        channels: C_t of each period that takes part.
        num_classes: of the result; 0 leaves the linear layer out.
        norm_layer, fused: as in Transition.

    Shape: Tensors [N, C_t, H_t, W_t] -> [N, num_classes].
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        *,
        norm_layer: NormLayer = nn.BatchNorm2d,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.pools = nn.ModuleList(NormPool(c, norm_layer=norm_layer, fused=fused) for c in channels)
        self.fc = nn.Linear(sum(channels), num_classes) if num_classes else nn.Identity()

    def forward(
        self,
        states: Sequence[Tensor],
        moments: Sequence[Moments | None] | None = None,
        *,
        pre_logits: bool = False,
    ) -> Tensor:
        known = moments or [None] * len(states)
        pooled = concatenated([pool(y, m) for pool, y, m in zip(self.pools, states, known, strict=True)])
        return pooled if pre_logits else self.fc(pooled)
