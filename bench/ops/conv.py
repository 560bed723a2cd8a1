"""conv, the first convolution of a residual block with its shortcut in training, beside its two operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import conv

from ..workload import TINY, Case, Function, Inputs, Traffic


@dataclass(frozen=True)
class Conv:
    """An n x n convolution, of as many outputs as there are channels, and the sum of both."""

    n: int = 3

    op = "conv"
    differentiable = True
    relu = False
    rms = True  # by tiles it rounds differently

    @property
    def name(self) -> str:
        return f"{self.n}x{self.n}"

    @property
    def traffic(self) -> Traffic:
        """x, the result, and both for the sum; back, the gradient for each of both gradients and as that of the
        shortcut, x, and dx."""
        return Traffic(5, 5)

    def draw(self, shape: tuple[int, ...], randn: Callable[..., Tensor]) -> Inputs:
        c = shape[1]
        return Inputs([randn(*shape)], [randn(c, c, self.n, self.n) * (2 / (c * self.n**2)) ** 0.5], [])

    def ours(self, activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
        out, x = conv(activations[0], vectors[0].to(activations[0].dtype), return_input=True)
        return (out + x,)

    def before_relu(self) -> Function:
        raise NotImplementedError

    def peers(self) -> dict[str, Function]:
        def eager(activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
            x = activations[0]
            return (F.conv2d(x, vectors[0].to(x.dtype), padding=self.n // 2) + x,)

        return {"eager": eager}


def cases(size: str, device: str) -> Iterator[Case]:
    if size == "tiny":
        yield Case(Conv(), TINY, torch.float32, main=True)
        yield Case(Conv(1), TINY, torch.float32)
        return
    if device == "cuda":
        yield Case(Conv(), (128, 64, 32, 32), torch.bfloat16, main=True)
        if size == "full":
            yield Case(Conv(1), (256, 64, 56, 56), torch.bfloat16)
        return
    yield Case(Conv(), (8, 64, 32, 32), torch.float32, main=True)
    yield Case(Conv(), (4, 128, 28, 28), torch.float32, main=True)
    if size == "full":
        yield Case(Conv(), (16, 16, 32, 32), torch.float32)
        yield Case(Conv(), (4, 256, 14, 14), torch.float32)
        yield Case(Conv(1), (4, 64, 56, 56), torch.float32)
        yield Case(Conv(), (8, 64, 32, 32), torch.float32, channels_last=False)
