"""Branches: the F of y' = F(y), one per stage of a Runge-Kutta step."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from rkfast.nn.norm import batch_norm_relu, batch_norm_relu_conv, reads_moments
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
        wanted = self.fused and reads_moments(self.norm2)
        z, found = batch_norm_relu_conv(self.norm1, self.conv1, x, moments, fused=self.fused, return_moments=wanted)
        return batch_norm_relu_conv(self.norm2, self.conv2, z, found, fused=self.fused)[0]

    def reads_moments(self) -> bool:
        """Whether forward makes use of its input's moments."""
        return self.fused and reads_moments(self.norm1)

    def extra_repr(self) -> str:
        return f"fused={self.fused}"


class SymmetricBranch(nn.Module):
    """``-K^T relu(norm(K x))``: a 3x3 convolution K without bias, and its transpose with the same weight (Ruthotto and
    Haber, "Deep Neural Networks Motivated by Partial Differential Equations").

    Without the norm the Jacobian is symmetric and has no positive eigenvalue. It has half the weights of PreActBranch
    for as many convolutions.

    Args:
        channels: C of input and output.
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, channels: int, *, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        z = batch_norm_relu(self.norm, self.conv(x), fused=self.fused)
        # The sign goes into the weight, which is small.
        return F.conv_transpose2d(z, -self.conv.weight, padding=1)

    def extra_repr(self) -> str:
        return f"fused={self.fused}"


def takes_moments(branch: nn.Module) -> bool:
    """Whether ``branch(x, moments)`` may be called, and makes use of the moments."""
    asks = getattr(branch, "reads_moments", None)
    return asks is not None and asks()


def slope(branch: nn.Module, x: Tensor, moments: Moments | None) -> Tensor:
    """F(x), with x's moments where they are known and the branch takes them."""
    return branch(x, moments) if moments is not None and takes_moments(branch) else branch(x)
