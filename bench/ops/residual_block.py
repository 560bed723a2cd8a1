"""residual_block, ResNet's blocks in training, beside the block of stock operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import Norm, residual_block

from ..workload import TINY, Case, Function, Inputs, Traffic

MOMENTUM, EPS = 0.1, 1e-5


@dataclass(frozen=True)
class ResidualBlock:
    """Two 3x3 convolutions, or a bottleneck of a quarter of the channels, and the shortcut."""

    neck: bool = False

    op = "residual_block"
    differentiable = True
    relu = False
    rms = True  # whatever rounds differently, some ReLU within flips

    @property
    def name(self) -> str:
        return "bottleneck" if self.neck else "basic"

    @property
    def traffic(self) -> Traffic:
        """x is read twice, each result of a convolution written and read, and the result written; back, the gradient
        and what it reads twice, for sums and products, and each gradient written. What is inside a bottleneck counts as
        one of these."""
        return Traffic(6, 11) if self.neck else Traffic(7, 14)

    def sizes(self, channels: int) -> list[tuple[int, int, int]]:
        """Inputs, outputs and kernel of each convolution."""
        inner = max(channels // 4, 2)  # a weight of one input has no gradient before a BatchNorm, but rounding errors
        basic = [(channels, channels, 3)] * 2
        return [(channels, inner, 1), (inner, inner, 3), (inner, channels, 1)] if self.neck else basic

    def draw(self, shape: tuple[int, ...], randn: Callable[..., Tensor]) -> Inputs:
        vectors, buffers = [], []
        for c, k, n in self.sizes(shape[1]):
            vectors += [randn(k, c, n, n) * (2 / (c * n**2)) ** 0.5, 1 + 0.1 * randn(k), 0.1 * randn(k)]
            buffers += [randn(k), 1 + 0.5 * randn(k).abs()]
        return Inputs([randn(*shape)], vectors, buffers)

    def ours(self, activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
        x = activations[0]
        norms = [
            Norm(weight, bias, mean, var, None, True, MOMENTUM, EPS)
            for weight, bias, mean, var in zip(vectors[1::3], vectors[2::3], buffers[::2], buffers[1::2], strict=True)
        ]
        return (residual_block(x, [w.to(x.dtype) for w in vectors[::3]], norms),)

    def before_relu(self) -> Function:
        raise NotImplementedError

    def peers(self) -> dict[str, Function]:
        def eager(activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
            x = y = activations[0]
            for i, conv in enumerate(vectors[::3]):
                y = F.conv2d(F.relu(y, inplace=True) if i else y, conv.to(x.dtype), padding=conv.shape[2] // 2)
                weight, bias, mean, var = *vectors[3 * i + 1 : 3 * i + 3], *buffers[2 * i : 2 * i + 2]
                y = F.batch_norm(y, mean, var, weight, bias, True, MOMENTUM, EPS)
            return (F.relu(y.add_(x), inplace=True),)

        return {"eager": eager}


def cases(size: str, device: str) -> Iterator[Case]:
    if size == "tiny":
        yield Case(ResidualBlock(), TINY, torch.float32, main=True)
        yield Case(ResidualBlock(neck=True), TINY, torch.float32)
        return
    if device == "cuda":
        yield Case(ResidualBlock(), (64, 16, 32, 32), torch.bfloat16, main=True)
        yield Case(ResidualBlock(neck=True), (256, 256, 56, 56), torch.bfloat16, main=True)
        if size == "full":
            yield Case(ResidualBlock(), (128, 64, 32, 32), torch.bfloat16)
            yield Case(ResidualBlock(neck=True), (256, 1024, 14, 14), torch.bfloat16)
        return
    yield Case(ResidualBlock(), (16, 16, 32, 32), torch.float32, main=True)
    yield Case(ResidualBlock(neck=True), (4, 256, 56, 56), torch.float32, main=True)
    if size == "full":
        yield Case(ResidualBlock(), (16, 64, 8, 8), torch.float32)
        yield Case(ResidualBlock(), (4, 64, 56, 56), torch.float32)
        yield Case(ResidualBlock(neck=True), (4, 1024, 14, 14), torch.float32)
        yield Case(ResidualBlock(neck=True), (4, 2048, 7, 7), torch.float32)
