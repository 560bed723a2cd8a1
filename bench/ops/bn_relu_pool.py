"""bn_relu_pool, what stands before a transition's convolution in training, beside its three operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import Norm, bn_relu_pool

from ..workload import TINY, Case, Function, Inputs, Traffic

MOMENTUM, EPS = 0.1, 1e-5


@dataclass(frozen=True)
class BnReluPool:
    op = "bn_relu_pool"
    name = "2x2"
    differentiable = True
    relu = False
    rms = True  # whatever rounds differently, some ReLU within flips
    stride = 2

    @property
    def traffic(self) -> Traffic:
        """x for its moments and for the result, a quarter as large; back, x and the gradient twice, and dx."""
        return Traffic(2.25, 3.5)

    def draw(self, shape: tuple[int, ...], randn: Callable[..., Tensor]) -> Inputs:
        c = shape[1]
        return Inputs([randn(*shape)], [1 + 0.1 * randn(c), 0.1 * randn(c)], [randn(c), 1 + 0.5 * randn(c).abs()])

    def ours(self, activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
        return (
            bn_relu_pool(
                activations[0], Norm(vectors[0], vectors[1], buffers[0], buffers[1], None, True, MOMENTUM, EPS)
            ),
        )

    def before_relu(self) -> Function:
        raise NotImplementedError

    def peers(self) -> dict[str, Function]:
        def eager(activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
            normed = F.batch_norm(activations[0], buffers[0], buffers[1], vectors[0], vectors[1], True, MOMENTUM, EPS)
            return (F.avg_pool2d(F.relu(normed, inplace=True), 2),)

        return {"eager": eager}


def cases(size: str, device: str) -> Iterator[Case]:
    if size == "tiny":
        yield Case(BnReluPool(), TINY, torch.float32, main=True)
        return
    batch, dtype = (256, torch.bfloat16) if device == "cuda" else (4, torch.float32)
    for channels, side in ((256, 56), (512, 28), (1024, 14)):  # DenseNet-121's
        yield Case(BnReluPool(), (batch, channels, side, side), dtype, main=True)
    if size == "full":
        yield Case(BnReluPool(), (batch, 256, 57, 55), dtype)
