"""dense_block as the explicit Runge-Kutta step of RKNet, beside the step written with torch.cat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import Norm, dense_block

from ..workload import TINY, Case, Function, Inputs, Traffic

MOMENTUM, EPS = 0.1, 1e-5


@dataclass(frozen=True)
class DenseBlock:
    """s stages of m growths of C / m channels, in training; a bottleneck is 4 growth rates wide."""

    stages: int
    m: int = 1
    neck: bool = False

    op = "dense_block"
    differentiable = True
    relu = False
    rms = True  # whatever rounds differently, some ReLU within flips

    @property
    def name(self) -> str:
        return f"erk-{self.stages}x{self.m}{'-b' if self.neck else ''}"

    @property
    def growths(self) -> int:
        return self.stages * self.m

    @property
    def traffic(self) -> Traffic:
        """Prefixes that are read and slots that are written, in tensors like the input; a bottleneck is written and
        read. The backward reads and accumulates each prefix and reads each slot's gradient."""
        prefixes = sum(1 + i / self.m for i in range(self.growths))
        necks = self.growths * 4 / self.m if self.neck else 0
        forward = 2 + prefixes + 2 * necks + self.stages + (1 + self.stages) + 1
        return Traffic(round(forward), round(3 * prefixes + 3 * necks + 3 * self.stages))

    def draw(self, shape: tuple[int, ...], randn: Callable[..., Tensor]) -> Inputs:
        c = shape[1]
        k = c // self.m
        vectors: list[Tensor] = []
        buffers: list[Tensor] = []

        def norm(channels: int) -> None:
            vectors.extend((1 + 0.1 * randn(channels), 0.1 * randn(channels)))
            buffers.extend((randn(channels), 1 + 0.5 * randn(channels).abs()))

        for i in range(self.growths):
            read = c + i * k
            norm(read)
            if self.neck:
                vectors.append(randn(4 * k, read, 1, 1) * (2 / read) ** 0.5)
                norm(4 * k)
            vectors.append(
                randn(k, 4 * k if self.neck else read, 3, 3) * (2 / (9 * (4 * k if self.neck else read))) ** 0.5
            )
        return Inputs([randn(*shape)], vectors, buffers)

    def _parts(self, vectors: list[Tensor], buffers: list[Tensor]) -> list[tuple[Tensor, Norm]]:
        """(convolution, the norm before it), in order."""
        return [
            (
                vectors[3 * i + 2],
                Norm(vectors[3 * i], vectors[3 * i + 1], buffers[2 * i], buffers[2 * i + 1], None, True, MOMENTUM, EPS),
            )
            for i in range(len(vectors) // 3)
        ]

    def ours(self, activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
        parts = self._parts(vectors, buffers)
        first, second = (parts[::2], parts[1::2]) if self.neck else (parts, [])
        convs = [[conv.to(activations[0].dtype) for conv, _ in some] for some in (first, second)]
        norms = [[norm for _, norm in some] for some in (first, second)]
        return (dense_block(activations[0], convs[0], norms[0], convs[1], norms[1], sum_of=self.stages),)

    def before_relu(self) -> Function:
        raise NotImplementedError

    def peers(self) -> dict[str, Function]:
        def eager(activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
            x = activations[0]
            slots = [x]
            h = x
            for i, (conv, norm) in enumerate(self._parts(vectors, buffers)):
                if not self.neck or i % 2 == 0:
                    h = torch.cat(slots, 1)
                h = F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, MOMENTUM, EPS)
                h = F.conv2d(F.relu(h, inplace=True), conv.to(x.dtype), padding=conv.shape[2] // 2)
                if not self.neck or i % 2:
                    slots.append(h)
            increments = torch.cat(slots[1:], 1).split(x.shape[1], 1) if self.m > 1 else slots[1:]
            total = x
            for z in increments:
                total = total + z
            return (total,)

        return {"eager": eager}


def cases(size: str, device: str) -> Iterator[Case]:
    if size == "tiny":
        yield Case(DenseBlock(2), TINY, torch.float32, main=True)
        yield Case(DenseBlock(2, neck=True), TINY, torch.float32)
        return
    if device == "cuda":  # ERKNet's step, and DenseNet-121's blocks
        yield Case(DenseBlock(7), (64, 36, 32, 32), torch.bfloat16, main=True)
        yield Case(DenseBlock(3, 2, neck=True), (256, 64, 56, 56), torch.bfloat16, main=True)
        if size == "full":
            yield Case(DenseBlock(3, 4, neck=True), (256, 128, 28, 28), torch.bfloat16)
            yield Case(DenseBlock(3, 8, neck=True), (256, 256, 14, 14), torch.bfloat16)
        return
    yield Case(DenseBlock(7), (16, 36, 32, 32), torch.float32, main=True)
    yield Case(DenseBlock(3, 2, neck=True), (4, 64, 56, 56), torch.float32, main=True)
    if size == "full":
        yield Case(DenseBlock(3, 4, neck=True), (4, 128, 28, 28), torch.float32)
        yield Case(DenseBlock(3, 8, neck=True), (4, 256, 14, 14), torch.float32)
        yield Case(DenseBlock(7), (16, 36, 32, 32), torch.float32, channels_last=False)
