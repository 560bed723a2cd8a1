"""bn_relu_conv, the pre-activation convolution in training, beside its three operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import Norm, bn_relu_conv

from ..workload import TINY, Case, Function, Inputs, Traffic

MOMENTUM, EPS = 0.1, 1e-5


@dataclass(frozen=True)
class BnReluConv:
    """An n x n convolution, of as many outputs as there are channels."""

    n: int = 3

    op = "bn_relu_conv"
    differentiable = True
    relu = False
    rms = True  # whatever rounds differently, some ReLU within flips

    @property
    def name(self) -> str:
        return f"{self.n}x{self.n}"

    @property
    def traffic(self) -> Traffic:
        """x for its moments and for the convolution, and the result; back, the gradient and x for each of both
        gradients, and what the moments correct: dx, twice written and once read, and x."""
        return Traffic(3, 8)

    def draw(self, shape: tuple[int, ...], randn: Callable[..., Tensor]) -> Inputs:
        c = shape[1]
        conv = randn(c, c, self.n, self.n) * (2 / (c * self.n**2)) ** 0.5
        vectors = [conv, 1 + 0.1 * randn(c), 0.1 * randn(c)]
        return Inputs([randn(*shape)], vectors, [randn(c), 1 + 0.5 * randn(c).abs()])

    def ours(self, activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
        x, (conv, weight, bias), (mean, var) = activations[0], vectors, buffers
        return (bn_relu_conv(x, conv.to(x.dtype), Norm(weight, bias, mean, var, None, True, MOMENTUM, EPS)),)

    def before_relu(self) -> Function:
        raise NotImplementedError

    def peers(self) -> dict[str, Function]:
        def eager(activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
            x, (conv, weight, bias), (mean, var) = activations[0], vectors, buffers
            normed = F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)
            return (F.conv2d(F.relu(normed, inplace=True), conv.to(x.dtype), padding=self.n // 2),)

        return {"eager": eager}


def cases(size: str, device: str) -> Iterator[Case]:
    if size == "tiny":
        yield Case(BnReluConv(), TINY, torch.float32, main=True)
        yield Case(BnReluConv(1), TINY, torch.float32)
        return
    if device == "cuda":
        for channels, side in ((128, 56), (256, 28)):
            yield Case(BnReluConv(1), (256, channels, side, side), torch.bfloat16, main=True)
        if size == "full":
            yield Case(BnReluConv(1), (256, 512, 14, 14), torch.bfloat16)
            yield Case(BnReluConv(), (256, 128, 28, 28), torch.bfloat16)
        return
    yield Case(BnReluConv(), (8, 64, 32, 32), torch.float32, main=True)
    yield Case(BnReluConv(), (4, 128, 56, 56), torch.float32, main=True)
    if size == "full":
        yield Case(BnReluConv(), (16, 64, 32, 32), torch.float32)
        yield Case(BnReluConv(1), (4, 256, 28, 28), torch.float32)
        yield Case(BnReluConv(5), (8, 64, 32, 32), torch.float32)
        yield Case(BnReluConv(), (8, 64, 32, 32), torch.float32, channels_last=False)
