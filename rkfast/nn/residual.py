"""Residual blocks (He et al., "Deep Residual Learning for Image Recognition"), with torchvision's names and keys; those
with a gate have timm's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast.nn.norm import (
    as_norm,
    batch_norm_relu,
    batch_norm_relu_conv,
    batch_norm_sum,
    group_of,
    hooked,
    reads_moments,
    recomputed,
    serves,
    shared_conv,
    takes_relu,
    whole_residual,
)
from rkfast.nn.pool import global_average
from rkfast.ops import Moments, channel_moments, rk_sum
from rkfast.ops.channel_moments import moments_dtype


class SqueezeExcite(nn.Module):
    """A gate per sample and channel, ``x * sigmoid(fc2(relu(fc1(mean(x)))))`` (Hu et al., "Squeeze-and-Excitation
    Networks"), whose linear layers are 1x1 convolutions with bias, as in timm.

    Args:
        channels: C.
        reduction: fc1 has C // reduction outputs, at least one.

    Shape: Tensor [N, C, H, W] -> [N, C, H, W].
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, max(channels // reduction, 1), 1)
        self.fc2 = nn.Conv2d(max(channels // reduction, 1), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(global_average(x))[:, :, None, None]

    def gate(self, mean: Tensor) -> Tensor:
        """The factor [N, C] from the mean of x over H and W, Tensor [N, C]."""
        return torch.sigmoid(self.fc2(F.relu(self.fc1(mean[:, :, None, None]))))[:, :, 0, 0]


class Projection(nn.Sequential):
    """The shortcut of a block that changes shape, ``norm(conv(x))`` with a 1x1 convolution (option B of the paper).

    Args:
        in_channels, out_channels, stride: of the convolution.
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, fused: bool = True) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        return batch_norm_sum(norm, conv(x), fused=self.fused)

    def extra_repr(self) -> str:
        return f"fused={self.fused}"


class PadShortcut(nn.Module):
    """The shortcut without parameters of a block that changes shape: every ``stride``-th row and column, and zeros for
    the channels that are missing (option A of the paper).

    Shape: Tensor [N, C, H, W] -> [N, C + more, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, more: int, stride: int = 1) -> None:
        super().__init__()
        self.more = more
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # Indexing in place of a pool would lose channels_last.
        return F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, 0, self.more))

    def extra_repr(self) -> str:
        return f"more={self.more}, stride={self.stride}"


class _Residual(nn.Module):
    """What the blocks share: ``relu(shortcut(x) + step * se(norm(...)))``. With ``memory`` "min" fused ones make the
    last convolution and the shortcut again in backward, and keep what those read."""

    expansion = 1
    relu: nn.Module
    se: SqueezeExcite | None
    downsample: nn.Module | None

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.memory = "speed"

    def _last(self, y: Tensor, x: Tensor, step: Tensor | None, moments: Moments | None) -> Tensor:
        """The block from the input y, with its moments if known, of its last but one BatchNorm to its end."""
        raise NotImplementedError

    def _whole(
        self, convs: Sequence[nn.Module], norms: Sequence[nn.Module], x: Tensor, step: Tensor | None
    ) -> Tensor | None:
        """The block in one op, where it can be."""
        if not self.fused or self.se is not None:
            return None
        down = self.downsample
        projection = list(down) if type(down) is Projection and down.fused and not hooked(down) else ()
        return whole_residual(convs, norms, [self.relu], x, down, projection, step, self.memory)

    def _behind(self, y: Tensor, x: Tensor, step: Tensor | None, moments: Moments | None = None) -> Tensor:
        if self.memory == "min" and self.fused and not torch.compiler.is_compiling():
            return recomputed(self, functools.partial(self._last, moments=moments), y, x, step)
        return self._last(y, x, step, moments)

    def _norm_conv(
        self, norm: nn.Module, conv: nn.Module, x: Tensor, moments: Moments | None, reader: nn.Module
    ) -> tuple[Tensor, Moments | None]:
        """``conv(relu(norm(x)))``, and its moments where the BatchNorm that reads it takes them."""
        if not takes_relu(self.relu):
            return conv(self.relu(batch_norm_sum(norm, x, moments=moments, fused=self.fused))), None
        wanted = self.fused and reads_moments(reader)
        return batch_norm_relu_conv(norm, conv, x, moments, fused=self.fused, return_moments=wanted)

    def _join(self, norm: nn.Module, y: Tensor, x: Tensor, step: Tensor | None, moments: Moments | None) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        behind = [] if self.se is None else [self.se]
        return join(norm, behind, self.relu, y, shortcut, step, moments, fused=self.fused)

    def extra_repr(self) -> str:
        return f"fused={self.fused}"


class BasicBlock(_Residual):
    """``relu(shortcut(x) + step * F(x))`` with ``F(x) = bn2(conv2(relu(bn1(conv1(x)))))``, two 3x3 convolutions.

    The join is one pass forward, and one reduction and one pass backward (``rkfast.ops.bn_rk_sum``).

    Args:
        in_channels: of x.
        width: channels of both convolutions, and of the result.
        stride: of conv1.
        downsample: the shortcut of a block that changes shape; None is x itself.
        reduction: of a SqueezeExcite at the end of F; None is none.
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, in_channels, H, W] -> [N, width, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        reduction: int | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__(fused=fused)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = None if reduction is None else SqueezeExcite(width, reduction)
        self.downsample = downsample

    def forward(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        """step: a factor of F per channel, Tensor [C]; None is 1."""
        whole = self._whole([self.conv1, self.conv2], [self.bn1, self.bn2], x, step)
        if whole is not None:
            return whole
        wanted = self.fused and reads_moments(self.bn1)
        y, moments, x = shared_conv(self.conv1, x, fused=self.fused, return_moments=wanted)
        return self._behind(y, x, step, moments)

    def _last(self, y: Tensor, x: Tensor, step: Tensor | None, moments: Moments | None) -> Tensor:
        z, found = self._norm_conv(self.bn1, self.conv2, y, moments, self.bn2)
        return self._join(self.bn2, z, x, step, found)


class Bottleneck(_Residual):
    """``relu(shortcut(x) + step * F(x))`` with ``F(x) = bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))))``, 1x1, 3x3
    and 1x1 convolutions.

    The join is one pass forward, and one reduction and one pass backward (``rkfast.ops.bn_rk_sum``).

    Args:
        in_channels: of x.
        width: a quarter of the channels of the result.
        stride: of conv2, or of conv1 with ``stride_in_1x1`` (the original ResNet, which TSC took).
        downsample, reduction, fused: as in BasicBlock.
        groups, width_per_group: of conv2, which has ``width * width_per_group // 64 * groups`` channels (ResNeXt, Wide
            ResNet).

    Shape: Tensor [N, in_channels, H, W] -> [N, 4 * width, ceil(H / stride), ceil(W / stride)].
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        groups: int = 1,
        width_per_group: int = 64,
        stride_in_1x1: bool = False,
        reduction: int | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__(fused=fused)
        inner, out = width * width_per_group // 64 * groups, width * self.expansion
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, inner, 1, stride=first, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=second, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.se = None if reduction is None else SqueezeExcite(out, reduction)
        self.downsample = downsample

    def forward(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        """step: a factor of F per channel, Tensor [C]; None is 1."""
        convs, norms = [self.conv1, self.conv2, self.conv3], [self.bn1, self.bn2, self.bn3]
        whole = self._whole(convs, norms, x, step)
        if whole is not None:
            return whole
        wanted = self.fused and reads_moments(self.bn1)
        y, found, x = shared_conv(self.conv1, x, fused=self.fused, return_moments=wanted)
        y, moments = self._norm_conv(self.bn1, self.conv2, y, found, self.bn2)
        return self._behind(y, x, step, moments)

    def _last(self, y: Tensor, x: Tensor, step: Tensor | None, moments: Moments | None) -> Tensor:
        z, found = self._norm_conv(self.bn2, self.conv3, y, moments, self.bn3)
        return self._join(self.bn3, z, x, step, found)


def join(
    norm: nn.Module,
    behind: Sequence[nn.Module],
    act: nn.Module,
    y: Tensor,
    shortcut: Tensor,
    step: Tensor | None = None,
    moments: Moments | None = None,
    *,
    fused: bool = True,
) -> Tensor:
    """``act(shortcut + step * behind(norm(y)))``, one op where act is a ReLU and nothing or a gate is behind norm.

    step: a factor per channel, Tensor [C]; None is 1. moments: y's, if they are known."""
    relu = takes_relu(act)
    gate = gate_of(behind) if fused and serves(norm, y) and not group_of(norm) else None
    if gate is not None:
        pooled, moments = _normed_mean(norm, y, moments)
        factor = gate(pooled)
        step = factor if step is None else factor * step
    elif behind:
        y = norm(y)
        for layer in behind:
            y = layer(y)
        norm = nn.Identity()
    if fused and isinstance(norm, nn.Identity):
        out = rk_sum([shortcut, y], [1.0, 1.0], steps=[None, step], relu=relu)
    else:
        out = batch_norm_sum(norm, y, terms=[shortcut], step=step, relu=relu, moments=moments, fused=fused)
    return out if relu else act(out)


def gate_of(behind: Sequence[nn.Module]) -> Callable[[Tensor], Tensor] | None:
    """The factor [N, C] of a squeeze and excitation, ours or timm's, from the mean over H and W, Tensor [N, C]; None
    where anything else is behind."""
    if len(behind) != 1 or hooked(behind[0]):
        return None
    se: Any = behind[0]
    if type(se) is SqueezeExcite:
        return se.gate
    if type(se).__name__ == "SEModule" and se._modules.keys() == {"fc1", "bn", "act", "fc2", "gate"}:
        if getattr(se, "add_maxpool", True):
            return None
        return lambda mean: se.gate(se.fc2(se.act(se.bn(se.fc1(mean[:, :, None, None])))))[:, :, 0, 0]
    return None


def norm_relu(norm: nn.Module, relu: nn.Module, x: Tensor, *, fused: bool) -> Tensor:
    """``relu(norm(x))``, as one op where nobody listens between them."""
    if takes_relu(relu):
        return batch_norm_relu(norm, x, fused=fused)
    return relu(batch_norm_sum(norm, x, fused=fused))


class _NormedMean(torch.autograd.Function):
    """Mean over H and W of BatchNorm's result, from the mean of its input: a gradient [N, C, H, W] that is the same at
    every position is never made."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        batch_stats: bool,
        eps: float,
    ) -> Tensor:
        hat = _hat(x, mean, var, eps)
        hat = hat if weight is None else hat * weight
        return (hat if bias is None else hat + bias).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, mean, var, ctx.batch_stats, ctx.eps = inputs
        ctx.save_for_backward(x, weight, bias, mean, var)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, mean, var = ctx.saved_tensors
        if ctx.batch_stats and torch.is_grad_enabled():  # differentiable again: they depend on x
            var, mean = torch.var_mean(x.to(mean.dtype), (0, 2, 3), correction=0)
        hat, grad = _hat(x, mean, var, ctx.eps), grad.to(mean.dtype)
        dbias, dweight = grad.sum(0), (grad * hat).sum(0)
        slope = torch.rsqrt(var + ctx.eps) if weight is None else torch.rsqrt(var + ctx.eps) * weight
        positions = x.shape[2] * x.shape[3]
        offset = slope * grad / positions  # [N, C]
        if ctx.batch_stats:
            count = x.shape[0] * positions
            by_x = -slope * dweight * torch.rsqrt(var + ctx.eps) / count
            offset = offset - slope * dbias / count - by_x * mean
            dx = torch.addcmul(offset[:, :, None, None], by_x[:, None, None], x.to(mean.dtype)).to(x.dtype)
        else:
            dx = offset[:, :, None, None].to(x.dtype).expand_as(x)
        return (
            dx,
            None if weight is None else dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _hat(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Mean over H and W of x normalised, Tensor [N, C]."""
    return (x.mean((2, 3), dtype=mean.dtype) - mean) * torch.rsqrt(var + eps)


def _normed_mean(norm: nn.Module, x: Tensor, moments: Moments | None) -> tuple[Tensor, Moments | None]:
    """Mean of ``norm(x)`` over H and W, Tensor [N, C], and x's moments where norm takes the batch's."""
    given = as_norm(norm)
    if not given.training:
        moments = None
    elif moments is None:
        moments = channel_moments(x.detach())
    mean, var = (given.running_mean, given.running_var) if moments is None else moments[:2]
    assert mean is not None and var is not None  # as_norm trains without them
    dtype = moments_dtype(x.dtype)
    mean, var = mean.to(dtype), var.to(dtype)
    pooled = _NormedMean.apply(x, given.weight, given.bias, mean, var, given.training, given.eps)
    return pooled, moments
