"""Branches: the F of y' = F(y), one per stage of a Runge-Kutta step."""

from __future__ import annotations

from torch import Tensor, nn

from rkfast.nn.norm import batch_norm_relu, reads_moments
from rkfast.ops import Moments


class PreActBranch(nn.Module):
    """``conv2(relu(norm2(conv1(relu(norm1(x))))))`` with two 3x3 convolutions without bias (HO-ResNet's F).

    Args:
        channels: C of input and output.
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, channels: int, *, fused: bool = True) -> None:
        super().__init__()
        self.channels = channels
        self.fused = fused
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor, moments: Moments | None = None) -> Tensor:
        z = self.conv1(batch_norm_relu(self.norm1, x, moments, fused=self.fused))
        return self.conv2(batch_norm_relu(self.norm2, z, fused=self.fused))

    def reads_moments(self) -> bool:
        """Whether forward makes use of its input's moments."""
        return self.fused and reads_moments(self.norm1)

    def extra_repr(self) -> str:
        return f"fused={self.fused}"
